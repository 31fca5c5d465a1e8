"""Figures shared by the notebooks.

Each function takes data and an optional `ax` (those of several images or panels make their own),
and returns the axes.
"""

import textwrap
from itertools import islice

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea, VPacker
from PIL import Image

from captioning.base.tokens import split_words
from captioning.data.images import attention_heatmap

BLUE, ORANGE, GREY, RED = "#2a6f97", "#e07a3f", "#8d99ae", "#c1121f"
COLOURS = (BLUE, ORANGE, GREY, "black")
SIDE = 320  # of a photograph, in pixels


def image_grid(images, titles=None, columns=4, width=3.0, wrap=30):
    """Images (PIL or arrays) in rows of `columns`, each with a title below it.

    width: of a column in inches. wrap: the longest line of a title in characters.
    """
    texts = [
        "\n".join(textwrap.fill(line, wrap) for line in title.split("\n"))
        for title in titles or [""] * len(images)
    ]
    lines = max(text.count("\n") + 1 for text in texts)
    axes = _image_axes(images, 0.15 * lines + 0.2, columns, width)
    for ax, text in zip(axes.flat, texts, strict=False):
        ax.set_title(text, y=0, va="top", pad=-6, fontsize=9)
    return axes


def _image_axes(images, below, columns, width):
    """Images in rows of `columns`, each `width` inches wide with `below` inches for text below it.

    The images of a row end at the same height.
    """
    arrays = [np.asarray(image) for image in images]
    inner = width - 0.2  # inches, the width of an image
    ratios = [inner * len(array) / array.shape[1] for array in arrays]
    highs = [max(ratios[i : i + columns]) for i in range(0, len(arrays), columns)]  # of the rows
    total = sum(highs) + len(highs) * below
    side = 0.1 / (columns * width)  # the margins left and right are parts of the figure
    margins = {"left": side, "right": 1 - side, "wspace": 0.2 / inner}
    margins |= {"top": 1, "bottom": below / total, "hspace": below / np.mean(highs)}
    margins["height_ratios"], size = highs, (columns * width, total)
    _, axes = plt.subplots(len(highs), columns, figsize=size, squeeze=False, gridspec_kw=margins)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, array in zip(axes.flat, arrays, strict=False):
        ax.imshow(array)
        ax.set_anchor("S")
    return axes


def caption_grid(
    images, predicted, actual, wrong, notes=None, wrong_words=None, columns=4, width=3.0, size=12
):
    """Images with the predicted caption large, and the actual one small and grey, below each.

    A wrong prediction has a red ✗ in front, and is red, as a whole or in its wrong words.

    predicted, actual: a caption per image. wrong: a bool per image. notes: another line per image.
    wrong_words: a collection of positions in `predicted[i].split()` per image; None: all of a
        wrong caption. size: of the font of the predicted captions, in points.
    """
    blocks = []
    for i, caption in enumerate(predicted):
        words = [(word, "black") for word in caption.split()]
        if wrong[i]:
            red = wrong_words[i] if wrong_words else range(len(words))
            words = [(word, RED if t in red else "black") for t, (word, _) in enumerate(words)]
            words.insert(0, ("✗", RED))
        block = _text_lines(words, width, size, weight="bold")
        block += _text_lines([(word, "dimgrey") for word in actual[i].split()], width, 0.75 * size)
        note = [(word, BLUE) for word in notes[i].split()] if notes else []
        block += _text_lines(note, width, 0.75 * size, style="italic")
        blocks.append(VPacker(children=block, pad=0, sep=0.25 * size))
    most = max(len(block.get_children()) for block in blocks)
    axes = _image_axes(images, most * size / 55 + 0.2, columns, width)
    place = {"xycoords": "axes fraction", "boxcoords": "offset points", "box_alignment": (0, 1)}
    for ax, block in zip(axes.flat, blocks, strict=False):
        ax.add_artist(AnnotationBbox(block, (0, 0), (0, -6), frameon=False, pad=0, **place))
    return axes


def _text_lines(words, width, size, **style):
    """Lines of (word, colour) for text of `width` inches in a font of `size` points."""
    character = 0.68 if style.get("weight") == "bold" else 0.6  # widths, of the font's size
    characters = int((width - 0.2) * 72 / (character * size))
    text, words, lines = " ".join(word for word, _ in words), iter(words), []
    for line in textwrap.wrap(text, characters, break_long_words=False, break_on_hyphens=False):
        areas = [
            TextArea(word, textprops={"color": colour, "size": size} | style)
            for word, colour in islice(words, len(line.split()))
        ]
        lines.append(HPacker(children=areas, pad=0, sep=0.3 * size, align="baseline"))
    return lines


def bars(counts: dict, ax=None, xlabel="", ylabel=""):
    """One vertical bar per key of `counts`."""
    ax = ax or plt.subplots(figsize=(6, 3), layout="constrained")[1]
    ax.bar([str(name) for name in counts], list(counts.values()), color=BLUE)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def curves(series: dict, ax=None, xlabel="", ylabel=""):
    """One line per entry of `series` (at most four): name -> values, over 1, 2, 3 ..."""
    ax = ax or plt.subplots(figsize=(6, 3), layout="constrained")[1]
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        ax.plot(range(1, len(values) + 1), values, "o-", ms=3, color=colour, label=name)
    if len(series) > 1:
        ax.legend(frameon=False)
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
