"""What a wrong word does to a caption."""

import matplotlib
import pytest
from matplotlib.colors import to_hex
from PIL import Image

matplotlib.use("Agg")  # draws without a display

from captioning.data.coco import CocoCaptions
from captioning.figures.image_text import RED
from captioning.figures.wrong_word import (
    caption_rows,
    content_errors,
    nouns_among,
    short_captions,
    worst_substitution,
)
from data_loader import CaptionDataset
from vocabulary import Vocabulary

ACTUAL = ["a", "red", "cat", "sits", "on", "the", "sandy", "beach"]


@pytest.fixture
def dataset(shared_dataset):
    data = CocoCaptions(shared_dataset / "images", shared_dataset / "captions.json")
    return CaptionDataset(data, Vocabulary.build(data.all_captions, 1))


def vocab_of(dataset):
    return Vocabulary.build(dataset.data.all_captions, 1)


@pytest.mark.parametrize(
    "words, errors",
    [
        ("a red cat sits on the sandy beach", []),
        ("a big red cat sits on the sandy beach", ["big"]),  # the words after it are no errors
        ("the red cat in a beach", []),  # function words, and a word that is missing
        ("an orange kite flies over the beach", ["orange", "kite", "flies", "over"]),
        ("the sandy beach with a red cat", ["red", "cat"]),  # another order
    ],
)
def test_content_errors(words, errors):
    words = words.split()
    assert [words[t] for t in content_errors(words, ACTUAL)] == errors


def test_nouns():
    """Objects of the scenes and of COCO, not colours; without any, all words of content."""
    assert nouns_among(["<pad>", "orange", "kitten", "the", "pizza"]) == ["kitten", "pizza"]
    assert nouns_among(["<pad>", "the", "blue", "sky"]) == ["blue", "sky"]


def test_caption_rows():
    """Errors are red, and only they."""
    rows = {"actual": ACTUAL, "wrong": ["a", "red", "car", "waits", "on", "the", "beach"]}
    _, ax = caption_rows(Image.new("RGB", (4, 4)), rows)
    boxes = [text for text in ax.texts if text.get_bbox_patch()]
    red = [t.get_text() for t in boxes if to_hex(t.get_bbox_patch().get_edgecolor()) == RED]
    assert red == ["car", "waits"] and len(boxes) == 15


def test_short_captions(dataset):
    """The shortest captions with enough words after their first noun, of different images."""
    vocab = vocab_of(dataset)
    found = short_captions(dataset, vocab, {"dog", "men", "ball", "cat"}, 2)
    texts = [vocab.decode(dataset.caption(row)) for row, _ in found]
    assert texts == ["a dog runs across the wide green grass", "men on a bus to the old town"]
    assert [position for _, position in found] == [2, 1]


def test_worst_substitution(dataset):
    """The substitution with the most errors in free running beyond those of teacher forcing."""
    vocab = vocab_of(dataset)

    def run(row, position, wrong):
        actual = vocab.decode(dataset.caption(row)).split()
        changed = [*actual[: position - 1], wrong, *actual[position:]]
        free = [wrong, "kite", "bird"] if wrong == "horse" else changed
        forced = free if "dog" in actual else actual
        return {"actual": actual, "inputs": changed, "forced": forced, "free": free}

    row, captions = worst_substitution(dataset, vocab, run)
    assert captions["free"] == ["horse", "kite", "bird"]
    assert (
        "dog" not in captions["actual"]
        and captions["actual"] == vocab.decode(dataset.caption(row)).split()
    )
