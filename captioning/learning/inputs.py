"""The images of a run: which of them can be read, and their features."""

from captioning.base.distributed import print0
from captioning.data.extraction import describe_bad, extract_features, find_bad_images
from captioning.data.features import Views
from captioning.data.images import BadImageError, CropTransform
from captioning.networks.backbones import input_settings


def prepare_images(config, model, train_data, val_data):
    """[(training captions, features), (validation captions, features)] without unreadable images.

    config: a `TrainConfig`. The features are None if a part of the CNN is trained; otherwise those
    for training are random views of the images, with `config.crops` crops.

    Raises BadImageError for unreadable images, unless `config.skip_bad_images`.
    """
    splits, frozen = [train_data, val_data], config.fine_tune == "none"
    if frozen:
        found = [extract(config, model, data, model.transform) for data in splits]
    else:  # features that change cannot be kept
        workers = config.num_workers
        found = [(None, find_bad_images(x.paths, model.transform, workers)) for x in splits]
    arrays, bad = zip(*found, strict=True)
    report_bad(splits, bad, config.skip_bad_images)
    kept = [data.without(rows) for data, rows in zip(splits, bad, strict=True)]
    if not frozen:
        return [(data, None) for data in kept]
    settings = input_settings(config.backbone, config.image_size)
    crops = [CropTransform(seed, **settings) for seed in range(config.crops)]
    crops = [extract(config, model, train_data, crop)[0] for crop in crops]
    views = Views([arrays[0], *crops], random=True), Views([arrays[1]])
    return [(data, x.without(rows)) for data, x, rows in zip(kept, views, bad, strict=True)]


def extract(config, model, data, transform):
    return extract_features(
        model.encoder.cnn,
        data.paths,
        transform,
        config.cache_dir,
        config.precision,
        config.num_workers,
        skip_bad=True,
    )


def report_bad(splits, bad, skip):
    """Print which images are excluded; raise BadImageError for unreadable ones unless `skip`."""
    for split in splits:
        if split.uncaptioned:
            count = len(split.uncaptioned)
            print0(f"{split.captions_file}: {count} images have no caption and are excluded")
    reasons = [reason for of_split in bad for reason in of_split.values()]
    if not reasons:
        return
    found = describe_bad(reasons)
    if not skip:
        raise BadImageError(f"{found}\nreplace them, or exclude them with --skip-bad-images")
    print0(f"{found}\nThey are excluded, with their captions.")
    for split, of_split in zip(splits, bad, strict=True):
        if len(of_split) == len(split):
            raise BadImageError(f"no image of {split.captions_file} can be read")
