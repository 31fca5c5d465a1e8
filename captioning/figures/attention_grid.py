"""Attention drawn as a grid of weights over an image."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke
from PIL import Image

from captioning.figures.plots import BLUE, GREY, ORANGE


def weight_grid(image, weights, title="", boxes=(), ax=None):
    """Attention weights (rows, columns) over an image (PIL): a grid, and the weights in percent.

    The more weight a position has, the more orange it is; weights below 1 % have no number.
    boxes: (x, y, width, height) in pixels of the image.
    """
    ax = ax or plt.subplots(figsize=(4, 4.2), layout="constrained")[1]
    width, height = image.size
    rows, columns = weights.shape
    overlay = np.empty((rows, columns, 4))
    overlay[..., :3] = to_rgb(ORANGE)
    overlay[..., 3] = 0.9 * weights / weights.max()
    pale = Image.blend(image, Image.new("RGB", image.size, "white"), 0.35)
    for layer in (pale, overlay):
        ax.imshow(layer, extent=(0, width, height, 0))
    ax.hlines(np.linspace(0, height, rows + 1), 0, width, color=GREY, lw=0.6)
    ax.vlines(np.linspace(0, width, columns + 1), 0, height, color=GREY, lw=0.6)
    outline = [withStroke(linewidth=2.5, foreground="white")]
    for row, column in np.argwhere(weights >= 0.01):
        place = (column + 0.5) * width / columns, (row + 0.5) * height / rows
        percent = f"{100 * weights[row, column]:.0f}"
        ax.text(*place, percent, ha="center", va="center", weight="bold", path_effects=outline)
    for x, y, *size in boxes:
        ax.add_patch(plt.Rectangle((x, y), *size, fill=False, ec=BLUE, lw=2))
    ax.set_title(title, fontsize=10)
    ax.set_axis_off()
    return ax


def attention_step(image, weights, words, following):
    """One step of a decoder with attention, as a diagram beside the weights (rows, columns).

    words: those that the first LSTM has read. following: the word that the second one predicts.
    """
    figure = plt.figure(figsize=(9, 4.4))
    grid = figure.add_axes((0.01, 0.02, 0.46, 0.88))
    weight_grid(image, weights, f"{weights.size} positions and their weights in %", ax=grid)
    ax = figure.add_axes((0, 0, 1, 1), facecolor="none", xlim=(0, 1), ylim=(0, 1))
    ax.set_axis_off()
    texts = {0.07: " ".join(words), 0.3: "attention LSTM", 0.7: "language LSTM", 0.93: following}
    for y, text in texts.items():
        colour = BLUE if text.endswith("LSTM") else ORANGE
        box = {"boxstyle": "round,pad=0.5", "fc": "white", "ec": colour}
        ax.text(0.82, y, text, ha="center", va="center", bbox=box)
    upwards = [
        ((0.82, low), (0.82, high)) for low, high in ((0.12, 0.25), (0.35, 0.65), (0.75, 0.88))
    ]
    for start, end in [*upwards, ((0.72, 0.3), (0.48, 0.3)), ((0.48, 0.7), (0.72, 0.7))]:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.5})
    ax.text(0.6, 0.32, "the query,\ncompared with all keys", ha="center", va="bottom", fontsize=9)
    ax.text(0.6, 0.72, "the weighted mean\nof all values", ha="center", va="bottom", fontsize=9)
    return ax
