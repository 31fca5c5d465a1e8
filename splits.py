"""Where the images and captions are: drawn, found, downloaded or split, by one name.

    splits = find_splits("sample", "data/sample")      # drawn on the spot if it is not there yet
    splits["train"]                                    # (folder of images, captions file)

"sample"              drawn scenes (sample_data.py); not COCO, but in its layout
"coco2014", "coco2017" DATA_DIR/train2017, val2017, annotations, as COCO's zips unpack
"folder"              one's own: DATA_DIR/images and DATA_DIR/captions.json in COCO's format
"""

import json
from pathlib import Path

from data_loader import DataError, karpathy_splits, random_splits
from download import download_coco
from sample_data import SPLITS, write_sample

THREE = {"train": 0.8, "val": 0.1, "test": 0.1}
NAMES = ("sample", "coco2014", "coco2017", "folder")


def find_splits(name, data_dir, work_dir=None, download=False, first=None, karpathy=None):
    """{"train": (image folder, captions file), "val": .., "test": ..} of a dataset.

    COCO publishes no captions for its test images. So its validation images are shared out by a
    seeded draw, half of them to "val" and half to "test"; or, given `karpathy` (the path of his
    dataset_coco.json), his split is used. Where only training captions are there, a tenth of their
    images becomes "val" and another tenth "test".
    Such splits are written below `work_dir` (default: `data_dir`) as captions files of their own,
    the same every time.

    download: fetch COCO if it is missing; first: only so many images of each split, as they were
    downloaded.
    Raises DataError naming what is missing and what to do, ValueError for an unknown name, or for
    `karpathy` with anything but the whole of coco2014.
    """
    if name not in NAMES:
        raise ValueError(f"unknown dataset {name!r}; there are {', '.join(NAMES)}")
    data_dir = Path(data_dir)
    work_dir = Path(work_dir or data_dir) / "splits"
    if name == "sample":
        return write_sample(data_dir, sizes=sample_sizes(data_dir))
    if name == "folder":
        files = random_splits(data_dir / "captions.json", work_dir, THREE)
        return {split: (data_dir / "images", file) for split, file in files.items()}
    if karpathy and (name != "coco2014" or first):
        raise ValueError("Karpathy's split is of the whole of coco2014: no other dataset, no FIRST")

    work_dir /= "karpathy" if karpathy else f"{name}-first{first}" if first else name
    year = int(name.removeprefix("coco"))
    if download:
        found = download_coco(data_dir, year, first=first)
    else:
        found = find_coco(data_dir, year, first)
    if karpathy:
        return {s: (data_dir, file) for s, file in karpathy_splits(karpathy, work_dir).items()}
    train_images, train_captions = found["train"]
    if "val" not in found:
        print(f"{data_dir} has no validation captions: a tenth of the training images is held out")
        files = random_splits(train_captions, work_dir, THREE)
        return {split: (train_images, file) for split, file in files.items()}
    val_images, val_captions = found["val"]
    halves = random_splits(val_captions, work_dir, {"val": 0.5, "test": 0.5})
    return {"train": found["train"], **{s: (val_images, file) for s, file in halves.items()}}


def sample_sizes(data_dir: Path) -> dict[str, int]:
    """How many scenes each split has: as many as there are, or the usual number to draw."""
    try:
        captions = (data_dir / "annotations" / "captions_train.json").read_text(encoding="utf-8")
        return json.loads(captions)["info"]["sizes"]
    except (OSError, ValueError, KeyError, TypeError):
        return SPLITS


def find_coco(data_dir: Path, year: int, first=None) -> dict:
    """The splits of COCO that lie in `data_dir`; training has to be there."""
    found, kind = {}, f".first{first}.json" if first else ".json"
    for split in ("train", "val"):
        images = data_dir / f"{split}{year}"
        captions = data_dir / "annotations" / f"captions_{split}{year}{kind}"
        if images.is_dir() and captions.is_file():
            found[split] = images, captions
    if "train" not in found:
        raise DataError(
            f"COCO {year} is not in {data_dir}: train{year}/ or annotations/captions_train{year}"
            f"{kind} is missing; set DOWNLOAD = True, or DATA_DIR to where it is"
        )
    return found
