"""Figures that the notebooks share."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

matplotlib.use("Agg")  # draws without a display

from captioning.figures.plots import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    attention_maps,
    caption_grid,
    image_grid,
    next_word_bars,
    padded_table,
)


def texts(ax):
    """The (text, colour) of all texts of the axes, except empty ones."""
    found = [(text.get_text(), text.get_color()) for text in ax.findobj(Text)]
    return [pair for pair in found if pair[0]]


def test_caption_grid():
    """Only wrong predictions are marked and red; each image has its own captions and note."""
    images = [np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 30)]
    predicted, actual = ["a cat", "a dog", "a cup"], ["one cat", "one dog", "one cup"]
    axes = caption_grid(
        images, predicted, actual, [False, True, False], ["n1", "", "n3"], columns=2
    )
    one = ("one", "dimgrey")
    right = [("a", "black"), ("cat", "black"), one, ("cat", "dimgrey"), ("n1", BLUE)]
    assert texts(axes.flat[0]) == right
    wrong = [("✗", RED), ("a", RED), ("dog", RED), one, ("dog", "dimgrey")]
    assert texts(axes.flat[1]) == wrong
    assert [ax.images[0].get_array()[0, 0, 0] for ax in axes.flat[:3]] == [10, 20, 30]
    assert not axes.flat[3].images


def test_wrong_words_are_red():
    """With positions, only these words of a wrong caption are red; lines break without a loss,
    also those with hyphens or with words that are too long."""
    caption = "a red t-shirt and a car on the long photographically-sandy beach"
    image, options = Image.new("RGB", (4, 3)), {"columns": 1, "width": 1.5}
    (ax,) = caption_grid([image], [caption], [""], [True], wrong_words=[{1, 5}], **options).flat
    assert [word for word, _ in texts(ax)] == ["✗", *caption.split()]
    assert [word for word, colour in texts(ax) if colour == RED] == ["✗", "red", "car"]


@pytest.mark.parametrize("grid", [image_grid, caption_grid])
def test_texts_do_not_overlap_the_next_row(grid):
    """The text below an image is below it, and ends above the images of the next row."""
    captions = ["word " * 30, "word"], ["other " * 30, "other"], [False, False]
    arguments = captions[:1] if grid is image_grid else captions
    axes = grid([Image.new("RGB", (8, 8))] * 2, *arguments, columns=1, width=2)
    axes.flat[0].figure.canvas.draw()
    extents = [t.get_window_extent() for t in axes.flat[0].findobj(Text) if t.get_text()]
    assert max(extent.y1 for extent in extents) <= axes.flat[0].get_window_extent().y0
    assert min(extent.y0 for extent in extents) > axes.flat[1].get_window_extent().y1


def test_attention_maps():
    """The brightest part of a map is where its weight is largest."""
    weights = np.zeros((2, 2, 2))
    weights[0, 0, 1] = weights[1, 1, 0] = 0.8
    image = Image.new("RGB", (40, 40), "white")
    axes = attention_maps(image, "a cat", weights)
    first, second, whole = (ax.images[0].get_array()[..., 0] for ax in axes.flat[:3])
    assert first[0, -1] == second[-1, 0] == whole.min() == 255
    assert first[-1, 0] < 60 and second[0, -1] < 60


def test_next_word_bars():
    """The bars have the lengths of the probabilities, and the marked word is orange."""
    ax = next_word_bars([{"cat": 0.2, "dog": 0.7}], ["cat"], ["after a"], [{"dog": 0.6}]).flat[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    found = [(bar.get_width(), to_hex(bar.get_facecolor())) for bar in ax.patches]
    assert dict(zip(names, found, strict=True)) == {"cat": (0.2, ORANGE), "dog": (0.7, BLUE)}
    assert list(ax.lines[0].get_xdata()) == [0, 0.6]  # the longest bar is the last, on top


def test_padded_table():
    """Only `<pad>` is grey; the values are those of the words, and padding has none."""
    ax = padded_table([["a", "cat", "<end>"], ["a", "<end>"]], [[0.5, 2.25, 1], [3, 4]])
    assert [t.get_text() for t in ax.texts if t.get_color() == GREY] == ["<pad>"]
    values = [text for text in ax.texts if text.get_text().replace(".", "").isdigit()]
    found = [f"{text.get_text()} in column {text.get_position()[0]}" for text in values]
    columns = [(0.5, 0), (2.25, 1), (1, 2), (3, 0), (4, 1)]
    assert found == [f"{value:.2f} in column {column}" for value, column in columns]
