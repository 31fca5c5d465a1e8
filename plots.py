"""Figures shared by the notebooks.

Each function takes data and an optional `ax` (`image_grid` makes its own), and returns the axes.
"""

import textwrap

import matplotlib.pyplot as plt
from PIL import Image

BLUE, ORANGE, GREY = "#2a6f97", "#e07a3f", "#8d99ae"
COLOURS = (BLUE, ORANGE, GREY, "black")


def image_grid(images, titles=None, columns=4, width=3.0, wrap=30, colours=None):
    """Images (PIL or arrays) in rows of `columns`, each with a title below it."""
    rows = -(-len(images) // columns)
    lines = max(text_block(title, wrap).count("\n") + 1 for title in titles or [""])
    height = rows * (width + 0.19 * lines + 0.25)
    fig, axes = plt.subplots(
        rows, columns, figsize=(columns * width, height), squeeze=False, layout="constrained"
    )
    for index, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if index < len(images):
            ax.imshow(images[index])
            if titles:
                colour = colours[index] if colours else "black"
                text = text_block(titles[index], wrap)
                ax.set_title(text, y=0, va="top", pad=-6, fontsize=9, color=colour)
    return axes


def caption_grid(images, predicted, actual, wrong, notes=None, **options):
    """Images with a predicted and an actual caption below each; wrong predictions are red, with ✗.

    predicted, actual: a caption per image. wrong: a bool per image. notes: another line per image.
    options: of `image_grid`.
    """
    texts = [
        f"{'✗ ' if bad else ''}predicted: {caption}\n\nactual: {other}"
        for caption, other, bad in zip(predicted, actual, wrong, strict=True)
    ]
    if notes:
        texts = [f"{text}\n\n{note}" for text, note in zip(texts, notes, strict=True)]
    colours = ["firebrick" if bad else "black" for bad in wrong]
    return image_grid(images, texts, colours=colours, **options)


def text_block(text, wrap):
    """Wrap each line at `wrap` characters."""
    return "\n".join(textwrap.fill(line, wrap) for line in text.split("\n"))


def bars(counts: dict, ax=None, xlabel="", ylabel=""):
    """One vertical bar per key of `counts`."""
    ax = ax or plt.subplots(figsize=(6, 3), layout="constrained")[1]
    ax.bar([str(name) for name in counts], list(counts.values()), color=BLUE)
    return style_axes(ax, xlabel, ylabel)


def curves(series: dict, ax=None, xlabel="", ylabel="", x=None):
    """One line per entry of `series` (at most four): name -> values, over 1, 2, 3 ... or `x`."""
    ax = ax or plt.subplots(figsize=(6, 3), layout="constrained")[1]
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        ax.plot(x or range(1, len(values) + 1), values, "o-", ms=3, color=colour, label=name)
    if len(series) > 1:
        ax.legend(frameon=False)
    return style_axes(ax, xlabel, ylabel)


def style_axes(ax, xlabel, ylabel):
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def token_table(rows: dict, ax=None):
    """One row per entry of `rows`, name -> tokens, with a box per token ("" leaves a gap)."""
    width = max(map(len, rows.values()))
    ax = ax or plt.subplots(figsize=(0.9 * width + 1, 0.55 * len(rows) + 0.2))[1]
    for row, (name, tokens) in enumerate(rows.items()):
        ax.text(-0.65, -row, name, ha="right", va="center", weight="bold")
        for column, token in enumerate(tokens):
            if token:
                box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": (BLUE, ORANGE)[row % 2]}
                ax.text(column, -row, token, ha="center", va="center", fontsize=9, bbox=box)
    ax.set(xlim=(-1.5, width - 0.4), ylim=(0.6 - len(rows), 0.6))
    ax.set_axis_off()
    return ax


def padded_table(captions, losses, ax=None):
    """Captions as rows of tokens, filled up with grey `<pad>` to the longest one.

    captions: lists of tokens. losses: lists with the -log p of each token, written below it.
    """
    width = max(map(len, captions))
    rows = {}
    for number, (tokens, values) in enumerate(zip(captions, losses, strict=True), start=1):
        rows[f"caption {number}"] = [*tokens, *["<pad>"] * (width - len(tokens))]
        rows[f"−log p {number}"] = [f"{value:.2f}" for value in values]
    ax = token_table(rows, ax)
    for text in ax.texts:
        if text.get_text() == "<pad>":
            text.get_bbox_patch().set(facecolor="#e9ecef", edgecolor=GREY)
            text.set_color(GREY)
    return ax


def attention_maps(image, caption, maps, columns=6, width=1.8):
    """The attention of each word of a caption, laid over the image (PIL): (words, H, W).

    The brightness of a pixel is the attention weight of its position, relative to the largest.
    """
    words = caption.split()
    titles = [*words, "the image"][: len(maps) + 1]
    shaded = [_shade(image, weights) for weights in maps]
    return image_grid([*shaded, image], titles, columns, width)


def _shade(image, weights):
    """The image, darkened where `weights` (H, W) are small, interpolated to its size."""
    weights = Image.fromarray((255 * weights / weights.max()).astype("uint8"))
    weights = weights.resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(image, image.point(lambda value: value // 5), weights)
