"""Figures that the notebooks share."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

matplotlib.use("Agg")  # draws without a display

from captioning.figures.plots import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    TINTS,
    Branch,
    attention_maps,
    beam_tree,
    caption_grid,
    matched_by,
    next_word_bars,
    ngram_matches,
    padded_table,
)


def texts(ax):
    """The (text, colour) of all texts of the axes, except empty ones."""
    found = [(text.get_text(), text.get_color()) for text in ax.findobj(Text)]
    return [pair for pair in found if pair[0]]


def test_caption_grid():
    """Only wrong predictions are marked and red; each image has its own captions and note."""
    images = [np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 30)]
    axes = caption_grid(
        images,
        ["a cat", "a dog", "a cup"],
        ["one cat", "one dog", "one cup"],
        [False, True, False],
        ["n1", "", "n3"],
        columns=2,
    )
    grey = "dimgrey"
    assert texts(axes.flat[0]) == [
        ("a", "black"),
        ("cat", "black"),
        ("one", grey),
        ("cat", grey),
        ("n1", BLUE),
    ]
    assert texts(axes.flat[1]) == [
        ("✗", RED),
        ("a", RED),
        ("dog", RED),
        ("one", grey),
        ("dog", grey),
    ]
    assert [ax.images[0].get_array()[0, 0, 0] for ax in axes.flat[:3]] == [10, 20, 30]
    assert not axes.flat[3].images


def test_wrong_words_are_red():
    """With positions, only these words of a wrong caption are red; lines break without a loss."""
    caption = "a red cat and a blue car on the long sandy beach"
    (ax,) = caption_grid(
        [Image.new("RGB", (4, 3))],
        [caption],
        [""],
        [True],
        wrong_words=[{1, 6}],
        columns=1,
        width=1.5,
    ).flat
    assert [word for word, _ in texts(ax)] == ["✗", *caption.split()]
    assert [word for word, colour in texts(ax) if colour == RED] == ["✗", "red", "car"]


def test_captions_do_not_overlap_the_next_row():
    """The text below an image ends above the images of the next row."""
    image = Image.new("RGB", (8, 8))
    axes = caption_grid(
        [image] * 2,
        ["word " * 30, "word"],
        ["other " * 30, "other"],
        [False, False],
        columns=1,
        width=2,
    )
    figure = axes.flat[0].figure
    figure.canvas.draw()
    lowest = min(t.get_window_extent().y0 for t in axes.flat[0].findobj(Text) if t.get_text())
    assert lowest > axes.flat[1].get_window_extent().y1


def test_attention_maps():
    """The brightest part of a map is where its weight is largest; boxes are on their words."""
    weights = np.zeros((2, 2, 2))
    weights[0, 0, 1] = weights[1, 1, 0] = 0.8
    axes = attention_maps(
        Image.new("RGB", (40, 40), "white"), "a cat", weights, boxes={1: (3, 4, 10, 20)}
    )
    first, second, whole = (ax.images[0].get_array()[..., 0] for ax in axes.flat[:3])
    assert first[0, -1] == second[-1, 0] == whole.min() == 255
    assert first[-1, 0] < 60 and second[0, -1] < 60
    assert not axes.flat[0].patches
    assert axes.flat[1].patches[0].get_bbox().bounds == (3, 4, 10, 20)


def test_next_word_bars():
    """The bars have the lengths of the probabilities, and the marked word is orange."""
    ax = next_word_bars([{"cat": 0.2, "dog": 0.7}], ["cat"], ["after a"], [{"dog": 0.6}]).flat[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    bars = {
        n: (bar.get_width(), to_hex(bar.get_facecolor()))
        for n, bar in zip(names, ax.patches, strict=True)
    }
    assert bars == {"cat": (0.2, ORANGE), "dog": (0.7, BLUE)}
    assert list(ax.lines[0].get_xdata()) == [0, 0.6]  # the longest bar is the last, on top


def test_beam_tree():
    """The path to the best score is orange, what was dropped is grey, and the path of greedy
    decoding, the best extension of the best first word, is dashed.
    """
    steps = [
        [Branch("a", -1, 0, True), Branch("an", -2, 0, True)],
        [Branch("cat", -1.5, 0, True), Branch("ox", -2.1, 1, True), Branch("dog", -4, 0, False)],
        [Branch("<end>", -2, 0, True, -0.9), Branch("<end>", -2.2, 1, True, -0.8)],
    ]
    ax = beam_tree(steps)
    edges = {text.get_text().split()[0]: text.get_bbox_patch().get_edgecolor() for text in ax.texts}
    orange = [
        text.get_text()
        for text in ax.texts
        if to_hex(text.get_bbox_patch().get_edgecolor()) == ORANGE
    ]
    assert orange == ["an -2.00", "ox -2.10", "<end> -2.20, score -0.800"]
    assert to_hex(edges["cat"]) == BLUE and to_hex(edges["dog"]) == to_hex("silver")
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
    white = "#ffffff"
    first, second = TINTS[:2]
    assert colours[:5] == [first, first, second, second, second]
    assert colours[5:9] == [first, white, second, second]
    assert colours[9:] == [white, white, second, white, white]
    boxes = [bar.get_bbox() for bar in bars]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_padded_table():
    """Only `<pad>` is grey; the values are those of the words, and padding has none."""
    ax = padded_table([["a", "cat", "<end>"], ["a", "<end>"]], [[0.5, 2.25, 1], [3, 4]])
    grey = [text.get_color() == GREY for text in ax.texts if text.get_text() == "<pad>"]
    others = [text.get_color() != GREY for text in ax.texts if text.get_text() != "<pad>"]
    assert grey == [True] and all(others)
    values = [text for text in ax.texts if text.get_text().replace(".", "").isdigit()]
    assert [(text.get_text(), text.get_position()[0]) for text in values] == [
        ("0.50", 0),
        ("2.25", 1),
        ("1.00", 2),
        ("3.00", 0),
        ("4.00", 1),
    ]
