"""Figures that the notebooks share."""

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws without a display

from plots import GREY, caption_grid, padded_table


def test_caption_grid():
    """Only wrong predictions are marked and red; each image has its own captions and note."""
    images = [np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 30)]
    notes = ["note 1", "note 2", "note 3"]
    axes = caption_grid(images, ["a cat", "a dog", "a cup"], ["one cat", "one dog", "one cup"],
                        [False, True, False], notes, columns=2)  # fmt: skip
    titles = [(ax.get_title(), ax.title.get_color()) for ax in axes.flat]
    assert titles == [
        ("predicted: a cat\n\nactual: one cat\n\nnote 1", "black"),
        ("✗ predicted: a dog\n\nactual: one dog\n\nnote 2", "firebrick"),
        ("predicted: a cup\n\nactual: one cup\n\nnote 3", "black"),
        ("", "black"),
    ]
    assert [ax.images[0].get_array()[0, 0, 0] for ax in axes.flat[:3]] == [10, 20, 30]


def test_padded_table():
    """Only `<pad>` is grey; the values are those of the words, and padding has none."""
    ax = padded_table([["a", "cat", "<end>"], ["a", "<end>"]], [[0.5, 2.25, 1], [3, 4]])
    grey = [text.get_color() == GREY for text in ax.texts if text.get_text() == "<pad>"]
    others = [text.get_color() != GREY for text in ax.texts if text.get_text() != "<pad>"]
    assert grey == [True] and all(others)
    values = [text for text in ax.texts if text.get_text().replace(".", "").isdigit()]
    assert [(text.get_text(), text.get_position()[0]) for text in values] == [
        ("0.50", 0), ("2.25", 1), ("1.00", 2), ("3.00", 0), ("4.00", 1),
    ]  # fmt: skip
