"""Captions files in COCO's format, read and written; invalid ones are in test_bad_input.py."""

import json

import pytest
from conftest import CAPTIONS

from captioning.data.coco import CocoCaptions, read_captions, write_captions


@pytest.fixture
def edited(dataset):
    """Read the dataset with a function applied to the content of its captions file."""
    path = dataset / "captions.json"

    def read(edit):
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        return CocoCaptions(dataset / "images", path)

    return read


@pytest.fixture
def data(shared_dataset):
    return CocoCaptions(shared_dataset / "images", shared_dataset / "captions.json")


def test_captions_of_every_image(data, shared_dataset, capsys):
    """Images are sorted by id, each with its file and all its captions; nothing is printed."""
    assert data.image_ids == list(range(100, 112))
    assert data.paths == sorted((shared_dataset / "images").iterdir())
    assert data.captions == CAPTIONS
    assert data.all_captions == [caption for captions in CAPTIONS for caption in captions]
    assert len(data) == 12
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["images"].reverse(),
        lambda content: [annotation.pop("id") for annotation in content["annotations"]],
        lambda content: content.update(categories=[{"id": 1, "name": "dog"}]),
    ],
    ids=["another order", "annotations without ids", "with COCO's categories"],
)
def test_other_files_with_the_same_captions(edited, edit):
    """The order of the images, ids of annotations and categories do not matter."""
    assert edited(edit).captions == CAPTIONS


def test_images_without_captions(edited):
    """An image without a caption is left out and listed; the others keep theirs."""

    def remove(content):
        content["annotations"] = [
            a for a in content["annotations"] if a["image_id"] not in (103, 108)
        ]

    data = edited(remove)
    assert data.uncaptioned == ["03.jpg", "08.jpg"]
    assert data.captions == [c for number, c in enumerate(CAPTIONS) if number not in (3, 8)]
    assert len(data) == len(data.paths) == len(data.image_ids) == 10


def test_without(data):
    """The images with the given row numbers are left out, in the copy only."""
    kept = [row for row in range(12) if row not in (0, 5, 11)]
    smaller = data.without({0: "unreadable", 5: "unreadable"}).without([9])
    assert smaller.captions == [CAPTIONS[row] for row in kept]
    assert smaller.image_ids == [100 + row for row in kept]
    assert smaller.paths == [data.paths[row] for row in kept]
    assert len(data) == 12


def test_images_in_subfolders(dataset, edited):
    """A file_name may contain a folder below the image folder."""
    (dataset / "images" / "part").mkdir()
    (dataset / "images" / "00.jpg").rename(dataset / "images" / "part" / "00.jpg")
    data = edited(lambda content: content["images"][0].update(file_name="part/00.jpg"))
    assert data.paths[0] == dataset / "images" / "part" / "00.jpg"


def test_text_ids_and_utf8(edited):
    """Image ids may be text, and captions any Unicode text."""

    def change(content):
        for entry in content["images"]:
            entry["id"] = f"é{entry['id']}"
        for annotation in content["annotations"]:
            annotation["image_id"] = f"é{annotation['image_id']}"
            annotation["caption"] += " 猫"

    data = edited(change)
    assert data.image_ids[0] == "é100"
    assert data.captions == [[f"{c} 猫" for c in captions] for captions in CAPTIONS]


def test_written_captions_are_read_again(tmp_path):
    """What `write_captions` writes, `read_captions` and COCO's API read, with the description."""
    images = [{"id": 7, "file_name": "a.jpg"}]
    annotations = [{"id": 1, "image_id": 7, "caption": "a cat"}]
    write_captions(tmp_path / "c.json", images, annotations, "made for a test")
    coco = read_captions(tmp_path / "c.json")
    assert coco.loadImgs(7) == images and coco.loadAnns(coco.getAnnIds(imgIds=7)) == annotations
    assert json.loads((tmp_path / "c.json").read_text())["info"]["description"] == "made for a test"
