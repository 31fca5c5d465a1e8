"""Figures that the notebooks share."""

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

matplotlib.use("Agg")  # draws without a display

from captioning.figures.plots import (
    BLUE,
    GREY,
    ORANGE,
    attention_maps,
    next_word_bars,
    padded_table,
)


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
