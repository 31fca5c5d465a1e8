"""What goes wrong is said in one message, by name, before anything is written into --out."""

import errno
import json
import os
import struct
import zlib

import pytest
import torch
from conftest import command_line, flag, tiny_options
from PIL import Image

from model import EncoderCNN
from splits import find_splits
from train import main


@pytest.fixture
def fails(capsys):
    """Run the command, which has to fail as it should; return what it said."""

    def run(dataset, **changes):
        options = tiny_options(dataset)
        flags = [w for name, v in changes.items() for w in flag(name, v)]
        assert main(command_line(options) + flags) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "Traceback" not in error
        assert not os.path.exists(options.out) or not os.listdir(options.out)
        return error

    return run


@pytest.fixture
def edit(dataset):
    """Change the content of the captions file."""
    path = dataset / "captions.json"

    def change(content):
        path.write_text(json.dumps(content))

    change.content = json.loads(path.read_text())
    return change


def png_that_claims(width, height):
    """A PNG of a few bytes whose header announces a gigantic image."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------- folders and captions


@pytest.mark.parametrize("name", ["train_images", "val_images", "train_captions", "val_captions"])
def test_missing_paths(dataset, fails, name):
    """A missing folder or captions file is named."""
    assert "nowhere" in fails(dataset, **{name: str(dataset / "nowhere")})


def test_a_folder_in_place_of_captions(dataset, fails):
    """A folder given as the captions file is named."""
    assert str(dataset / "images") in fails(dataset, train_captions=str(dataset / "images"))


@pytest.mark.parametrize(
    "content", [b"", b"captions", b'{"images": [', b"[" * 100_000, b"\xff\xfe\x00"],
    ids=["empty", "text", "cut off", "deeply nested", "binary"],
)  # fmt: skip
def test_captions_that_are_not_json(dataset, fails, content):
    """A captions file that is not JSON is named, and said not to be JSON."""
    (dataset / "captions.json").write_bytes(content)
    error = fails(dataset)
    assert f"{dataset / 'captions.json'} is not JSON" in error
    assert len(error) < 500


@pytest.mark.parametrize(
    "content",
    [None, [], "text", {}, {"images": []}, {"images": {}, "annotations": []}, {"annotations": []}],
    ids=str,
)
def test_captions_without_lists(dataset, fails, edit, content):
    """JSON without COCO's two lists is named, with the list that is missing."""
    edit(content)
    error = fails(dataset)
    assert str(dataset / "captions.json") in error
    assert "'images'" in error or "'annotations'" in error


@pytest.mark.parametrize(
    "change, said",
    [
        ({"caption": ""}, "annotation 7 has an empty caption"),
        ({"caption": " \n"}, "annotation 7 has an empty caption"),
        ({"caption": 5}, "annotation 7 has no caption text"),
        ({"caption": None}, "annotation 7 has no caption text"),
        ({"caption": ["a dog"]}, "annotation 7 has no caption text"),
        ({"image_id": 999}, "image 999"),
        ({"image_id": "100"}, "image 100"),
        ({"image_id": None}, "annotation 7 has no image_id"),
        ({"image_id": [1]}, "annotation 7 has no image_id"),
        ({"id": [1]}, "annotation"),
    ],
    ids=str,
)
def test_bad_annotation(dataset, fails, edit, change, said):
    """A bad entry among the annotations is found, and named by its id."""
    edit.content["annotations"][7].update(change)
    edit(edit.content)
    error = fails(dataset)
    assert str(dataset / "captions.json") in error and said in error


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"id": [1]},
        {"id": 100},  # that of another image
        {"id": "x"},  # the others' are numbers
        {"file_name": None},
        {"file_name": ""},
        {"file_name": 3},
    ],
    ids=str,
)
def test_bad_image_entry(dataset, fails, edit, change):
    """A bad entry among the images stops the run, and the captions file is named."""
    edit.content["images"][7].update(change)
    edit.content["annotations"] = [a for a in edit.content["annotations"] if a["image_id"] != 107]
    edit(edit.content)
    assert str(dataset / "captions.json") in fails(dataset)


@pytest.mark.parametrize("place", ["images", "annotations"])
def test_entry_that_is_no_object(dataset, fails, edit, place):
    """An entry that is no object stops the run, and the captions file is named."""
    edit.content[place][3] = "dog"
    edit(edit.content)
    assert str(dataset / "captions.json") in fails(dataset)


@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "..", "/etc/passwd", "\0"])
def test_file_name_that_leads_outside(dataset, fails, edit, name):
    """A file_name that leads out of the images folder is refused, even if the file is there."""
    Image.new("RGB", (9, 9)).save(dataset / "secret.jpg")
    edit.content["images"][7]["file_name"] = name
    edit(edit.content)
    assert "leads outside" in fails(dataset)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_link_that_leads_outside(dataset, fails, edit, link):
    """A link out of the images folder is refused, be it the image or a folder on the way."""
    (dataset / "secret").mkdir()
    Image.new("RGB", (9, 9)).save(dataset / "secret" / "07.jpg")
    if link == "file":
        (dataset / "images" / "07.jpg").unlink()
        (dataset / "images" / "07.jpg").symlink_to(dataset / "secret" / "07.jpg")
    else:
        (dataset / "images" / "part").symlink_to(dataset / "secret")
        edit.content["images"][7]["file_name"] = "part/07.jpg"
        edit(edit.content)
    assert "leads outside" in fails(dataset)


def test_images_without_captions(dataset, edit, capsys):
    """Images without captions are left out, and that is said."""
    edit.content["annotations"] = [a for a in edit.content["annotations"] if a["image_id"] > 102]
    edit(edit.content)
    assert main(command_line(tiny_options(dataset, epochs=1))) == 0
    printed = capsys.readouterr().out
    assert "3 images have no caption" in printed and "9 images" in printed


def test_no_captions_at_all(dataset, fails, edit):
    """A file in which no image has a caption stops the run."""
    edit({"images": edit.content["images"], "annotations": []})
    assert "no image with a caption" in fails(dataset)


def test_empty_vocabulary(dataset, fails):
    """A threshold that no word reaches stops the run, and is named."""
    error = fails(dataset, threshold=1000)
    assert "vocabulary is empty" in error and "1000" in error


# ---------------------------------------------------------------------------- images


@pytest.fixture
def bad_images(dataset):
    """Six kinds of unreadable images among the twelve; their paths."""
    folder = dataset / "images"
    whole = (folder / "01.jpg").read_bytes()
    (folder / "00.jpg").unlink()
    (folder / "01.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "02.jpg").write_bytes(b"")
    (folder / "03.jpg").write_bytes(b"a text and no image\n" * 50)
    (folder / "04.jpg").write_bytes(png_that_claims(50_000, 50_000))
    (folder / "05.jpg").unlink()
    (folder / "05.jpg").mkdir()
    return [folder / f"0{number}.jpg" for number in range(6)]


def test_unreadable_images(dataset, bad_images, fails):
    """Unreadable images stop the run; all of them are named at once, and no other."""
    error = fails(dataset)
    for path in sorted((dataset / "images").iterdir()):
        assert (str(path) in error) == (path in bad_images)
    assert str(bad_images[0]) in error
    assert "--skip-bad-images" in error


def test_unreadable_images_when_fine_tuning(dataset, bad_images, fails):
    """They are found before training also when there are no features to compute."""
    error = fails(dataset, fine_tune=True)
    assert all(str(path) in error for path in bad_images)


@pytest.mark.parametrize("fine_tune", [False, True])
def test_skip_bad_images(dataset, bad_images, capsys, fine_tune):
    """With --skip-bad-images the run goes on without them, and names what it left out."""
    options = tiny_options(dataset, skip_bad_images=True, fine_tune=fine_tune, epochs=1)
    assert main(command_line(options)) == 0
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in bad_images)
    assert json.loads((dataset / "out" / "metrics.json").read_text())["images"] == 6


def test_no_readable_image(dataset, fails):
    """If no image can be read, there is nothing to go on with."""
    for path in (dataset / "images").iterdir():
        path.write_bytes(b"")
    assert "00.jpg" in fails(dataset) and "no image" in fails(dataset, skip_bad_images=True)


@pytest.mark.parametrize("limit", [48 * 48 - 1, 48 * 48 // 2 - 1])
def test_image_beyond_the_limit(dataset, fails, monkeypatch, limit):
    """An image above Pillow's limit is refused, also where Pillow would only warn."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = fails(dataset, image_size=32)  # so that only the photos are too large
    assert "12.jpg" not in message and "11.jpg" in message


# ---------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "option",
    [
        {"backbone": "resnet51"},
        {"inject": "post"},
        {"weights": "IMAGENET1K_V9"},
        {"weights": "no/such/weights.pt"},
        {"device": "quantum"},
        {"embed_size": 0},
        {"hidden_size": -1},
        {"num_layers": 0},
        {"batch_size": 0},
        {"epochs": 0},
        {"dropout": 2.0},
        {"seed": -1},
        {"seed": 2**70},
        {"weight_decay": float("nan")},
        {"patience": -1},
        {"save_every": -500},
        {"workers": -2},
        {"learning_rate": 0.0},
        {"clip": -1.0},
    ],
    ids=str,
)
def test_impossible_options(dataset, fails, option):
    """An option that cannot be is an error that shows its value."""
    (value,) = option.values()
    assert str(value) in fails(dataset, **option)


def test_nothing_to_fine_tune(dataset, fails):
    """A CNN that sees no images cannot be trained, and that is said before anything is done."""
    assert "fine_tune" in fails(dataset, blind=True, fine_tune=True)


def test_files_in_place_of_folders(dataset, fails):
    """A file named as the folder for results or features is an error that names it."""
    for name in ("out", "cache"):
        assert str(dataset / "captions.json") in fails(
            dataset, **{name: str(dataset / "captions.json")}
        )


def test_image_too_small_for_the_backbone(dataset, fails):
    """A network that cannot take images of that size is an error that shows the size."""
    assert "24" in fails(dataset, backbone="inception_v3", weights=None, image_size=24)


def test_unknown_dataset(tmp_path):
    """An unknown dataset is an error that names the known ones."""
    with pytest.raises(ValueError, match="'coco2015'.*sample, coco2014, coco2017, folder"):
        find_splits("coco2015", tmp_path)


def test_coco_that_is_not_there(tmp_path):
    """If COCO is not in the folder, the error says what is missing there and what to do."""
    with pytest.raises(ValueError, match="captions_train2017.json.*DOWNLOAD"):
        find_splits("coco2017", tmp_path)


# ---------------------------------------------------------------------------- checkpoints


class Intruder:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("content", ["cut off", "weights", "a list", "code"])
def test_resume_from_something_else(dataset, capsys, content):
    """A last.pt that is no checkpoint of a run is named and left alone; code in it does not run."""
    path = dataset / "out" / "last.pt"
    path.parent.mkdir()
    network = EncoderCNN(16, "shufflenet_v2_x0_5", weights=None)
    things = {"weights": network.state_dict(), "a list": [1], "code": Intruder(dataset / "trap")}
    torch.save(things.get(content, network.state_dict()), path)
    if content == "cut off":
        path.write_bytes(path.read_bytes()[:-500])
    before = path.read_bytes()
    assert main([*command_line(tiny_options(dataset)), "--resume"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(path) in error
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.pt"]
    assert not (dataset / "trap").exists()


@pytest.mark.parametrize("content", ["nothing", "other weights", "code"])
def test_bad_weights_file(dataset, fails, content):
    """A weights file that does not fit is named; code in it does not run."""
    path = dataset / "weights.pt"
    other = EncoderCNN(16, "shufflenet_v2_x0_5", weights=None).backbone.state_dict()
    things = {"other weights": other, "code": Intruder(dataset / "trap")}
    torch.save(things.get(content), path)
    if content == "nothing":
        path.write_bytes(b"")
    error = fails(dataset, weights=str(path))
    assert str(path) in error and len(error) < 600
    assert not (dataset / "trap").exists()


# ---------------------------------------------------------------------------- the disk


def test_full_disk(dataset, capsys, monkeypatch):
    """When the disk is full, what was saved before stays whole, nothing half-written stays."""
    assert main(command_line(tiny_options(dataset, epochs=1))) == 0
    out = dataset / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def save_half(checkpoint, file):
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        assert main([*command_line(tiny_options(dataset, epochs=2)), "--resume"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "No space left" in error and "--resume" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*command_line(tiny_options(dataset, epochs=2)), "--resume"]) == 0


def test_full_disk_for_features(dataset, fails, monkeypatch):
    """When there is no room for the features, the run says so before it begins."""

    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert str(dataset / "cache") in fails(dataset)
    assert not list((dataset / "cache").glob("features*"))


@pytest.mark.parametrize("name", ["out", "cache"])
def test_folder_that_is_a_file(dataset, capsys, name):
    """A file where a folder should go is named."""
    (dataset / "file").write_text("")
    assert main(command_line(tiny_options(dataset, **{name: str(dataset / "file")}))) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(dataset / "file") in error
