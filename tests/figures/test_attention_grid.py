"""Attention as a grid of weights."""

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")  # draws without a display

from captioning.figures.attention_grid import attention_step, weight_grid

IMAGE = Image.new("RGB", (20, 10))
WEIGHTS = np.array([[0.6, 0.2, 0.0, 0.0], [0.191, 0.009, 0.0, 0.0]])


def test_weight_grid():
    """Each weight of at least 1 % is written into its position, as a percentage."""
    ax = weight_grid(IMAGE, WEIGHTS, "title", boxes=[(1, 2, 3, 4)])
    found = {text.get_position(): text.get_text() for text in ax.texts}
    assert found == {(2.5, 2.5): "60", (7.5, 2.5): "20", (2.5, 7.5): "19"}
    (box,) = ax.patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (1, 2, 3, 4)
    overlay = ax.images[1].get_array()
    assert np.allclose(overlay[..., 3] / overlay[0, 0, 3], WEIGHTS / 0.6)


def test_attention_step():
    """The diagram has the words read, the word predicted, both LSTMs and five arrows."""
    ax = attention_step(IMAGE, WEIGHTS, ["a", "blue"], "cat")
    written = [text.get_text() for text in ax.texts]
    assert {"a blue", "cat", "attention LSTM", "language LSTM"} < set(written)
    assert written.count("") == 5
    assert ax.figure.axes[0].get_title() == "8 positions and their weights in %"
