"""The command caption.py, and the photographs in photos/."""

import io
import json
import os
import shutil
import sys
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import calibrated_weights
from PIL import Image
from pycocotools.coco import COCO

import caption
import model as model_module
from caption import main
from captioning.data.images import BadImageError
from captioning.decoding.ensemble import Ensemble
from captioning.figures import plots
from captioning.learning.checkpoint import save
from captioning.learning.options import ModelConfig
from evaluate import BATCH_SIZE, caption_files
from model import CaptionModel

ROOT = Path(caption.__file__).parent
WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "cat", "dog", "bus", "runs", "sits", "red"]
SUMMARY = "trained on nothing: random weights"


def write_checkpoint(path, **changes):
    """A tiny model with random weights, whose captions differ from image to image."""
    settings = {
        "backbone": "mobilenet_v3_small",
        "image_size": 64,
        "embed_size": 16,
        "hidden_size": 32,
        "precision": "float32",
    }
    torch.manual_seed(1)
    model = CaptionModel(WORDS, ModelConfig(**settings | changes), calibrated_weights())
    for weight in (*model.decoder.parameters(), model.encoder.linear.weight):
        torch.nn.init.normal_(weight)
    model.card = {"summary": SUMMARY}
    save(model.checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "best.pt")


@pytest.fixture(scope="module")
def attend(tmp_path_factory):
    """A checkpoint of a model with attention."""
    return write_checkpoint(tmp_path_factory.mktemp("attend") / "best.pt", inject="attend")


@pytest.fixture
def model(checkpoint):
    return CaptionModel.from_checkpoint(checkpoint)


@pytest.fixture
def photos(dataset, monkeypatch):
    """The names of a dozen photos in the current folder."""
    monkeypatch.chdir(dataset / "images")
    return sorted(path.name for path in Path().iterdir())


@pytest.fixture
def command(checkpoint, capsys):
    """Runs the command; returns (exit status, lines of standard output, lines of the error)."""

    def run(*arguments, checkpoint=checkpoint):
        status = main([*map(str, arguments), "--checkpoint", str(checkpoint)])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def lines(paths, captions):
    return [f"{path}\t{text}" for path, text in zip(paths, captions, strict=True)]


# ---------------------------------------------------------------------------- photos and captions


def test_lines(command, model, photos):
    """A line has the path and the caption of a photo, in the order of the arguments."""
    chosen = [photos[5], photos[0], photos[3]]
    captions = model.caption(chosen)
    assert len(set(captions)) > 1
    assert command(*chosen) == (0, lines(chosen, captions), [f"model: {SUMMARY}"])


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches(command, model, photos, monkeypatch, batch_size):
    """The number of photos per batch changes no caption."""
    monkeypatch.setattr("evaluate.BATCH_SIZE", batch_size)
    assert command(*photos)[1] == lines(photos, model.caption(photos))


def test_folder(command, model, photos):
    """A folder stands for all images in it and its subfolders, sorted, whatever their suffix."""
    names = ["part/b/x.PNG", "part/c.jpeg", "part/z.JPG"]
    Path("part/b").mkdir(parents=True)
    Path("part/d.jpg").mkdir()
    for name in names:
        Image.open(photos[0]).save(name)
    Path("part/notes.txt").write_text("no image")
    assert command("part", photos[2])[1] == lines(
        [*names, photos[2]], model.caption([*names, photos[2]])
    )


def test_standard_input(command, model, photos, monkeypatch):
    """The argument "-" stands for the paths on standard input, one per line."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos[4]}\n\n{photos[1]}\n"))
    expected = [photos[0], photos[4], photos[1]]
    assert command(photos[0], "-")[:2] == (0, lines(expected, model.caption(expected)))


def test_files_are_read_batch_by_batch(model, photos):
    """The captions of a batch are there before a file of the next one is opened."""
    captions = caption_files(model, [photos[0]] * BATCH_SIZE + ["nowhere.jpg"])
    assert [next(captions).path for _ in range(BATCH_SIZE)] == [photos[0]] * BATCH_SIZE
    with pytest.raises(BadImageError, match="nowhere.jpg"):
        next(captions)


def test_no_arguments():
    """Without a photo, the usage is printed."""
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


# ---------------------------------------------------------------------------- decoding options


def test_n(command, model, photos):
    """With --n, a photo has so many lines, with score and caption, best first."""
    decoded = model.generate(model.preprocess(photos), beam_size=4, n_best=4)
    expected = [
        f"{photo}\t{score:.3f}\t{model.vocab.decode(ids)}"
        for photo, scores, rows in zip(photos, decoded.scores, decoded.tokens, strict=True)
        for score, ids in zip(scores.tolist(), rows.tolist(), strict=True)
    ]
    assert command(*photos, "--n", "4")[1] == expected


def test_beam(command, model, photos):
    """--beam is the beam size."""
    greedy = model.caption(photos, beam_size=1)
    assert greedy != model.caption(photos)
    assert command(*photos, "--beam", "1")[1] == lines(photos, greedy)


def test_sample(command, model, photos):
    """Sampled captions depend on the seed and on the temperature."""
    first, again, hot, other = (
        command(*photos, "--sample", *options)[1]
        for options in ([], ["--seed", "0"], ["--temperature", "3"], ["--seed", "1"])
    )
    assert first == again and first != other and first != hot
    torch.manual_seed(0)
    assert first == lines(photos, model.caption(photos, temperature=1.0))


# ---------------------------------------------------------------------------- files


def test_json(command, model, photos):
    """--json writes exactly COCO's results format, with the best captions, and COCO's API reads it.

    The image id is the number in the name of the file, or the name.
    """
    Path("COCO_val2014_000000000042.jpg").write_bytes(Path(photos[7]).read_bytes())
    Path("holiday.jpg").write_bytes(Path(photos[8]).read_bytes())
    names = [photos[3], "COCO_val2014_000000000042.jpg", "holiday.jpg"]
    assert command(*names, "--json", "out.json", "--n", "2")[0] == 0
    results = json.loads(Path("out.json").read_text())
    assert [list(result) for result in results] == [["image_id", "caption"]] * 3
    expected = [*zip((3, 42, "holiday.jpg"), model.caption(names), strict=True)]
    assert [tuple(result.values()) for result in results] == expected
    truth = COCO()
    truth.dataset = {"images": [{"id": image_id} for image_id, _ in expected], "annotations": []}
    truth.createIndex()
    assert len(truth.loadRes("out.json").anns) == 3


def test_repeated_image_ids(command, photos):
    """Photos with the same image id are all in the results, and the id is named."""
    Path("part").mkdir()
    shutil.copy(photos[3], "part/3.jpg")
    status, _, errors = command(photos[3], "part/3.jpg", "--json", "out.json")
    assert status == 0 and errors[1:] == ["out.json: several photos have the image id 3"]
    assert len(json.loads(Path("out.json").read_text())) == 2


def test_maps(command, attend, photos):
    """--maps writes a picture per photo: the part that the model sees, and a map for each word."""
    Image.new("RGB", (96, 64), "red").save("wide.png")
    Image.new("RGB", (64, 64), "blue").save("wide.bmp")
    names = [photos[0], "wide.png", "wide.bmp"]
    model = CaptionModel.from_checkpoint(attend)
    captions, maps = model.caption(names, return_attention=True)
    with mock.patch("plots.attention_maps", wraps=plots.attention_maps) as plotted:
        assert command(*names, "--maps", "new/maps", checkpoint=attend)[0] == 0
    files = sorted(Path("new/maps").iterdir())
    assert [file.name for file in files] == ["00.jpg", "wide-2.jpg", "wide.jpg"]
    for call, text, weights in zip(plotted.call_args_list, captions, maps, strict=True):
        assert call.args[0].size == (64, 64) and call.args[1] == text
        np.testing.assert_allclose(call.args[2], weights, atol=1e-5)
    assert all(Image.open(file).width > 500 for file in files)


def test_maps_of_the_best(command, attend, photos):
    """With --n, the pictures are those of the best captions."""
    for folder, options in (("one", []), ("three", ["--n", "3"])):
        command(photos[0], "--maps", folder, *options, checkpoint=attend)
    assert Path("one/00.jpg").read_bytes() == Path("three/00.jpg").read_bytes()


# ---------------------------------------------------------------------------- what goes wrong


def test_damaged_files(command, model, photos, recwarn):
    """Of 20 damaged and 5 good files, the 5 are captioned, and the 20 named in a sentence each."""
    content = Path(photos[0]).read_bytes()
    damaged = []
    for number in range(20):
        kinds = (b"", b"text", content[: 30 * number], content[100:], b"II*\0" + b"\1" * 300)
        damaged.append(f"x{number:02}.jpg")
        Path(damaged[-1]).write_bytes(kinds[number % 5])  # the last is a TIFF: Pillow warns
    good = photos[1:6]
    mixed = [*damaged[:3], good[0], *damaged[3:11], *good[1:4], *damaged[11:], good[4]]
    status, printed, errors = command(*mixed, "--json", "out.json")
    assert status == 1
    assert printed == lines(good, model.caption(good))
    assert [line.split(":")[:2] for line in errors[1:]] == [["error", f" {n}"] for n in damaged]
    assert len(errors) == 21 and not recwarn.list
    assert len(json.loads(Path("out.json").read_text())) == 5


def kinds_of_damage(photo):
    """{file name: content} of files that are no readable images, each made from a good one."""
    encoded = {}
    for suffix in ("jpg", "png", "gif", "webp"):
        Image.open(photo).resize((200, 150)).save(f"whole.{suffix}")
        encoded[suffix] = Path(f"whole.{suffix}").read_bytes()
        Path(f"whole.{suffix}").unlink()
    files = {f"half.{suffix}": data[: len(data) // 2] for suffix, data in encoded.items()}
    files |= {f"header.{suffix}": b"?" * 12 + data[12:] for suffix, data in encoded.items()}
    png, jpg = encoded["png"], encoded["jpg"]
    header = png[12:16] + b"\0\1\0\0" * 2 + png[24:29]  # of 65536 x 65536 pixels
    size = jpg.index(b"\xff\xc0") + 5
    return files | {
        "huge.png": png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:],
        "huge.jpg": jpg[:size] + b"\xff\x00" * 2 + jpg[size + 4 :],
        "no_pixels.jpg": jpg[:size] + b"\0" * 4 + jpg[size + 4 :],
        "zeros.jpg": bytes(1000),
        "page.jpg": b"<html></html>",
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF",
    }


def test_kinds_of_damage(command, model, photos):
    """Truncated and disguised files, and those of an impossible size, are named, each in a line.

    So are a link to nowhere and a folder with the name of a photo, and what is left is captioned.
    """
    bad = kinds_of_damage(photos[0])
    for name, content in bad.items():
        Path(name).write_bytes(content)
    Path("link.jpg").symlink_to("nowhere.jpg")
    Path("folder.jpg").mkdir()
    status, printed, errors = command("folder.jpg", photos[0], *bad, "link.jpg", photos[1])
    assert (status, printed) == (1, lines(photos[:2], model.caption(photos[:2])))
    assert len(errors) == len(bad) + 3
    for name, error in zip([*bad, "link.jpg"], errors[2:], strict=True):
        assert error.startswith(f"error: {name}: ") and len(error) < 250
    assert errors[0] == "error: there is no image in folder.jpg; check the path"


@pytest.mark.parametrize("models", [1, 2])
def test_files_are_opened_once(model, photos, models):
    """Damaged files in a batch do not let its good files be opened again."""
    Path("bad.jpg").write_text("text")
    paths, bad = [photos[0], "bad.jpg", *photos[1:4], "nowhere.jpg"], []
    captioning = model if models == 1 else Ensemble([model] * models)
    with mock.patch("images.Image.open", wraps=Image.open) as opened:
        found = [x.captions[0] for x in caption_files(captioning, paths, bad.append, beam_size=3)]
    times = Counter(call.args[0] for call in opened.call_args_list)
    assert times == {**dict.fromkeys(photos[:4], models), "bad.jpg": 1, "nowhere.jpg": 1}
    assert found == model.caption(photos[:4]) and len(bad) == 2


def test_missing_files(command, model, photos):
    """A missing file and a folder without images are named; the others are captioned."""
    Path("empty").mkdir()
    status, printed, errors = command("nowhere.jpg", photos[1], "empty")
    assert (status, printed) == (1, lines([photos[1]], model.caption([photos[1]])))
    assert [error for error in errors if error.startswith("error: ")] == [
        "error: there is no image in empty; check the path",
        "error: nowhere.jpg: there is no such file; check the path",
    ]


def test_odd_names(command, model, photos, monkeypatch):
    """Paths on standard input may have the line ends and the byte order mark of Windows' files.

    A name that is too long, an empty one and a pipe are named, and the other photos captioned.
    """
    long = "x" * 300 + ".jpg"
    os.mkfifo("pipe.jpg")
    paths = ["\ufeff" + photos[0], "", "  ", long, "pipe.jpg", photos[1]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\r\n".join(paths)))
    status, printed, errors = command("-")
    assert (status, printed) == (1, lines(photos[:2], model.caption(photos[:2])))
    assert [line[:15] for line in errors[1:]] == ["error: xxxxxxxx", "error: pipe.jpg"]


def test_hidden_files(command, model, photos):
    """Of a folder, hidden files are left out: copies of photos by macOS begin with "._"."""
    for name in ("in/._a.jpg", "in/.trash/b.jpg", "in/c.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos[0], name)
    assert command("in")[:2] == (0, lines(["in/c.jpg"], model.caption([photos[0]])))


def test_maps_do_not_replace_photos(attend, photos):
    """A picture of the attention in the folder of the photos gets a name that none of them has."""
    before = {path: path.read_bytes() for path in map(Path, photos[:2])}
    assert main(["--checkpoint", str(attend), *photos[:2], "--maps", "."]) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert all(Path(f"{path.stem}-2.jpg").is_file() for path in before)


def test_results_keep_links(command, photos):
    """--json writes to the file that a link leads to, and replaces no device."""
    Path("link.json").symlink_to("target.json")
    assert command(photos[0], "--json", "link.json")[0] == 0
    assert Path("link.json").is_symlink() and len(json.loads(Path("target.json").read_text())) == 1
    os.mkfifo("pipe.json")
    status, _, errors = command(photos[0], "--json", "pipe.json")
    assert status == 1 and "not a regular file" in errors[-1]


def test_only_bad_files(command, photos):
    """If no file can be read, the exit status is 1, and the results are empty."""
    assert command("nowhere.jpg", "--json", "out.json")[:2] == (1, [])
    assert json.loads(Path("out.json").read_text()) == []


ERRORS = {
    "00.jpg --n 0": "at least 1",
    "00.jpg --beam 0": "at least 1",
    "00.jpg --n 4 --beam 3": "--beam at least as large as --n",
    "00.jpg --sample --n 2": "--n and --beam are for beam search",
    "00.jpg --temperature 2": "add --sample",
    "00.jpg --sample --temperature 0": "between 0.01 and 100",
    "00.jpg --sample --temperature inf": "between 0.01 and 100",
    "00.jpg --maps maps": "--inject attend",
    "00.jpg --maps 01.jpg": "01.jpg",
    "00.jpg --json nowhere/out.json": "no folder nowhere",
    "00.jpg --json empty": "it is a folder",
    "00.jpg --json ./00.jpg": "is one of the photos",
    "00.jpg --device quantum": "'quantum'",
    "00.jpg --checkpoint nowhere.pt": "no file nowhere.pt",
    "00.jpg --checkpoint 00.jpg": "00.jpg",
    "empty": "no image in empty",
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_errors(photos, checkpoint, capsys, arguments):
    """What is wrong is named in one sentence before any caption; the exit status is 1."""
    Path("empty").mkdir()
    assert main(["--checkpoint", str(checkpoint), *arguments.split()]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and ERRORS[arguments] in printed.err
    assert all(len(line) < 300 and "Traceback" not in line for line in printed.err.splitlines())


def test_default_checkpoint(checkpoint, model, photos, monkeypatch, capsys):
    """Without --checkpoint, photo_captioner.pt is used; if there is none, a sentence says so."""
    monkeypatch.setattr(model_module, "PRETRAINED", Path("photo_captioner.pt"))
    assert main([photos[0]]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is no pre-trained model photo_captioner.pt")
    shutil.copy(checkpoint, "photo_captioner.pt")
    assert main([photos[0]]) == 0
    assert capsys.readouterr().out.splitlines() == lines(photos[:1], model.caption(photos[0]))


def test_ctrl_c(command, photos, monkeypatch):
    """Ctrl-C ends the command with status 130, without a traceback; earlier captions are there."""

    def interrupted(*args, **options):
        yield from caption_files(args[0], args[1][:2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("caption.caption_files", interrupted)
    status, printed, errors = command(*photos)
    assert status == 130 and len(printed) == 2 and errors == [f"model: {SUMMARY}"]


def test_closed_pipe(command, photos, monkeypatch):
    """A reader that ends early, such as `| head`, ends the command without a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:  # closed as at exit: it would raise if anything were left
        monkeypatch.setattr("sys.stdout", pipe)
        assert command(*photos) == (141, [], [f"model: {SUMMARY}"])


@pytest.mark.parametrize("terminal, shown", [(True, True), (False, False)])
def test_progress_bar(command, photos, monkeypatch, terminal, shown):
    """Many photos have a progress bar on standard error if that is a terminal."""
    monkeypatch.setattr("caption.BATCH_SIZE", 5)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    status, printed, errors = command(*photos)
    assert status == 0 and len(printed) == 12
    assert any("/12 [" in line for line in errors) == shown


# ---------------------------------------------------------------------------- photos/

PHOTOS = sorted((ROOT / "photos").glob("*.jpg"))


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.name)
def test_photo(path):
    """A photo has at most 60 KB and 640 pixels per side, no EXIF data, and a line of credits."""
    image = Image.open(path)
    assert path.stat().st_size <= 60_000 and max(image.size) <= 640
    assert image.format == "JPEG" and not image.getexif() and "exif" not in image.info
    credits = (ROOT / "photos" / "CREDITS.md").read_text(encoding="utf-8")
    assert f"| `{path.name}` |" in credits


def test_captions_of_the_photos():
    """Every photo has two captions, in COCO's format, and the sizes are those of the files."""
    truth = COCO(str(ROOT / "photos" / "captions.json"))
    assert sorted(image["file_name"] for image in truth.imgs.values()) == [p.name for p in PHOTOS]
    assert len(PHOTOS) == 7
    for image in truth.imgs.values():
        assert len(truth.imgToAnns[image["id"]]) == 2
        size = Image.open(ROOT / "photos" / image["file_name"]).size
        assert size == (image["width"], image["height"])
