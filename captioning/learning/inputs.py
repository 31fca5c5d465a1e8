"""The images of a run: which of them can be read, and their features."""

from captioning.base.distributed import print0
from captioning.data.extraction import describe_bad, extract_features, find_bad_images
from captioning.data.features import Views
from captioning.data.images import BadImageError, CropTransform
from captioning.networks.backbones import input_settings

ADVICE = "replace them, or exclude them with --skip-bad-images"


def prepare_images(config, model, train_data, val_data):
    """[(training captions, features), (validation captions, features)] without unreadable images.

    config: a `TrainConfig`. The features are None if a part of the CNN is trained; otherwise those
    for training are random views of the images, with `config.crops` crops.

    Raises BadImageError for unreadable images, unless `config.skip_bad_images`.
    """
    splits, frozen = [train_data, val_data], config.fine_tune == "none"
    for data in splits:
        if data.uncaptioned:
            count = len(data.uncaptioned)
            print0(f"{data.captions_file}: {count} images have no caption and are excluded")
    if config.skip_bad_images or not frozen:  # otherwise the extraction finds them
        splits = readable(config, splits, model.transform)
    if not frozen:  # features that change cannot be kept
        return [(data, None) for data in splits]
    settings = input_settings(config.backbone, config.image_size)
    crops = [CropTransform(seed, **settings) for seed in range(config.crops)]
    try:
        whole, val = (extract(config, model, data, model.transform) for data in splits)
        views = [whole, *(extract(config, model, splits[0], crop) for crop in crops)]
    except BadImageError as error:
        raise BadImageError(f"{error}\n{ADVICE}") from error
    return list(zip(splits, (Views(views, random=True), Views([val])), strict=True))


def extract(config, model, data, transform):
    cnn, cache_dir = model.encoder.cnn, config.cache_dir
    options = config.precision, config.num_workers
    return extract_features(cnn, data.paths, transform, cache_dir, *options)


def readable(config, splits, transform):
    """The splits without unreadable images, which are printed.

    Raises BadImageError unless `config.skip_bad_images`, and if no image of a split is left.
    """
    bad = [find_bad_images(data.paths, transform, config.num_workers) for data in splits]
    reasons = [reason for of_split in bad for reason in of_split.values()]
    if not reasons:
        return splits
    if not config.skip_bad_images:
        raise BadImageError(f"{describe_bad(reasons)}\n{ADVICE}")
    print0(f"{describe_bad(reasons)}\nThey are excluded, with their captions.")
    for data, of_split in zip(splits, bad, strict=True):
        if len(of_split) == len(data):
            raise BadImageError(f"no image of {data.captions_file} can be read")
    return [data.without(rows) for data, rows in zip(splits, bad, strict=True)]
