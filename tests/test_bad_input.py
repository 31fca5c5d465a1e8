"""Every problem with the input is named in one message, before anything is written to --out."""

import errno
import json
import os
import re

import pytest
import torch
import torchvision
from conftest import MakeFolder, command_line, flag, tiny_config
from PIL import Image
from training_runs import contents

from captioning.data.splits import prepare_splits
from train import main


@pytest.fixture
def fails(dataset, capsys):
    """Run the command with changed options, and perhaps other content of the captions file; it must
    fail with one message, which is returned.
    """

    def run(content=None, **changes):
        if content:
            (dataset / "captions.json").write_text(json.dumps(content))
        config = tiny_config(dataset)
        flags = [word for name, value in changes.items() for word in flag(name, value)]
        before = contents(config.out)
        assert main(command_line(config) + flags) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "Traceback" not in error
        assert contents(config.out) == before
        return error

    return run


@pytest.fixture
def captions_file(dataset):
    return dataset / "captions.json"


@pytest.fixture
def content(captions_file):
    """The content of the captions file."""
    return json.loads(captions_file.read_text())


# ---------------------------------------------------------------------------- captions


@pytest.mark.parametrize("path", ["nowhere", "images"])
@pytest.mark.parametrize("name", ["train_images", "val_images", "train_captions", "val_captions"])
def test_wrong_paths(dataset, fails, name, path):
    """A missing folder or captions file is named, and so is a folder given as captions file."""
    if not (path == "images" and "images" in name):
        assert str(dataset / path) in fails(**{name: str(dataset / path)})


NOT_JSON = [b"", b"captions", b'{"images": [', b"[" * 100_000, b"\xff\xfe\x00"]
WITHOUT_LISTS = [None, [], "text", {}, {"images": []}, {"annotations": []}]
WITHOUT_LISTS += [{"images": {}, "annotations": []}]


@pytest.mark.parametrize(
    "text, message",
    [
        *((text, "is not JSON") for text in NOT_JSON),
        *((json.dumps(x).encode(), "no list '(images|annotations)'") for x in WITHOUT_LISTS),
        (
            b'{"images": [{"id": 1, "file_name": "x"}], "annotations": []}',
            "no image with a caption",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_files(captions_file, fails, text, message):
    """A captions file that is not JSON, or has no captions in COCO's format, is named."""
    captions_file.write_bytes(text)
    error = fails()
    assert str(captions_file) in error and re.search(message, error) and len(error) < 500


BAD_IMAGE = [{"id": None}, {"id": [1]}, {"id": 100}, {"id": "x"}]  # 100 is another image's
BAD_IMAGE += [{"file_name": None}, {"file_name": ""}, {"file_name": 3}, "dog"]


@pytest.mark.parametrize(
    "key, change, message",
    [
        ("annotations", {"caption": " \n"}, "annotation 7 has an empty caption"),
        ("annotations", {"caption": None}, "annotation 7 has no caption text"),
        ("annotations", {"caption": ["a dog"]}, "annotation 7 has no caption text"),
        ("annotations", {"image_id": 999}, "image 999"),
        ("annotations", {"image_id": "100"}, "image 100"),
        ("annotations", {"image_id": None}, "annotation 7 has no image_id"),
        ("annotations", {"image_id": [1]}, "annotation 7 has no image_id"),
        ("annotations", {"id": [1]}, "annotation"),
        ("annotations", "dog", "annotation"),
        *(("images", change, "") for change in BAD_IMAGE),
    ],
    ids=str,
)
def test_invalid_entry(captions_file, fails, content, key, change, message):
    """An invalid entry is an error that names the file, and an annotation by its id."""
    content[key][7] = change if isinstance(change, str) else content[key][7] | change
    if key == "images":
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 107]
    error = fails(content)
    assert str(captions_file) in error and message in error


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg",
        "a/../../secret.jpg",
        "..",
        "/etc/passwd",
        "\0",
        "link.jpg",
        "part/secret.jpg",
    ],
)
def test_file_name_that_leads_outside(dataset, fails, content, name):
    """A file_name that leads out of the image folder is refused, even if the file exists: by its
    path, or by a link that is the image or a folder above it.
    """
    Image.new("RGB", (9, 9)).save(dataset / "secret.jpg")
    (dataset / "images" / "link.jpg").symlink_to(dataset / "secret.jpg")
    (dataset / "images" / "part").symlink_to(dataset)
    content["images"][7]["file_name"] = name
    assert "leads outside" in fails(content)


# ---------------------------------------------------------------------------- images


@pytest.fixture
def bad_images(dataset):
    """Five kinds of unreadable images among the twelve; their paths."""
    paths = [dataset / "images" / f"0{number}.jpg" for number in range(5)]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size // 2])
    paths[2].write_bytes(b"")
    paths[3].write_bytes(b"a text and no image\n" * 50)
    paths[4].unlink()
    paths[4].mkdir()
    return paths


@pytest.mark.parametrize("fine_tune", ["none", "all"])
def test_unreadable_images(dataset, bad_images, fails, fine_tune):
    """Unreadable images stop the run before training; all are named at once, and no other."""
    error = fails(fine_tune=fine_tune)
    assert set(re.findall(r"\S+\.jpg", error)) == {str(path) for path in bad_images}
    assert "--skip-bad-images" in error


@pytest.mark.parametrize("fine_tune", ["none", "all"])
def test_skip_bad_images(dataset, bad_images, captions_file, content, capsys, fine_tune):
    """With --skip-bad-images the run excludes unreadable images and prints their names; those
    without captions are excluded too, and their number is printed.
    """
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] < 109]
    captions_file.write_text(json.dumps(content))
    config = tiny_config(dataset, skip_bad_images=True, fine_tune=fine_tune, epochs=1)
    assert main(command_line(config)) == 0
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in bad_images)
    assert "3 images have no caption" in printed and "4 training and 4 validation" in printed
    assert json.loads((dataset / "out" / "metrics.json").read_text())["images"] == 4


def test_no_readable_image(dataset, fails):
    """If no image can be read, that is an error with and without --skip-bad-images."""
    for path in (dataset / "images").iterdir():
        path.write_bytes(b"")
    assert "00.jpg" in fails() and "no image" in fails(skip_bad_images=True)


@pytest.mark.parametrize("limit", [48 * 48 - 1, 48 * 48 // 2 - 1])
def test_too_many_pixels(fails, monkeypatch, limit):
    """An image above Pillow's limit is refused, also where Pillow would only warn."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert "11.jpg" in fails(image_size=32)


def test_one_validation_image(dataset, fails, content):
    """The best epoch by CIDEr-D needs at least two validation images, which the error says."""
    image = content["images"][0]
    own = [x for x in content["annotations"] if x["image_id"] == image["id"]]
    (dataset / "one.json").write_text(json.dumps({"images": [image], "annotations": own}))
    error = fails(val_captions=str(dataset / "one.json"), best_by="cider")
    assert "one.json has a single image" in error and "--best-by loss" in error


# ---------------------------------------------------------------------------- options


INVALID = """backbone=resnet51 weights=IMAGENET1K_V9 weights=no/such/weights.pt device=quantum
    embed_size=0 hidden_size=-1 num_layers=0 batch_size=0 epochs=0 dropout=2.0 seed=-1
    seed=1180591620717411303424 weight_decay=nan patience=-1 save_every=-500 num_workers=-2
    learning_rate=0.0 grad_clip=-1.0 grad_accum_steps=0 init_from=no/such/best.pt crops=-1"""


@pytest.mark.parametrize("option", INVALID.split())
def test_invalid_options(fails, option):
    """An invalid option is an error that shows its value."""
    name, value = option.split("=")
    assert value in fails(**{name: value})


@pytest.mark.parametrize("name", ["inject", "precision", "best_by"])
def test_unknown_choices(dataset, name):
    """An unknown choice is an error that lists the known ones."""
    with pytest.raises(ValueError, match=f"unknown {name} 'other'; choose from"):
        tiny_config(dataset, **{name: "other"})


@pytest.mark.parametrize(
    "options, text",
    [
        ({"no_image": True, "fine_tune": "all"}, "cannot be fine-tuned"),
        ({"crops": 2, "fine_tune": "all"}, "leave crops at 0"),
        ({"inject": "attend", "num_layers": 2}, "num_layers must be 1"),
        ({"backbone": "inception_v3", "weights": None, "image_size": 24}, "size 24"),
        ({"batch_size": 8, "min_word_freq": 1000}, "vocabulary is empty: .* 1000 times"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other(fails, options, text):
    """Options that cannot be combined, with each other or with the captions, are an error."""
    assert re.search(text, fails(**options))


@pytest.mark.parametrize("name", ["out", "cache_dir"])
def test_files_in_place_of_folders(captions_file, fails, name):
    """A file in place of the folder for results or features is named, with the option."""
    error = fails(**{name: str(captions_file)})
    assert str(captions_file) in error
    assert f"choose another --{name.replace('_', '-')}" in error


@pytest.mark.parametrize(
    "name, message",
    [
        ("coco2015", "'coco2015'.*synthetic, coco2014, coco2017, folder"),
        ("coco2017", "captions_train2017.json.*DOWNLOAD"),
    ],
)
def test_unknown_or_missing_dataset(tmp_path, name, message):
    """An unknown dataset is an error that lists the known ones; of COCO, what is missing."""
    with pytest.raises(ValueError, match=message):
        prepare_splits(name, tmp_path)


# ---------------------------------------------------------------------------- PyTorch files


@pytest.fixture
def save(dataset):
    """Write a file with content of one kind; no code in it may be run afterwards."""
    network = torchvision.models.shufflenet_v2_x0_5(weights=None)
    special = {"a list": [1], "code": MakeFolder(dataset / "unpickled")}

    def save(path, kind):
        torch.save(special.get(kind, network.state_dict()), path)
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[:-500])
        if kind == "empty":
            path.write_bytes(b"")

    yield save
    assert not (dataset / "unpickled").exists()


@pytest.mark.parametrize("option", ["weights", "init_from", "resume"])
@pytest.mark.parametrize("kind", ["truncated", "empty", "other weights", "a list", "code"])
def test_file_of_something_else(dataset, fails, save, option, kind):
    """A file that does not fit, also as the last.pt of a run, is named; none of its code is run."""
    path = dataset / ("out/last.pt" if option == "resume" else "weights.pt")
    path.parent.mkdir(exist_ok=True)
    save(path, kind)
    error = fails(**{option: True if option == "resume" else str(path)})
    assert str(path) in error and len(error) < 600


# ---------------------------------------------------------------------------- full disks


def test_full_disk(dataset, capsys, monkeypatch):
    """If the disk is full, what was saved stays as it is, and --resume continues later."""
    assert main(command_line(tiny_config(dataset, epochs=1))) == 0
    before = contents(dataset / "out")
    resume = [*command_line(tiny_config(dataset, epochs=2)), "--resume"]

    def save_half(checkpoint, file):
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        assert main(resume) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "No space left" in error and "same command" in error
    assert contents(dataset / "out") == before
    assert main(resume) == 0
