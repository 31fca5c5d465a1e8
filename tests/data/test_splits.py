"""The splits of every dataset: which images and captions they have."""

import json

import pytest
from conftest import CAPTIONS, write_dataset

from captioning.data.coco import CocoCaptions, DataError
from captioning.data.splits import karpathy_splits, prepare_splits, random_splits

FRACTIONS = {"train": 0.5, "val": 0.25, "test": 0.25}


def write_coco(root, year=2017, splits=("train", "val"), kind=""):
    """COCO's folders, with the same dozen random images in every split."""
    (root / "annotations").mkdir()
    for split in splits:
        written = write_dataset(root / split)
        (written / "images").rename(root / f"{split}{year}")
        (written / "captions.json").rename(
            root / "annotations" / f"captions_{split}{year}{kind}.json"
        )
    return root


def ids(splits):
    """The images of each split."""
    return {name: CocoCaptions(*files).image_ids for name, files in splits.items()}


def read(files):
    return {name: json.loads(path.read_text()) for name, (_, path) in files.items()}


def test_coco(tmp_path):
    """COCO's training images are "train"; one half of its validation images is "val"."""
    found = ids(prepare_splits("coco2017", write_coco(tmp_path)))
    assert found["train"] == list(range(100, 112))
    assert sorted(found["val"] + found["test"]) == list(range(100, 112))
    assert len(found["val"]) == 6


def test_coco_without_validation(tmp_path, capsys):
    """Without validation images, a tenth of the training images is "val" and a tenth "test"."""
    found = ids(prepare_splits("coco2014", write_coco(tmp_path, 2014, ["train"])))
    assert {name: len(split) for name, split in found.items()} == {"train": 10, "val": 1, "test": 1}
    assert sorted(sum(found.values(), [])) == list(range(100, 112))
    assert "held out" in capsys.readouterr().out


def test_first_images_of_coco(tmp_path):
    """The splits of a part of COCO and those of the complete COCO do not overwrite each other."""
    part = prepare_splits("coco2017", write_coco(tmp_path, kind=".first12"), first=12)
    before = {name: file.read_bytes() for name, (_, file) in part.items()}
    for file in list((tmp_path / "annotations").iterdir()):
        content = json.loads(file.read_text())
        content["images"] = content["images"][:8]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] < 108]
        (file.parent / file.name.replace(".first12", "")).write_text(json.dumps(content))
    assert len(ids(prepare_splits("coco2017", tmp_path))["val"]) == 4
    assert {name: file.read_bytes() for name, (_, file) in part.items()} == before


def test_folder(tmp_path):
    """Your own images are split 8 : 1 : 1, the same way every time."""
    root = write_dataset(tmp_path / "mine")
    found = ids(prepare_splits("folder", root))
    assert {name: len(split) for name, split in found.items()} == {"train": 10, "val": 1, "test": 1}
    assert ids(prepare_splits("folder", root)) == found


def karpathy_image(number, split, **more):
    sentences = [
        {"sentid": 10 * number + i, "raw": f" Caption {i} of {number}.\n"} for i in range(2)
    ]
    image = {"filename": f"{number}.jpg", "imgid": number, "split": split}
    return image | {"sentences": sentences} | more


def test_splits_of_karpathy(tmp_path):
    """Karpathy's file gives the split of every image of COCO 2014, whichever folder it is in;
    "restval" is training, and names contain folders."""
    images = [
        karpathy_image(0, "train", cocoid=500, filepath="train2014"),
        karpathy_image(1, "restval", cocoid=501, filepath="val2014"),
        karpathy_image(2, "val", cocoid=502, filepath="val2014"),
        karpathy_image(3, "test"),  # as in his Flickr8k file: no folder, no COCO id
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images}))
    files = prepare_splits("coco2014", write_coco(tmp_path, 2014), karpathy=path)
    assert {image_dir for image_dir, _ in files.values()} == {tmp_path}
    splits = read(files)
    assert {
        name: [(image["id"], image["file_name"]) for image in split["images"]]
        for name, split in splits.items()
    } == {
        "train": [(500, "train2014/0.jpg"), (501, "val2014/1.jpg")],
        "val": [(502, "val2014/2.jpg")],
        "test": [(3, "3.jpg")],
    }
    captions = [f"Caption {i} of {number}." for number in (0, 1) for i in (0, 1)]
    assert [a["caption"] for a in splits["train"]["annotations"]] == captions


@pytest.mark.parametrize("content", ["", "[]", '{"images": [{"filename": "a.jpg"}]}'])
def test_not_a_karpathy_file(tmp_path, content):
    """Another file in place of Karpathy's is an error that names it."""
    (tmp_path / "k.json").write_text(content)
    with pytest.raises(DataError, match="k.json is not a Karpathy split file"):
        karpathy_splits(tmp_path, tmp_path / "k.json", tmp_path / "splits")


@pytest.mark.parametrize("name, first", [("coco2017", None), ("coco2014", 100)])
def test_karpathy_for_another_dataset(tmp_path, name, first):
    """Karpathy's split of another dataset, or of a part of COCO, is an error."""
    with pytest.raises(ValueError, match="complete coco2014"):
        prepare_splits(name, tmp_path, karpathy="dataset_coco.json", first=first)


def test_random_splits(shared_dataset, tmp_path):
    """Every image is in one split, with all its captions, in the given proportions."""
    splits = read(random_splits("images", shared_dataset / "captions.json", tmp_path, FRACTIONS))
    ids = {name: [image["id"] for image in split["images"]] for name, split in splits.items()}
    assert {name: len(found) for name, found in ids.items()} == {"train": 6, "val": 3, "test": 3}
    assert sorted(sum(ids.values(), [])) == list(range(100, 112))
    for name, split in splits.items():
        captions = [(a["image_id"], a["caption"]) for a in split["annotations"]]
        assert sorted(captions) == sorted((i, c) for i in ids[name] for c in CAPTIONS[i - 100])


def test_an_image_that_is_listed_twice(dataset, tmp_path):
    """An image file that is listed under several ids is in one split only."""
    path = dataset / "captions.json"
    content = json.loads(path.read_text())
    copies = [image | {"id": image["id"] + 50} for image in content["images"]]
    path.write_text(json.dumps(content | {"images": content["images"] + copies}))
    splits = read(random_splits(path.parent, path, tmp_path, FRACTIONS))
    files = [{image["file_name"] for image in split["images"]} for split in splits.values()]
    assert sum(map(len, files)) == len(set.union(*files)) == 12
    assert sum(len(split["images"]) for split in splits.values()) == 24


def test_seed_of_random_splits(dataset, tmp_path):
    """A random split depends on the seed, not on the order of the images in the file."""
    path = dataset / "captions.json"
    first = read(random_splits(path.parent, path, tmp_path / "a", FRACTIONS))
    content = json.loads(path.read_text())
    content["images"].reverse()
    path.write_text(json.dumps(content))
    again = read(random_splits(path.parent, path, tmp_path / "b", FRACTIONS))
    other = read(random_splits(path.parent, path, tmp_path / "c", FRACTIONS, seed=1))
    first, again, other = (
        {image["id"] for image in splits["train"]["images"]} for splits in (first, again, other)
    )
    assert first == again != other


def test_too_few_images_to_split(shared_dataset, tmp_path):
    """A split that would be empty is an error."""
    with pytest.raises(DataError, match="too few images"):
        random_splits(
            "images", shared_dataset / "captions.json", tmp_path, {"train": 0.99, "val": 0.01}
        )
