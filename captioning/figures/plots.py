"""Figures shared by the notebooks.

Each function takes data and returns the axes.
"""

import matplotlib.pyplot as plt
from PIL import Image

from captioning.base.tokens import split_words
from captioning.data.images import attention_heatmap
from captioning.figures.image_text import image_grid

BLUE, ORANGE, GREY = "#2a6f97", "#e07a3f", "#8d99ae"
COLOURS = (BLUE, ORANGE, GREY, "black")
SIDE = 320  # of a photograph, in pixels


def bars(counts: dict, ax=None, xlabel="", ylabel=""):
    """One vertical bar per key of `counts`."""
    ax = ax or plt.subplots(figsize=(6, 3), layout="constrained")[1]
    ax.bar([str(name) for name in counts], list(counts.values()), color=BLUE)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def curves(series: dict, xlabel="", ylabel=""):
    """One line per entry of `series` (at most four): name -> values, over 1, 2, 3 ..."""
    ax = plt.subplots(figsize=(6, 3), layout="constrained")[1]
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        ax.plot(range(1, len(values) + 1), values, "o-", ms=3, color=colour, label=name)
    if len(series) > 1:
        ax.legend(frameon=False)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def token_table(rows: dict):
    """One row per entry of `rows`, name -> tokens, with a box per token ("" leaves a gap)."""
    width = max(map(len, rows.values()))
    ax = plt.subplots(figsize=(0.9 * width + 1, 0.55 * len(rows) + 0.2))[1]
    for row, (name, tokens) in enumerate(rows.items()):
        ax.text(-0.65, -row, name, ha="right", va="center", weight="bold")
        for column, token in enumerate(tokens):
            if token:
                box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": (BLUE, ORANGE)[row % 2]}
                ax.text(column, -row, token, ha="center", va="center", fontsize=9, bbox=box)
    ax.set(xlim=(-1.5, width - 0.4), ylim=(0.6 - len(rows), 0.6))
    ax.set_axis_off()
    return ax


def padded_table(captions, losses):
    """Captions as rows of tokens, filled up with grey `<pad>` to the longest one.

    captions: lists of tokens. losses: lists with the -log p of each token, written below it.
    """
    width = max(map(len, captions))
    rows = {}
    for number, (tokens, values) in enumerate(zip(captions, losses, strict=True), start=1):
        rows[f"caption {number}"] = [*tokens, *["<pad>"] * (width - len(tokens))]
        rows[f"−log p {number}"] = [f"{value:.2f}" for value in values]
    ax = token_table(rows)
    for text in ax.texts:
        if text.get_text() == "<pad>":
            text.get_bbox_patch().set(facecolor="#e9ecef", edgecolor=GREY)
            text.set_color(GREY)
    return ax


def attention_maps(image, caption, maps):
    """The attention of each word of a caption, laid over the image (PIL): (words, H, W).

    The brightness of a pixel is the attention weight of its position, relative to the largest.
    """
    dark = image.point(lambda value: value // 5)
    masks = [attention_heatmap(weights, image.size) for weights in maps]
    shaded = [Image.composite(image, dark, mask) for mask in masks]
    titles = [*split_words(caption), "the image"]
    return image_grid([*shaded, image], titles, columns=6, width=1.8)


def next_word_bars(steps, marked, titles, dots=None, columns=5, width=2.3):
    """The probabilities of the next word at each step, with one word of each step marked.

    steps: a dict word -> probability per step. marked: the word per step whose bar is orange.
    dots: a dict word -> number per step, drawn as black dots beside the bars.
    """
    rows = -(-len(steps) // columns)
    size = (columns * width, rows * (0.2 * max(map(len, steps)) + 0.55))
    axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")[1]
    for ax in axes.flat[len(steps) :]:
        ax.set_axis_off()
    for i, (ax, step) in enumerate(zip(axes.flat, steps, strict=False)):
        names = sorted(step, key=step.get)
        colours = [ORANGE if name == marked[i] else BLUE for name in names]
        ax.barh(names, [step[name] for name in names], color=colours)
        if dots:
            ax.plot([dots[i].get(name, 0) for name in names], names, "k.", clip_on=False)
        ax.set(xlim=(0, 1), xticks=(0, 1))
        ax.set_xlabel("probability", fontsize=8, labelpad=-6)
        ax.set_title(titles[i], fontsize=9)
        ax.tick_params(labelsize=8, length=0)
        ax.spines[["top", "right"]].set_visible(False)
    return axes
