"""Hundreds of damaged files: each gives a correct result, or an error of one line."""

import copy
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
    content = bytearray(content)
    start, stop = sorted(rng.integers(0, len(content), 2))
    kind = rng.integers(6)
    if kind == 0:
        del content[start:]
    if kind == 1:
        for index in rng.integers(0, len(content), rng.integers(1, 9)):
            content[index] ^= 1 << rng.integers(8)
    if kind == 2:
        content[start : start + 4] = b"\xff\xff\xff\xff"[: len(content) - start]
    if kind == 3:
        del content[start:stop]
    if kind == 4:
        content[stop:stop] = content[start:stop]
    if kind == 5:
        other = others[rng.integers(len(others))]
        content[start:stop] = other[start:stop]
    return bytes(content)


def valid_images():
    """Small files of many kinds: JPEG, PNG, WebP and GIF in several modes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # orientation: rotated
    kinds = [
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("PNG", "1", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("GIF", "P", {}),
        ("GIF", "P", {"save_all": True, "append_images": [image.rotate(90)]}),
    ]
    files = []
    for kind, mode, settings in kinds:
        file = io.BytesIO()
        converted = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
        converted.save(file, kind, **settings)
        files.append(file.getvalue())
    return files


def test_valid_images(tmp_path):
    """Every one of these images can be read before it is damaged."""
    for content in valid_images():
        (tmp_path / "image").write_bytes(content)
        assert load_image(tmp_path / "image").mode == "RGB"


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it repairs
def test_damaged_images(tmp_path):
    """A damaged image is read as upright RGB, or is an error of one line that names it."""
    files, path = valid_images(), tmp_path / "image.jpg"
    refused = 0
    for number in range(IMAGES):
        rng = np.random.default_rng(number)
        path.write_bytes(damage(files[number % len(files)], rng, files))
        try:
            image = load_image(path, min_size=8)
            assert image.mode == "RGB" and min(image.size) > 0, number
            image.resize((8, 8))
        except BadImageError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error).splitlines()) == 1, number
    assert IMAGES / 4 < refused < IMAGES  # neither all nor none of them is unreadable


# ---------------------------------------------------------------------------- captions

ODD = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\0",
    "..",
    "../x.jpg",
    "/etc/passwd",
    "a" * 100_000,
    "\ud800",
    "\u202e",
    "🐕",
    [],
    {},
    [[]],
    {"id": 1},
    [None] * 3,
]


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
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, 4)):
        every = positions(content)
        container, key = every[rng.integers(len(every))]
        if rng.random() < 0.2:
            del container[key]
        else:
            container[key] = ODD[rng.integers(len(ODD))]
    return json.dumps(content).encode()


def use(dataset, file):
    """What a run does with captions before it opens the first image."""
    data = CocoCaptions(dataset / "images", file)
    vocab = Vocabulary.build(data.all_captions, threshold=1)
    vocab.save(dataset / "vocabulary.json")
    assert Vocabulary.load(dataset / "vocabulary.json").words == vocab.words
    loader = get_loader(CaptionDataset(data, vocab, features=torch.zeros(len(data), 1, 3)))
    assert sum(len(batch.lengths) for batch in loader) == len(data.all_captions)


def test_damaged_captions(dataset):
    """A damaged captions file is used completely, or is a short error that names it."""
    whole = (dataset / "captions.json").read_bytes()
    content, file, refused = json.loads(whole), dataset / "damaged.json", 0
    for number in range(CAPTIONS):
        rng = np.random.default_rng(number)
        damaged = corrupt(content, rng) if number % 2 else damage(whole, rng, [whole[::-1]])
        file.write_bytes(damaged)
        try:
            use(dataset, file)
        except DataError as error:
            refused += 1
            assert str(file) in str(error) or "image" in str(error), number
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, number
    assert CAPTIONS / 4 < refused < CAPTIONS


@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, '{"a":' * 10**5, "1" * 10**5, '{"images": [' + "9" * 5000 + "]}", "-" * 100],
    ids=["lists", "objects", "digits", "a huge number", "dashes"],
)
def test_json_that_breaks_parsers(dataset, text):
    """Deep nesting and huge numbers, which break parsers, are a short error too."""
    (dataset / "captions.json").write_text(text)
    with pytest.raises(DataError) as caught:
        CocoCaptions(dataset / "images", dataset / "captions.json")
    assert len(str(caught.value)) < 500


# ---------------------------------------------------------------------------- checkpoints


def test_damaged_checkpoints(tmp_path):
    """A damaged checkpoint is an error that names it, or its content is unchanged.

    Not every byte of the file has a meaning; checksums cover those that do.
    """
    weights = {"weight": torch.arange(400.0), "words": ["<pad>", "<start>"]}
    torch.save(weights, tmp_path / "whole.pt")
    whole, path, refused = (tmp_path / "whole.pt").read_bytes(), tmp_path / "damaged.pt", 0
    for number in range(200):
        path.write_bytes(damage(whole, np.random.default_rng(number), [whole[::-1]]))
        try:
            loaded = load_safely(path)
            assert torch.equal(loaded["weight"], weights["weight"]), number
            assert loaded["words"] == weights["words"], number
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)), number
    assert refused > 100


def test_damaged_vocabularies(tmp_path):
    """A damaged vocabulary is an error of one line that names it, or still a vocabulary."""
    path = tmp_path / "vocabulary.json"
    Vocabulary.build(["a dog and a cat", "the old red bus"], threshold=1).save(path)
    whole, refused = path.read_bytes(), 0
    for number in range(200):
        path.write_bytes(damage(whole, np.random.default_rng(number), [whole[::-1]]))
        try:
            vocab = Vocabulary.load(path)
            assert vocab.decode(vocab.encode("a dog")) is not None and len(vocab) >= 4, number
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1, number
    assert refused > 100
