"""Hundreds of damaged files: each gives a correct result, or an error of one line."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.base.checkpoints import load_safely
from captioning.data.coco import CocoCaptions, DataError
from captioning.data.images import BadImageError, load_image
from data_loader import CaptionDataset, get_loader
from vocabulary import Vocabulary

IMAGES = CAPTIONS = 320  # damaged files of each kind


# ---------------------------------------------------------------------------- damage


def damage(content: bytes, rng, others) -> bytes:
    """Truncate, flip bits, overwrite, delete, repeat, or insert a part of another file."""
    start, stop = sorted(rng.integers(0, len(content), 2))
    flipped, other = bytearray(content), others[rng.integers(len(others))]
    for index in rng.integers(0, len(content), rng.integers(1, 9)):
        flipped[index] ^= 1 << rng.integers(8)
    damaged = [
        content[:start],
        bytes(flipped),
        content[:start] + b"\xff\xff\xff\xff" + content[start + 4 :],
        content[:start] + content[stop:],
        content[:stop] + content[start:],
        content[:start] + other[start:stop] + content[stop:],
    ]
    return damaged[rng.integers(6)]


def refusals(path, contents, use, error_class):
    """Use files with each of the contents: how many were refused, with one line that names them."""
    refused = 0
    for number, content in enumerate(contents):
        path.write_bytes(content)
        try:
            use(path)
        except error_class as error:
            refused += 1
            text = str(error)
            assert str(path) in text and len(text.splitlines()) == 1 and len(text) < 1000, number
    return refused


def valid_images():
    """Small files of many kinds: JPEG, PNG, WebP and GIF in several modes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # orientation: rotated
    animation = {"save_all": True, "append_images": [image.rotate(90)]}
    kinds = [("JPEG", "RGB", {"exif": exif}), ("JPEG", "RGB", {"progressive": True})]
    kinds += [("WEBP", "RGB", {"lossless": True}), ("GIF", "P", animation)]
    modes = {"JPEG": ("L", "CMYK"), "PNG": ("RGB", "RGBA", "P", "I;16", "1")}
    modes |= {"WEBP": ("RGB", "RGBA"), "GIF": ("P",)}
    kinds += [(kind, mode, {}) for kind, of_kind in modes.items() for mode in of_kind]
    files = []
    for kind, mode, settings in kinds:
        file = io.BytesIO()
        converted = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
        converted.save(file, kind, **settings)
        files.append(file.getvalue())
    return files


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it repairs
def test_damaged_images(tmp_path):
    """A damaged image is read as upright RGB, or is an error of one line that names it.

    Before, all of them can be read.
    """

    def use(path):
        image = load_image(path, min_size=8)
        assert image.mode == "RGB" and min(image.size) > 0
        image.resize((8, 8))

    files = valid_images()
    assert refusals(tmp_path / "image", files, use, BadImageError) == 0
    contents = (
        damage(files[number % len(files)], np.random.default_rng(number), files)
        for number in range(IMAGES)
    )
    refused = refusals(tmp_path / "image.jpg", contents, use, BadImageError)
    assert IMAGES / 4 < refused < IMAGES  # neither all nor none of them is unreadable


# ---------------------------------------------------------------------------- captions

ODD = [None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "a" * 100_000, "\ud800"]
ODD += ["\u202e", "", " ", "\0", "..", "../x.jpg", "/etc/passwd", "🐕", [], {}, [[]], [None]]


def positions(content):
    """Every (container, key) of a JSON document."""
    found, stack = [], [content]
    while stack:
        container = stack.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                stack.append(container[key])
    return found


def corrupt(content, rng):
    """Replace a few values of the document by odd ones, and delete some entries."""
    for _ in range(rng.integers(1, 4)):
        every = positions(content)
        container, key = every[rng.integers(len(every))]
        if rng.random() < 0.2:
            del container[key]
        else:
            container[key] = ODD[rng.integers(len(ODD))]
    return json.dumps(content).encode()


def test_damaged_captions(dataset):
    """A damaged captions file is used completely, or is a short error that names it.

    Used as a run does before it opens the first image.
    """

    def use(file):
        data = CocoCaptions(dataset / "images", file)
        vocab = Vocabulary.build(data.all_captions, threshold=1)
        vocab.save(dataset / "vocabulary.json")
        assert json.loads((dataset / "vocabulary.json").read_bytes())["words"] == vocab.words
        loader = get_loader(CaptionDataset(data, vocab, features=torch.zeros(len(data), 1, 3)))
        assert sum(len(batch.lengths) for batch in loader) == len(data.all_captions)

    whole = (dataset / "captions.json").read_bytes()
    contents = (
        corrupt(json.loads(whole), rng) if number % 2 else damage(whole, rng, [whole[::-1]])
        for number in range(CAPTIONS)
        for rng in [np.random.default_rng(number)]
    )
    refused = refusals(dataset / "damaged.json", contents, use, DataError)
    assert CAPTIONS / 4 < refused < CAPTIONS
    too_deep = [b"[" * 10**6, b'{"a":' * 10**5]  # which breaks parsers, as huge numbers do
    huge = [b"1" * 10**5, b'{"images": [' + b"9" * 5000 + b"]}"]
    assert refusals(dataset / "damaged.json", too_deep + huge, use, DataError) == 4


# ---------------------------------------------------------------------------- checkpoints


def test_damaged_checkpoints(tmp_path):
    """A damaged checkpoint is an error that names it, or its content is unchanged; so is another
    file.

    Not every byte of the file has a meaning; checksums cover those that do.
    """

    def use(path):
        loaded = load_safely(path)
        assert torch.equal(loaded["weight"], weights["weight"])
        assert loaded["words"] == weights["words"]

    path, weights = tmp_path / "x.pt", {"weight": torch.arange(400.0), "words": ["<pad>"]}
    torch.save(weights, path)
    whole = path.read_bytes()
    contents = (damage(whole, np.random.default_rng(n), [whole[::-1]]) for n in range(200))
    assert refusals(path, contents, use, ValueError) > 100
    foreign = [b"", b"hi", b"\x80\x02.", b"\x80\x02}q", b"\x80\x02G1", b"PK\x03\x04", bytes(1000)]
    assert refusals(path, foreign, use, ValueError) == len(foreign)
