"""Where a model looks: attention as a colour and a grid over images.

attention_overlay(image, words, maps, notes)
attention_on_photograph("photo.jpg", caption, maps)
weight_grid(image, weights)                             # with the weights in percent
show_right_scene(caption_scenes(model, "synthetic", 40))    # scenes have known boxes
"""

from random import Random
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke
from PIL import Image, ImageFilter

from captioning.base.tokens import split_words
from captioning.data.images import centre_crop
from captioning.figures.plots import BLUE, GREY, ORANGE, SIDE
from captioning.scenes.attention_on_things import attention_on_things, box_share, named_things
from captioning.scenes.drawing import render
from captioning.scenes.scene import Scene, random_scene

MOST = 3  # times the mean attention: the strongest colour


def add_overlay(ax, strength, size, colour=ORANGE, lines="white"):
    """Colour the positions of a map (H, W) over an image of `size`, and draw the grid.

    strength: from 0, no colour, to 1.
    """
    width, height = size
    overlay = np.empty((*strength.shape, 4))
    overlay[..., :3] = to_rgb(colour)
    overlay[..., 3] = 0.9 * strength
    ax.imshow(overlay, extent=(0, width, height, 0), interpolation="nearest")
    ax.hlines(np.linspace(0, height, len(strength) + 1), 0, width, color=lines, lw=0.7)
    ax.vlines(np.linspace(0, width, strength.shape[1] + 1), 0, height, color=lines, lw=0.7)
    ax.set(xlim=(0, width), ylim=(height, 0))


def attention_overlay(image, words, strengths, notes, boxes=None):
    """An image, and once more for each of several words, with the attention as a colour.

    strengths: (words, H, W) from 0, no colour, to 1. notes: a text per word, printed after it.
    boxes: {place of a word: (x, y, width, height)}, rectangles in pixels of the image.
    """
    rows = -(-(len(words) + 1) // 3)
    size = (9.3, rows * (3.1 * image.height / image.width + 0.4))
    axes = plt.subplots(rows, 3, figsize=size, squeeze=False, layout="constrained")[1].ravel()
    for ax in axes:
        ax.set_axis_off()
    axes[0].imshow(image, interpolation="bicubic")
    axes[0].set_title("the image", fontsize=13, loc="left")
    grey = image.convert("L").convert("RGB").filter(ImageFilter.GaussianBlur(0.006 * image.width))
    pale = Image.blend(grey, Image.new("RGB", image.size, "white"), 0.5)
    for ax, word, strength, note in zip(axes[1:], words, strengths, notes, strict=False):
        ax.imshow(pale, extent=(0, image.width, image.height, 0), interpolation="bicubic")
        add_overlay(ax, strength, image.size)
        ax.set_title(f"{word}: {note}", fontsize=13, loc="left")
    for place, (x, y, *size) in (boxes or {}).items():
        axes[place + 1].add_patch(plt.Rectangle((x, y), *size, fill=False, ec=BLUE, lw=3))
    return axes


def attention_on_photograph(path, caption, maps):
    """The attention at two words of a photograph's caption: where it differs most from the mean.

    Positions have a colour if they have more attention than in the mean over all words. The note
    is the share of the attention that they have, here and on average over the words.
    """
    mean = maps.mean(0)
    more = np.clip((maps / mean - 1) / (MOST - 1), 0, 1)
    found = sorted(np.argsort(-(maps / mean).max((1, 2)))[:2].tolist())
    names, notes = split_words(caption), []
    for t in found:
        coloured = more[t] > 0
        notes.append(f"{maps[t][coloured].sum():.0%} (average {mean[coloured].sum():.0%})")
    return attention_overlay(centre_crop(path, SIDE), [names[t] for t in found], more[found], notes)


# ---------------------------------------------------------------------------- weights in percent


def weight_grid(image, weights, title="", boxes=(), ax=None):
    """Attention weights (rows, columns) over an image (PIL): a grid, and the weights in percent.

    The more weight a position has, the more orange it is; weights below 1 % have no number.
    boxes: (x, y, width, height) in pixels of the image.
    """
    ax = ax or plt.subplots(figsize=(4, 4.2), layout="constrained")[1]
    width, height = image.size
    rows, columns = weights.shape
    pale = Image.blend(image, Image.new("RGB", image.size, "white"), 0.35)
    ax.imshow(pale, extent=(0, width, height, 0))
    add_overlay(ax, weights / weights.max(), image.size, lines=GREY)
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


# ---------------------------------------------------------------------------- scenes


class CaptionedScene(NamedTuple):
    """A random scene with its caption and the attention at each word, (words, H, W)."""

    scene: Scene
    image: Image.Image
    caption: str
    maps: np.ndarray


def caption_scenes(model, dataset, count):
    """Random scenes, captioned by a model with attention; none if it was not trained on scenes.

    model: None if there is none. dataset: that of its training.
    """
    if model is None or dataset != "synthetic":
        print("There is no model with attention for synthetic scenes, so they are skipped.")
        return []
    scenes = [random_scene(Random(f"attention {number}")) for number in range(count)]
    images = [render(scene) for scene in scenes]
    captions, maps = model.caption(images, return_attention=True)
    rows = zip(scenes, images, captions, maps, strict=True)
    return [CaptionedScene(*row) for row in rows]


def print_shares(captioned):
    """Print how much attention falls on the boxes of the objects that the captions name."""
    found = [
        shares
        for example in captioned
        for shares in attention_on_things(example.caption, example.maps, example.scene)
    ]
    if not found:
        return
    attention, area = np.mean(found, 0)
    print(f"{len(found)} objects are named by their noun and colour")
    print(f"area of their boxes: {area:.1%} of the image on average")
    print(f"attention within:    {attention:.1%}")


def show_right_scene(captioned):
    """The attention in the scene of two objects with the shortest caption that names both."""
    right = [
        example
        for example in captioned
        if len(example.scene.things) == 2 == len(named_things(example.caption, example.scene))
    ]
    return attention_on_scene(min(right, key=lambda x: len(x.caption))) if right else None


def attention_on_scene(example):
    """The attention at each noun of a scene's caption, the object's box, and the share in it.

    The colour is strongest at the position with the largest weight.
    """
    named = named_things(example.caption, example.scene)
    words, maps = split_words(example.caption), example.maps[sorted(named)]
    notes, boxes = [], {}
    for place, (t, thing) in enumerate(sorted(named.items())):
        notes.append(f"{box_share(example.maps[t], thing):.0%} in the box")
        boxes[place] = (thing.x, thing.y, thing.side, thing.side)
    names = [words[t] for t in sorted(named)]
    return attention_overlay(example.image, names, maps / maps.max(), notes, boxes)
