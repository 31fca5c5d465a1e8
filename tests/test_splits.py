"""Which images and captions a dataset's name stands for."""

import json

import pytest
from conftest import write_dataset

from data_loader import CaptionData
from splits import find_splits


def write_coco(root, year=2017, splits=("train", "val"), kind=""):
    """COCO's folders, with the same dozen drawn photos in every split."""
    for split in splits:
        written = write_dataset(root / split)
        (written / "images").rename(root / f"{split}{year}")
        (root / "annotations").mkdir(exist_ok=True)
        (written / "captions.json").rename(
            root / "annotations" / f"captions_{split}{year}{kind}.json"
        )
    return root


def ids(splits):
    """The images of each split, which have to be there."""
    return {name: CaptionData(*files).image_ids for name, files in splits.items()}


def test_coco(tmp_path):
    """Training is COCO's own; its validation images are shared out, half to val, half to test."""
    found = ids(find_splits("coco2017", write_coco(tmp_path)))
    assert sorted(found["train"]) == list(range(100, 112))
    assert sorted(found["val"] + found["test"]) == list(range(100, 112))
    assert len(found["val"]) == 6


def test_coco_without_validation(tmp_path, capsys):
    """Of training images alone, a tenth becomes val and another tenth test, and it is said."""
    found = ids(find_splits("coco2014", write_coco(tmp_path, 2014, ["train"])))
    assert {name: len(split) for name, split in found.items()} == {"train": 10, "val": 1, "test": 1}
    assert sorted(sum(found.values(), [])) == list(range(100, 112))
    assert "held out" in capsys.readouterr().out


def test_first_images_of_coco(tmp_path):
    """A part of COCO is found by its size, and its splits leave those of the whole as they are."""
    part = find_splits("coco2017", write_coco(tmp_path, kind=".first12"), first=12)
    before = {name: file.read_bytes() for name, (_, file) in part.items()}
    for file in list((tmp_path / "annotations").iterdir()):
        content = json.loads(file.read_text())
        content["images"] = content["images"][:8]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] < 108]
        (file.parent / file.name.replace(".first12", "")).write_text(json.dumps(content))
    whole = find_splits("coco2017", tmp_path)
    assert len(CaptionData(*whole["val"])) == 4
    assert {name: file.read_bytes() for name, (_, file) in part.items()} == before


def test_own_folder(tmp_path):
    """One's own images are split 8 : 1 : 1, the same way every time."""
    root = write_dataset(tmp_path / "mine")
    found = ids(find_splits("folder", root))
    assert {name: len(split) for name, split in found.items()} == {"train": 10, "val": 1, "test": 1}
    assert ids(find_splits("folder", root)) == found


def test_karpathy(tmp_path):
    """Karpathy's file names the split of every image of COCO 2014, whichever folder it is in."""
    images = [
        {"cocoid": number, "filepath": f"{folder}2014", "filename": f"{number % 100:02}.jpg",
         "split": split, "sentences": [{"sentid": number, "raw": "a cat"}]}
        for number, folder, split in (
            (100, "train", "train"), (101, "val", "restval"), (102, "val", "val"),
            (103, "val", "test"),
        )
    ]  # fmt: skip
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": images}))
    found = ids(find_splits("coco2014", write_coco(tmp_path, 2014), karpathy=file))
    assert found == {"train": [100, 101], "val": [102], "test": [103]}


@pytest.mark.parametrize("name, first", [("coco2017", None), ("coco2014", 100)])
def test_karpathy_of_something_else(tmp_path, name, first):
    """Karpathy's split of another dataset, or of a part of COCO, is refused."""
    with pytest.raises(ValueError, match="the whole of coco2014"):
        find_splits(name, tmp_path, karpathy="dataset_coco.json", first=first)
