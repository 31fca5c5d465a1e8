"""Training, validation and test splits of a dataset, by its name.

    splits = prepare_splits("synthetic", "data/synthetic")  # generated if it is not there yet
    splits["train"]                                         # (image folder, captions file)

"synthetic"             the built-in scenes (captioning/scenes); not COCO, but in its layout
"coco2014", "coco2017"  DATA_DIR/train2017, val2017, annotations, as COCO's zip files unpack
"folder"                your own images: DATA_DIR/images, DATA_DIR/captions.json in COCO's format
"""

import json
from collections import defaultdict
from operator import itemgetter
from pathlib import Path

import numpy as np

from captioning.data.coco import DataError, read_captions, write_captions
from captioning.data.download import download_coco
from captioning.scenes.generation import SIZES, write_synthetic

FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}
DATASETS = ("synthetic", "coco2014", "coco2017", "folder")


def prepare_splits(name, data_dir, work_dir=None, download=False, first=None, karpathy=None):
    """{"train": (image folder, captions file), "val": .., "test": ..} of a dataset.

    COCO publishes no captions for its test images. Therefore its validation images are divided at
    random, half of them into "val" and half into "test"; or, given `karpathy` (the path of
    dataset_coco.json), the split of Karpathy & Fei-Fei (2015) is used. If only training captions
    are there, a tenth of their images becomes "val" and another tenth "test". Such splits are
    written as captions files below `work_dir` (default: `data_dir`), the same every time.

    download: download COCO if it is missing. first: use the first `first` images of each split, as
        downloaded by `download_coco(first=first)`.

    Raises DataError that names what is missing and what to do, or ValueError for an unknown name,
    or for `karpathy` with anything but the complete coco2014.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; choose from {', '.join(DATASETS)}")
    if karpathy and (name != "coco2014" or first):
        raise ValueError("Karpathy's split requires the complete coco2014")
    data_dir, work_dir = Path(data_dir), Path(work_dir or data_dir) / "splits"
    if name == "synthetic":
        return write_synthetic(data_dir, sizes=_existing_sizes(data_dir))
    if name == "folder":
        return random_splits(data_dir / "images", data_dir / "captions.json", work_dir)
    work_dir /= "karpathy" if karpathy else f"{name}-first{first}" if first else name
    year = int(name.removeprefix("coco"))
    coco = download_coco(data_dir, year, first) if download else _find_coco(data_dir, year, first)
    if karpathy:
        return karpathy_splits(data_dir, karpathy, work_dir)
    if "val" in coco:
        return coco | random_splits(*coco["val"], work_dir, {"val": 0.5, "test": 0.5})
    print(f"{data_dir} has no validation captions: a tenth of the training images is held out")
    return random_splits(*coco["train"], work_dir)


def _existing_sizes(data_dir: Path) -> dict[str, int]:
    """The sizes of the synthetic splits in `data_dir`, or the default sizes."""
    try:
        captions = (data_dir / "annotations" / "captions_train.json").read_text(encoding="utf-8")
        return json.loads(captions)["info"]["sizes"]
    except (OSError, ValueError, KeyError, TypeError):
        return SIZES


def _find_coco(data_dir: Path, year: int, first=None) -> dict:
    """The splits of COCO that are in `data_dir`; training is required."""
    found, suffix = {}, f".first{first}.json" if first else ".json"
    for split in ("train", "val"):
        images = data_dir / f"{split}{year}"
        captions = data_dir / "annotations" / f"captions_{split}{year}{suffix}"
        if images.is_dir() and captions.is_file():
            found[split] = images, captions
    if "train" not in found:
        raise DataError(
            f"COCO {year} is not in {data_dir}: train{year}/ or annotations/captions_train{year}"
            f"{suffix} is missing; set DOWNLOAD = True, or DATA_DIR to its folder"
        )
    return found


def karpathy_splits(image_dir, karpathy_file, out_dir) -> dict:
    """Write the split of Karpathy & Fei-Fei (2015) as three captions files in COCO's format.

    Reads their `dataset_coco.json` (or `dataset_flickr8k.json`, ..). As usual, "restval" is part of
    training. Image names are relative to `image_dir`, e.g. "val2014/COCO_val...jpg". Raises
    DataError if the file has another format.
    """
    splits = defaultdict(lambda: ([], []))
    try:
        images = json.loads(Path(karpathy_file).read_text(encoding="utf-8"))["images"]
        for number, image in enumerate(images):
            listed, annotations = splits[image["split"].replace("restval", "train")]
            image_id = image.get("cocoid", image.get("imgid", number))
            name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            listed.append({"id": image_id, "file_name": name})
            for sentence in image["sentences"]:
                caption = {"image_id": image_id, "caption": sentence["raw"].strip()}
                annotations.append({"id": sentence["sentid"], **caption})
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is not a Karpathy split file ({type(error).__name__}: {error})"
        raise DataError(f"{karpathy_file} {problem}") from error
    return _write_splits(splits, image_dir, out_dir, f"split by {Path(karpathy_file).name}")


def random_splits(image_dir, captions_file, out_dir, fractions=FRACTIONS, seed=0) -> dict:
    """Divide the images of a captions file, e.g. {"train": 0.8, "val": 0.1, "test": 0.1}.

    An image and all its captions are in one split, the same every time, even if its file is listed
    as several images. Raises DataError if a split would be empty.
    """
    content = read_captions(captions_file).dataset
    images = sorted(content["images"], key=itemgetter("id"))
    files = list(dict.fromkeys(image["file_name"] for image in images))
    stops = [round(stop) for stop in np.cumsum(list(fractions.values())) * len(files)]
    parts = np.split(np.random.default_rng(seed).permutation(len(files)), stops[:-1])
    if not all(map(len, parts)):
        raise DataError(f"{captions_file} lists too few images ({len(files)}) for {fractions}")
    split_of = {files[i]: split for split, part in zip(fractions, parts, strict=True) for i in part}
    split_of = {image["id"]: split_of[image["file_name"]] for image in images}
    splits = {split: ([], []) for split in fractions}
    for image in content["images"]:
        splits[split_of[image["id"]]][0].append(image)
    for annotation in content["annotations"]:
        splits[split_of[annotation["image_id"]]][1].append(annotation)
    source = f"random split of {Path(captions_file).name}, seed {seed}"
    return _write_splits(splits, image_dir, out_dir, source)


def _write_splits(splits, image_dir, out_dir, description) -> dict:
    """Write captions_{split}.json for each split: (images, annotations), in COCO's format."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    files = {name: Path(out_dir) / f"captions_{name}.json" for name in splits}
    for name, (images, annotations) in splits.items():
        write_captions(files[name], images, annotations, description)
    sizes = ", ".join(f"{len(images)} {name}" for name, (images, _) in splits.items())
    print(f"{out_dir}: {sizes} images")
    return {name: (Path(image_dir), file) for name, file in files.items()}
