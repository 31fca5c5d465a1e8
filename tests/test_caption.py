"""The command caption.py, and the photographs in photos/."""

import copy
import io
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import flag, tiny_model
from PIL import Image
from pycocotools.coco import COCO

from caption import main
from captioning.base.checkpoints import save
from captioning.data.images import BadImageError, open_image
from captioning.decoding.confidence import Confidence, caption_predictors
from captioning.figures import plots
from captioning.networks.word_detector import WordDetector
from model import CaptionModel
from vocabulary import SPECIAL_TOKENS

WORDS = [*SPECIAL_TOKENS, "a", "bus", "cat", "dog", "red", "runs", "sits"]
SUMMARY = "trained on nothing: random weights"


def write_checkpoint(path, **changes):
    """A tiny model with random weights, whose captions differ from image to image."""
    model = tiny_model(WORDS, hidden_size=32, **changes)
    torch.manual_seed(1)
    for weight in (*model.decoder.parameters(), *model.encoder.linear.parameters()):
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


@pytest.fixture(scope="module")
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


def test_folder(command, model, photos):
    """A folder stands for all images in it and its subfolders, sorted, whatever their suffix.

    Hidden files are left out: copies of photos by macOS begin with "._".
    """
    names = ["part/b/x.PNG", "part/c.jpeg", "part/z.JPG"]
    for name in (*names, "part/._a.png", "part/.trash/b.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(photos[0]).save(name)
    Path("part/d.jpg").mkdir()
    Path("part/notes.txt").write_text("no image")
    expected = [*names, photos[2]]
    assert command("part", photos[2])[1] == lines(expected, model.caption(expected))


def test_standard_input(command, model, photos, monkeypatch):
    """The argument "-" stands for the paths on standard input, one per line.

    Windows' files may begin with a byte order mark, and have other line ends.
    """
    listed = "\r\n".join(["\ufeff" + photos[4], "", "  ", photos[1]])
    monkeypatch.setattr(sys, "stdin", io.StringIO(listed))
    expected = [photos[0], photos[4], photos[1]]
    assert command(photos[0], "-")[:2] == (0, lines(expected, model.caption(expected)))


@pytest.fixture
def calibrated(model, photos, tmp_path):
    """A checkpoint with a confidence, fitted to scores that are made up."""
    model = copy.deepcopy(model)
    encoded = model.encode(model.preprocess(photos)).detach()
    shares = torch.rand(len(photos), len(model.vocab), generator=torch.Generator().manual_seed(0))
    detector = model.detector = WordDetector.fit(encoded, shares)
    decoded = model.generate(model.preprocess(photos))
    predictors = caption_predictors(detector, encoded, decoded)[:, 0]
    model.confidence = Confidence.fit(100 * predictors, torch.linspace(0, 2, len(photos)))
    save(model.checkpoint(), tmp_path / "calibrated.pt")
    return tmp_path / "calibrated.pt"


def test_confidence(command, calibrated, photos):
    """The last column is the confidence; --min-confidence leaves out the captions below it."""
    model = CaptionModel.from_checkpoint(calibrated)
    captions, known = model.caption(photos, return_confidence=True)
    rows = [f"{x}\t{y:.2f}" for x, y in zip(lines(photos, captions), known, strict=True)]
    assert len(set(known)) > 2 and command(*photos, checkpoint=calibrated)[1] == rows
    limit = sorted(known)[5] + 1e-6
    _, printed, errors = command(*photos, "--min-confidence", limit, checkpoint=calibrated)
    assert printed == [row for row, value in zip(rows, known, strict=True) if value >= limit]
    assert errors[1].startswith(f"{sum(value < limit for value in known)} captions")
    status, printed, errors = command(*photos, "--min-confidence", 0.5)
    assert (status, printed) == (1, []) and "not been calibrated" in errors[0]


# ---------------------------------------------------------------------------- decoding options


def test_n_best(command, model, photos):
    """With --n-best, a photo has so many lines, with score and caption, best first."""
    decoded = model.generate(model.preprocess(photos), beam_size=4, n_best=4)
    found = zip(photos, decoded.scores.tolist(), model.decode(decoded), strict=True)
    expected = [
        f"{photo}\t{score:.3f}\t{text}"
        for photo, *row in found
        for score, text in zip(*row, strict=True)
    ]
    assert command(*photos, "--n-best", "4")[1] == expected


@pytest.mark.parametrize(
    "options", [{"beam_size": 1}, {"beam_size": 4, "length_penalty": 0.0}, {"max_len": 3}], ids=str
)
def test_options_of_beam_search(command, model, photos, options):
    """The flags are the options of `CaptionModel.caption`."""
    flags = [word for option in options.items() for word in flag(*option)]
    expected = model.caption(photos, **options)
    assert command(*photos, *flags)[1] == lines(photos, expected)
    assert expected != model.caption(photos)


def test_temperature(command, model, photos):
    """Sampled captions depend on the seed and on the temperature."""
    photos = photos[:5]
    first, again, hot, other = (
        command(*photos, "--temperature", *options)[1]
        for options in ([1], [1, "--seed", 0], [3], [1, "--seed", 1])
    )
    assert first == again and first != other and first != hot
    torch.manual_seed(0)
    assert first == lines(photos, model.caption(photos, temperature=1.0))


# ---------------------------------------------------------------------------- results and pictures


def test_json(command, model, photos):
    """--json writes exactly COCO's results format, with the best captions, and COCO's API reads it.

    The image id is the number in the name of the file, or the name.
    """
    names = [photos[3], "COCO_val2014_000000000042.jpg", "holiday.jpg"]
    shutil.copy(photos[7], names[1])
    shutil.copy(photos[8], names[2])
    assert command(*names, "--json", "out.json", "--n-best", "2")[0] == 0
    results = json.loads(Path("out.json").read_text())
    assert [list(result) for result in results] == [["image_id", "caption"]] * 3
    expected = [*zip((3, 42, "holiday.jpg"), model.caption(names), strict=True)]
    assert [tuple(result.values()) for result in results] == expected
    truth = COCO()
    truth.dataset = {"images": [{"id": image_id} for image_id, _ in expected], "annotations": []}
    truth.createIndex()
    assert len(truth.loadRes("out.json").anns) == 3


def test_repeated_image_ids(command, photos):
    """Photos with the same image id are all in the results, and the id is named; if no photo can be
    read, the results are empty.
    """
    assert command("nowhere.jpg", "--json", "out.json")[:2] == (1, [])
    assert json.loads(Path("out.json").read_text()) == []
    shutil.copy(photos[3], "3.jpg")
    status, _, errors = command(photos[3], "3.jpg", "--json", "out.json")
    assert status == 0 and errors[1:] == ["out.json: several photos have the image id 3"]
    assert len(json.loads(Path("out.json").read_text())) == 2


def test_json_keeps_links(command, photos):
    """--json writes to the file that a link leads to, and replaces no device."""
    Path("link.json").symlink_to("target.json")
    assert command(photos[0], "--json", "link.json")[0] == 0
    assert Path("link.json").is_symlink() and len(json.loads(Path("target.json").read_text())) == 1
    os.mkfifo("pipe.json")
    status, _, errors = command(photos[0], "--json", "pipe.json")
    assert status == 1 and "not a regular file" in errors[-1]


def test_maps(command, attend, photos):
    """--maps writes a picture per photo: the part that the model sees, and a map for each word.

    With --n-best, it is that of the best caption.
    """
    Image.new("RGB", (96, 64), "red").save("wide.png")
    Image.new("RGB", (64, 64), "blue").save("wide.bmp")
    names = [photos[0], "wide.png", "wide.bmp"]
    model = CaptionModel.from_checkpoint(attend)
    captions, maps = model.caption(names, return_attention=True)
    with mock.patch.object(plots, "attention_maps", wraps=plots.attention_maps) as plotted:
        assert command(*names, *["--maps", "new/maps", "--n-best", "3"], checkpoint=attend)[0] == 0
    files = sorted(Path("new/maps").iterdir())
    assert [file.name for file in files] == ["00.jpg", "wide-2.jpg", "wide.jpg"]
    for call, text, weights in zip(plotted.call_args_list, captions, maps, strict=True):
        assert call.args[0].size == (64, 64) and call.args[1] == text
        np.testing.assert_allclose(call.args[2], weights, atol=1e-5)
    assert all(Image.open(file).width > 500 for file in files)


def test_names_of_maps(command, attend, photos):
    """A picture replaces no photo, and its name is short enough for any file system."""
    long = "x" * 251 + ".jpg"
    shutil.copy(photos[0], long)
    before = {path: Path(path).read_bytes() for path in (*photos, long)}
    assert command(photos[1], long, "--maps", ".", checkpoint=attend)[0] == 0
    assert all(Path(path).read_bytes() == content for path, content in before.items())
    written = {path.name for path in Path().iterdir()} - before.keys()
    assert written == {"01-2.jpg", f"{long[:60]}.jpg"}


# ---------------------------------------------------------------------------- what goes wrong


def kinds_of_damage(photo):
    """{file name: content} of files that are no readable images, each made from a good one."""
    files = {}
    for suffix, kind in (("png", "png"), ("gif", "gif"), ("webp", "webp"), ("jpg", "jpeg")):
        buffer = io.BytesIO()
        Image.open(photo).resize((200, 150)).save(buffer, kind)
        good = buffer.getvalue()
        files[f"half.{suffix}"] = good[: len(good) // 2]
        files[f"header.{suffix}"] = b"?" * 12 + good[12:]
    size = good.index(b"\xff\xc0") + 5  # of the JPEG
    return files | {
        "huge.jpg": good[:size] + b"\xff\x00" * 2 + good[size + 4 :],
        "no_pixels.jpg": good[:size] + b"\0" * 4 + good[size + 4 :],
        "empty.jpg": b"",
        "page.jpg": b"<html></html>",
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF",
        "warning.tif": b"II*\0" + b"\1" * 300,  # Pillow prints a warning
    }


def test_damaged_files(command, model, photos, recwarn):
    """Files that cannot be read are named, each in a line; the good ones between them captioned.

    So are a missing file, a link to nowhere, a pipe, a name that is too long, and a folder without
    images; the exit status is 1.
    """
    damaged = kinds_of_damage(photos[0])
    for name, content in damaged.items():
        Path(name).write_bytes(content)
    Path("link.jpg").symlink_to("nowhere.jpg")
    os.mkfifo("pipe.jpg")
    bad = [*damaged, "nowhere.jpg", "link.jpg", "pipe.jpg", "x" * 300 + ".jpg"]
    Path("folder.jpg").mkdir()
    good = photos[1:6]
    mixed = [*bad[:3], good[0], *bad[3:11], *good[1:4], "folder.jpg", *bad[11:], good[4]]
    status, printed, errors = command(*mixed, "--json", "out.json")
    assert (status, printed) == (1, lines(good, model.caption(good)))
    no_image = "error: there is no image in folder.jpg; check the path"
    assert errors[:2] == [no_image, f"model: {SUMMARY}"]
    assert not recwarn.list and len(errors) == len(bad) + 2
    for name, error in zip(bad, errors[2:], strict=True):
        assert error.startswith(f"error: {name}: ") and len(error.replace(name, "")) < 250
    assert len(json.loads(Path("out.json").read_text())) == 5


def test_files_are_read_batch_by_batch(model, photos, monkeypatch):
    """The captions of a batch are there before a file of the next one is opened; a file is opened
    once, also beside damaged ones.
    """
    Path("bad.jpg").write_text("text")
    paths, bad = [photos[0], "bad.jpg", *photos[1:4], "nowhere.jpg"], []
    with mock.patch("captioning.data.images.open_image", wraps=open_image) as opened:
        captions = model.describe(paths, on_bad=bad.append, batch_size=4, beam_size=3)
        found = [next(captions).captions[0] for _ in range(3)]
        assert [call.args[0].name for call in opened.call_args_list] == paths[:4]
        found += [x.captions[0] for x in captions]
    assert [call.args[0].name for call in opened.call_args_list] == paths[:-1]
    assert found == model.caption(photos[:4]) and len(bad) == 2
    with pytest.raises(BadImageError, match="nowhere.jpg"):
        next(model.describe(["nowhere.jpg"]))


ERRORS = {
    "nowhere.jpg": "error: nowhere.jpg: there is no such file; check the path",
    "00.jpg --n-best 4 --beam-size 3": "needs a beam_size at least as large",
    "00.jpg --temperature -1": "temperature is -1.0, but must be at least 0",
    "00.jpg --maps maps": "--inject attend",
    "00.jpg --maps 01.jpg": "01.jpg is not a folder",
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
    monkeypatch.setattr("caption.PRETRAINED", Path("photo_captioner.pt"))
    assert main([photos[0]]) == 1
    assert capsys.readouterr().err == "error: there is no file photo_captioner.pt\n"
    shutil.copy(checkpoint, "photo_captioner.pt")
    assert main([photos[0]]) == 0
    assert capsys.readouterr().out.splitlines() == lines(photos[:1], model.caption(photos[0]))


def test_ctrl_c(command, photos, monkeypatch):
    """Ctrl-C ends the command with status 130, without a traceback; earlier captions are there."""

    describe = CaptionModel.describe

    def interrupted(model, paths, *args, **options):
        yield from describe(model, paths[:2], *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(CaptionModel, "describe", interrupted)
    status, printed, errors = command(*photos)
    assert status == 130 and len(printed) == 2 and errors == [f"model: {SUMMARY}"]


def test_closed_pipe(command, photos, monkeypatch):
    """A reader that ends early, such as `| head`, ends the command without a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:  # closed as at exit: it would raise if anything were left
        monkeypatch.setattr("sys.stdout", pipe)
        assert command(*photos) == (141, [], [f"model: {SUMMARY}"])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar(command, photos, monkeypatch, terminal):
    """Many photos have a progress bar on standard error if that is a terminal."""
    monkeypatch.setattr("caption.FEW", 5)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert any("/12 [" in line for line in command(*photos, "--beam-size", "1")[2]) == terminal


# ---------------------------------------------------------------------------- photos/

FOLDER = Path(__file__).parent.parent / "photos"
PHOTOS = sorted(FOLDER.glob("*.jpg"))


def test_photos():
    """A photo has at most 60 KB and 640 pixels per side, no EXIF data, a line of credits, and two
    captions, in COCO's format, with the size of the file.
    """
    truth, credits = COCO(str(FOLDER / "captions.json")), (FOLDER / "CREDITS.md").read_text("utf-8")
    assert sorted(image["file_name"] for image in truth.imgs.values()) == [p.name for p in PHOTOS]
    for entry in truth.imgs.values():
        path = FOLDER / entry["file_name"]
        image = Image.open(path)
        assert path.stat().st_size <= 60_000 and max(image.size) <= 640
        assert image.format == "JPEG" and not image.getexif() and "exif" not in image.info
        assert f"| `{path.name}` |" in credits
        assert len(truth.imgToAnns[entry["id"]]) == 2
        assert image.size == (entry["width"], entry["height"])
