"""The figures of the next words, of beam search and of the n-grams."""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image

matplotlib.use("Agg")  # draws without a display

from captioning.base.tokens import END
from captioning.figures.inference import (
    TINTS,
    Branch,
    beam_tree,
    branches,
    matched_by,
    next_word_map,
    ngram_matches,
    overtaken,
)
from captioning.figures.plots import BLUE, ORANGE

IMAGE = Image.new("RGB", (8, 8))
STEPS = [
    [Branch("a", -1, 0, True), Branch("an", -2, 0, True)],
    [Branch("cat", -1.5, 0, True), Branch("ox", -2.1, 1, True), Branch("dog", -4, 0, False)],
    [Branch("<end>", -2, 1, True, -0.8), Branch("<end>", -2.2, 0, True, -0.9)],
]


def test_next_word_map():
    """Words that are ever probable have a row, in the order in which they first are; the actual
    word of each step is framed, probable or not.
    """
    probabilities = np.array([[0.9, 0.1, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    ax = next_word_map(IMAGE, ["a", "an", "cat", "dog"], probabilities, [0, 3])
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows[:2] == ["a", "an"] and set(rows[2:]) == {"cat", "dog"}
    frames = [(bar.get_x() + 0.5, rows[round(bar.get_y() + 0.5)]) for bar in ax.patches]
    assert frames == [(0, "a"), (1, "dog")]


def test_beam_tree():
    """Time runs from left to right. The path to the best score is orange, what was dropped is grey,
    and the path of greedy decoding, the best extension of the best first word, is dashed.
    """
    ax = beam_tree(IMAGE, STEPS)
    boxes = [text for text in ax.texts if text.get_bbox_patch()]
    edges = {t.get_text(): to_hex(t.get_bbox_patch().get_edgecolor()) for t in boxes}
    orange = [text for text, edge in edges.items() if edge == ORANGE]
    assert orange == ["an\n-2.00", "ox\n-2.10", "<end>\n-2.00\n(-0.800)"]
    assert edges["cat\n-1.50"] == BLUE and edges["dog"] == "#a9adb3"
    assert [t.get_position()[0] for t in boxes] == [0, 0, 1, 1, 1, 2, 2]
    assert len(ax.lines) == 5  # to every branch after the first step
    dashed = [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed == [[0, 0], [0, -1]]
    assert [t.get_position()[0] for t in ax.texts if "overtakes" in t.get_text()] == [2]


def test_overtaken():
    """The step from which on the best prefix ranks above the greedy one, or that one is gone."""
    assert overtaken(STEPS) == 2
    assert overtaken([STEPS[0], [Branch("<end>", -1, 0, True, -1)]]) is None  # greedy wins
    gone = [Branch("ox", -2, 1, True), Branch("yak", -3, 1, True)]
    assert overtaken([STEPS[0], gone, [Branch("<end>", -2, 0, True, -1)]]) == 1


def test_branches():
    """The prefixes of a search as branches: those in the beam and the next one."""

    def prefix(index, log_p, parent=None):
        fields = {"ids": [1, index], "log_p": log_p, "parent": parent}
        return SimpleNamespace(**fields, score=lambda: log_p / 2)

    first = [prefix(4, -1), prefix(5, -2), prefix(4, -3), prefix(4, -4)]
    second = [prefix(END, -1.5, first[1]), prefix(4, -2, first[0]), prefix(END, -3, first[0])]
    words = ["", "", "<end>", "", "a", "an"] if END == 2 else None
    tree = branches([first, second], words, beam_size=2)
    assert tree[0] == [
        Branch("a", -1, 0, True),
        Branch("an", -2, 0, True),
        Branch("a", -3, 0, False),
    ]
    assert tree[1][0] == Branch("<end>", -1.5, 1, True, -0.75)
    assert tree[1][2] == Branch("<end>", -3, 0, False)  # no score: it was dropped


@pytest.mark.parametrize("n, expected", [(1, [0, 0, 0, None, 1]), (2, [0, None, None, 1])])
def test_matched_by(n, expected):
    """The first reference that has the n-gram; a repetition needs one in the same reference."""
    references = [["the", "cat", "is", "the", "one"], ["the", "mat", "cat"]]
    assert matched_by(["the", "cat", "the", "the", "mat"], references, n) == expected


def test_ngram_matches():
    """There is a bar per n-gram, in the colour of its reference, and bars do not overlap."""
    ax = ngram_matches(["a", "b", "c", "d", "e"], [["a", "b", "x"], ["c", "d", "e"]])
    bars = [bar for bar in ax.patches if isinstance(bar, Rectangle)]
    colours = [to_hex(bar.get_facecolor()) for bar in bars]
    none, first, second = "#ffffff", *TINTS[:2]
    assert colours[:5] == [first, first, second, second, second]
    assert colours[5:] == [first, none, second, second, none, none, second, none, none]
    boxes = [bar.get_bbox() for bar in bars]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
