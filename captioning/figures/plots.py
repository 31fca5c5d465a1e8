"""Figures shared by the notebooks.

Each function takes data and an optional `ax` (those of several images or panels make their own),
and returns the axes.
"""

import textwrap
from collections import Counter
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker
from PIL import Image

from captioning.data.images import attention_mask

BLUE, ORANGE, GREY, RED = "#2a6f97", "#e07a3f", "#8d99ae", "#c1121f"
COLOURS = (BLUE, ORANGE, GREY, "black")
TINTS = ("#a9d3ea", "#f6c9a8", "#b7dfb2", "#d8c3e8", "#f3e29b")  # behind black text


def image_grid(images, titles=None, columns=4, width=3.0, wrap=30):
    """Images (PIL or arrays) in rows of `columns`, each with a title below it."""
    lines = max(text_block(title, wrap).count("\n") + 1 for title in titles or [""])
    axes = _grid(len(images), columns, width, width + 0.19 * lines + 0.25)
    for index, image in enumerate(images):
        axes.flat[index].imshow(image)
        if titles:
            text = text_block(titles[index], wrap)
            axes.flat[index].set_title(text, y=0, va="top", pad=-6, fontsize=9)
    return axes


def _grid(count, columns, width, height):
    """Axes in rows of `columns`, as many as needed, each `width` x `height` inches, not drawn."""
    rows = -(-count // columns)
    size = (columns * width, rows * height)
    axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")[1]
    for ax in axes.flat:
        ax.set_axis_off()
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
        red = wrong_words[i] if wrong_words else range(len(caption.split()))
        words = [
            (word, RED if wrong[i] and t in red else "black")
            for t, word in enumerate(caption.split())
        ]
        words = [("✗", RED)] * bool(wrong[i]) + words
        block = _text_lines(words, width, size, weight="bold")
        block += _text_lines([(word, "dimgrey") for word in actual[i].split()], width, 0.75 * size)
        if notes and notes[i]:
            note = [(word, BLUE) for word in notes[i].split()]
            block += _text_lines(note, width, 0.75 * size, style="italic")
        blocks.append(block)
    axes = _captioned_axes(images, [len(block) * size / 55 for block in blocks], columns, width)
    for ax, image, block in zip(axes.flat, images, blocks, strict=False):
        ax.imshow(image)
        box = VPacker(children=block, pad=0, sep=0.25 * size)
        ax.add_artist(
            AnchoredOffsetbox(
                "upper left",
                child=box,
                frameon=False,
                pad=0,
                borderpad=0.4,
                bbox_to_anchor=(0, 0),
                bbox_transform=ax.transAxes,
            )
        )
    return axes


def _captioned_axes(images, below, columns, width):
    """Axes in rows of `columns`, with `below[i]` inches for text below image i.

    The images of a row end at the same height, and a row is as high as its content.
    """
    inner = width - 0.2  # inches, the width of an image
    sizes = [Image.fromarray(x).size if hasattr(x, "shape") else x.size for x in images]
    heights = [inner * height / width for width, height in sizes]
    rows = [slice(i, i + columns) for i in range(0, len(images), columns)]
    high = [(max(heights[row]), max(below[row]) + 0.2) for row in rows]
    total = sum(map(sum, high))
    fig, axes = plt.subplots(len(rows), columns, figsize=(columns * width, total), squeeze=False)
    top = total
    for row, (image, text) in zip(axes, high, strict=True):
        for column, ax in enumerate(row):
            left = (column * width + 0.1) / (columns * width)
            ax.set_position((left, (top - image) / total, inner / (columns * width), image / total))
            ax.set(anchor="S")
            ax.set_axis_off()
        top -= image + text
    return axes


def _text_lines(words, width, size, **style):
    """Lines of (word, colour) for text of `width` inches in a font of `size` points."""
    character = 0.68 if style.get("weight") == "bold" else 0.6  # widths, of the font's size
    characters = int((width - 0.2) * 72 / (character * size))
    wrapped = textwrap.wrap(" ".join(word for word, _ in words), characters)
    words, lines = iter(words), []
    for line in wrapped:
        row = [next(words) for _ in line.split()]
        areas = [
            TextArea(word, textprops={"color": colour, "size": size} | style)
            for word, colour in row
        ]
        lines.append(HPacker(children=areas, pad=0, sep=0.3 * size, align="baseline"))
    return lines


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


def attention_maps(image, caption, maps, columns=6, width=1.8, boxes=None):
    """The attention of each word of a caption, laid over the image (PIL): (words, H, W).

    The brightness of a pixel is the attention weight of its position, relative to the largest.

    boxes: {position of a word: (x, y, width, height)}, rectangles in pixels of the image.
    """
    words = caption.split()
    titles = [*words, "the image"][: len(maps) + 1]
    dark = image.point(lambda value: value // 5)
    masks = [attention_mask(weights, image.size) for weights in maps]
    shaded = [Image.composite(image, dark, mask) for mask in masks]
    axes = image_grid([*shaded, image], titles, columns, width)
    for t, (x, y, *size) in (boxes or {}).items():
        axes.flat[t].add_patch(plt.Rectangle((x, y), *size, fill=False, ec=ORANGE, lw=2))
    return axes


def next_word_bars(steps, marked, titles, dots=None, columns=5, width=2.3):
    """The probabilities of the next word at each step, with one word of each step marked.

    steps: a dict word -> probability per step. marked: the word per step whose bar is orange.
    dots: a dict word -> number per step, drawn as black dots beside the bars.
    """
    size = max(map(len, steps))
    axes = _grid(len(steps), columns, width, 0.2 * size + 0.55)
    for i, (ax, step) in enumerate(zip(axes.flat, steps, strict=False)):
        names = sorted(step, key=step.get)
        colours = [ORANGE if name == marked[i] else BLUE for name in names]
        ax.barh(names, [step[name] for name in names], color=colours)
        if dots:
            ax.plot([dots[i].get(name, 0) for name in names], names, "k.", clip_on=False)
        ax.set_axis_on()
        ax.set(xlim=(0, 1), xticks=(0, 1))
        ax.set_xlabel("probability", fontsize=8, labelpad=-6)
        ax.set_title(titles[i], fontsize=9)
        ax.tick_params(labelsize=8, length=0)
        ax.spines[["top", "right"]].set_visible(False)
    return axes


class Branch(NamedTuple):
    """A prefix that a beam search has considered."""

    word: str  # its last word
    log_prob: float  # of the prefix, in nats
    parent: int  # position of the prefix without that word among the branches of the step before
    kept: bool  # whether it was among the best of its step
    score: float | None = None  # if it is a complete caption


def beam_tree(steps, ax=None):
    """The branches of a beam search, a row per step: lists of `Branch`, the best ones first.

    Dropped branches are grey, complete captions have their score, and the caption with the highest
    one is orange. Dashed lines are the path of greedy decoding, as far as the beam contains it.
    """
    width = max(map(len, steps))
    ax = ax or plt.subplots(figsize=(1.9 * width, 0.42 * len(steps)), layout="constrained")[1]
    ends = [
        (branch.score, t, i)
        for t, step in enumerate(steps)
        for i, branch in enumerate(step)
        if branch.score is not None
    ]
    best, (_, last, i) = set(), max(ends, default=(0, -1, 0))
    for t in range(last, -1, -1):
        best.add((t, i))
        i = steps[t][i].parent
    greedy = 0  # its position in the step before
    for t, step in enumerate(steps):
        follows = [i for i, branch in enumerate(step) if t and branch.parent == greedy]
        greedy = min(follows, default=None) if t else 0
        for i, branch in enumerate(step):
            colour = ORANGE if (t, i) in best else BLUE if branch.kept else "silver"
            if t:
                style = "--" if i == greedy else "-"
                ax.plot([branch.parent, i], [0.8 - t, 0.2 - t], style, color=colour, zorder=0)
            text = f"{branch.word} {branch.log_prob:.2f}"
            if branch.score is not None:
                text += f", score {branch.score:.3f}"
            box = {"boxstyle": "round", "fc": "white", "ec": colour}
            ax.text(
                i,
                -t,
                text,
                ha="center",
                va="center",
                fontsize=8,
                bbox=box,
                color="black" if branch.kept else "grey",
            )
    ax.set(xlim=(-0.5, width - 0.5), ylim=(0.5 - len(steps), 0.5))
    ax.set_axis_off()
    return ax


def matched_by(words, references, n):
    """The reference that each n-gram of a caption counts as a match of, or None: a list.

    words: of the caption. references: lists of words. An n-gram that occurs several times is
    matched at most as often as it occurs in one reference, as in BLEU.
    """

    def ngrams(words):
        return list(zip(*(words[i:] for i in range(n)), strict=False))

    counts, seen, found = [Counter(ngrams(reference)) for reference in references], Counter(), []
    for gram in ngrams(words):
        seen[gram] += 1
        enough = (r for r, count in enumerate(counts) if count[gram] >= seen[gram])
        found.append(next(enough, None))
    return found


def ngram_matches(words, references, max_n=4, ax=None):
    """The n-grams of a caption as overlapping bars, n = 1 .. max_n from top to bottom.

    The colour and the number of a bar are those of the first reference that contains the n-gram;
    n-grams without a match are white. words, references: as in `matched_by`, at most five of these.
    """
    rows = max_n * (max_n + 1) // 2
    ax = ax or plt.subplots(figsize=(0.95 * len(words) + 1, 0.3 * rows + 0.3))[1]
    y = 0
    for n in range(1, max_n + 1):
        found = matched_by(words, references, n)
        share = f"n = {n}:  {sum(r is not None for r in found)} of {len(found)}"
        ax.text(-0.1, y - n / 2, share, ha="right", va="center", weight="bold")
        for start, reference in enumerate(found):
            colour, number = (
                ("white", "") if reference is None else (TINTS[reference], reference + 1)
            )
            low = y - 1 - start % n  # n-grams that overlap are drawn one below the other
            ax.add_patch(
                plt.Rectangle((start + 0.03, low + 0.1), n - 0.06, 0.8, fc=colour, ec=GREY)
            )
            text = " ".join(words[start : start + n])
            ax.text(start + n / 2, low + 0.5, text, ha="center", va="center", fontsize=7.5)
            ax.text(start + n - 0.05, low + 0.85, number, ha="right", va="top", fontsize=6)
        y -= n + 0.4
    ax.set(xlim=(-1.6, len(words)), ylim=(y, 0.1))
    ax.set_axis_off()
    return ax
