"""The figures of beam search and of the n-grams."""

import matplotlib
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

matplotlib.use("Agg")  # draws without a display

from captioning.figures.inference import TINTS, Branch, beam_tree, matched_by, ngram_matches
from captioning.figures.plots import BLUE, ORANGE


def test_beam_tree():
    """The path to the best score is orange, what was dropped is grey, and the path of greedy
    decoding, the best extension of the best first word, is dashed."""
    steps = [
        [Branch("a", -1, 0, True), Branch("an", -2, 0, True)],
        [Branch("cat", -1.5, 0, True), Branch("ox", -2.1, 1, True), Branch("dog", -4, 0, False)],
        [Branch("<end>", -2, 0, True, -0.9), Branch("<end>", -2.2, 1, True, -0.8)],
    ]
    ax = beam_tree(steps)
    edges = {t.get_text(): to_hex(t.get_bbox_patch().get_edgecolor()) for t in ax.texts}
    orange = [text for text, edge in edges.items() if edge == ORANGE]
    assert orange == ["an -2.00", "ox -2.10", "<end> -2.20, score -0.800"]
    assert edges["cat -1.50"] == BLUE and edges["dog -4.00"] == to_hex("silver")
    assert len(ax.lines) == 5  # to every branch after the first step
    dashed = [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed == [[0, 0], [0, 0]]


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
