"""Training, validation and test splits of a dataset, by its name.

    splits = find_splits("synthetic", "data/synthetic")     # generated if it is not there yet
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
from captioning.scenes.dataset import SIZES, write_synthetic

FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}
DATASETS = ("synthetic", "coco2014", "coco2017", "folder")


def find_splits(name, data_dir, work_dir=None, download=False, first=None, karpathy=None):
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
    data_dir = Path(data_dir)
    work_dir = Path(work_dir or data_dir) / "splits"
    if name == "synthetic":
        return write_synthetic(data_dir, sizes=_existing_sizes(data_dir))
    if name == "folder":
        return _random_splits_of(data_dir / "images", data_dir / "captions.json", work_dir)
    if karpathy and (name != "coco2014" or first):
        raise ValueError("Karpathy's split requires the complete coco2014")
    return _coco_splits(name, data_dir, work_dir, download, first, karpathy)


def _coco_splits(name, data_dir, work_dir, download, first, karpathy):
    work_dir /= "karpathy" if karpathy else f"{name}-first{first}" if first else name
    year = int(name.removeprefix("coco"))
    if download:
        found = download_coco(data_dir, year, first=first)
    else:
        found = _find_coco(data_dir, year, first)
    if karpathy:
        files = karpathy_splits(karpathy, work_dir)
        return {split: (data_dir, file) for split, file in files.items()}
    if "val" not in found:
        print(f"{data_dir} has no validation captions: a tenth of the training images is held out")
        return _random_splits_of(*found["train"], work_dir)
    images, captions = found["val"]
    files = random_splits(captions, work_dir, {"val": 0.5, "test": 0.5})
    return {"train": found["train"], **{split: (images, file) for split, file in files.items()}}


def _random_splits_of(images, captions, work_dir):
    files = random_splits(captions, work_dir, FRACTIONS)
    return {split: (images, file) for split, file in files.items()}


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


# ---------------------------------------------------------------------------- writing splits


def karpathy_splits(karpathy_file, out_dir) -> dict[str, Path]:
    """Write the split of Karpathy & Fei-Fei (2015) as three captions files in COCO's format.

    Reads their `dataset_coco.json` (or `dataset_flickr8k.json`, ..). As usual, "restval" is part of
    training. Image names are relative to one folder, e.g. "val2014/COCO_val...jpg". Raises
    DataError if the file has another format.
    """
    try:
        images = json.loads(Path(karpathy_file).read_text(encoding="utf-8"))["images"]
        splits = defaultdict(lambda: ([], []))
        for number, image in enumerate(images):
            listed, annotations = splits[{"restval": "train"}.get(image["split"], image["split"])]
            image_id = image.get("cocoid", image.get("imgid", number))
            name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            listed.append({"id": image_id, "file_name": name})
            annotations += [
                {"id": sentence["sentid"], "image_id": image_id, "caption": sentence["raw"].strip()}
                for sentence in image["sentences"]
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{karpathy_file} is not a Karpathy split file ({type(error).__name__}: {error})"
        ) from None
    return _write_captions_files(splits, out_dir, f"split by {Path(karpathy_file).name}")


def random_splits(captions_file, out_dir, fractions, seed=0) -> dict[str, Path]:
    """Divide the images of a captions file, e.g. {"train": 0.8, "val": 0.1, "test": 0.1}.

    An image and all its captions are in one split, the same every time, even if its file is listed
    as several images. Raises DataError if a split would be empty.
    """
    content = read_captions(captions_file).dataset
    first = {}  # file name -> the first of its ids
    for image in sorted(content["images"], key=itemgetter("id")):
        first.setdefault(image["file_name"], image["id"])
    split_of = _assign_splits(sorted(first.values()), fractions, seed, captions_file)
    for image in content["images"]:
        split_of[image["id"]] = split_of[first[image["file_name"]]]
    splits = {name: ([], []) for name in fractions}
    for image in content["images"]:
        splits[split_of[image["id"]]][0].append(image)
    for annotation in content["annotations"]:
        splits[split_of[annotation["image_id"]]][1].append(annotation)
    return _write_captions_files(
        splits, out_dir, f"random split of {Path(captions_file).name}, seed {seed}"
    )


def _assign_splits(ids, fractions, seed, captions_file) -> dict:
    """Image id -> the name of its split."""
    ids = np.array(ids)
    ids = ids[np.random.default_rng(seed).permutation(len(ids))].tolist()
    stops = [0, *(round(stop) for stop in np.cumsum(list(fractions.values())) * len(ids))]
    if 0 in np.diff(stops):
        raise DataError(f"{captions_file} lists too few images ({len(ids)}) for {fractions}")
    return {
        image_id: name
        for name, start, stop in zip(fractions, stops, stops[1:], strict=False)
        for image_id in ids[start:stop]
    }


def _write_captions_files(splits, out_dir, description) -> dict[str, Path]:
    """Write captions_{split}.json for each split: (images, annotations), in COCO's format."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    files = {name: Path(out_dir) / f"captions_{name}.json" for name in splits}
    for name, (images, annotations) in splits.items():
        write_captions(files[name], images, annotations, description)
    sizes = ", ".join(f"{len(images)} {name}" for name, (images, _) in splits.items())
    print(f"{out_dir}: {sizes} images")
    return files
