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
    splits, features, bad = [train_data, val_data], [None, None], []
    for number, data in enumerate(splits):
        if config.fine_tune == "none":
            array, unreadable = extract(config, model, data, model.transform)
            features[number] = Views([array])
        else:  # features that change cannot be kept
            unreadable = find_bad_images(data.paths, model.transform, config.num_workers)
        bad.append(unreadable)
    report_bad(splits, bad, config.skip_bad_images)
    if config.fine_tune == "none":
        settings = input_settings(config.backbone, config.image_size)
        crops = [CropTransform(seed, **settings) for seed in range(config.crops)]
        arrays = [extract(config, model, train_data, crop)[0] for crop in crops]
        features[0] = Views([*features[0].arrays, *arrays], random=True)
        features = [views.without(rows) for views, rows in zip(features, bad, strict=True)]
    kept = [data.without(rows) for data, rows in zip(splits, bad, strict=True)]
    return list(zip(kept, features, strict=True))


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
