"""Pictures of a caption: the probabilities of its words, and what the model reads at each.

caption_with_probabilities(model, "photo.jpg")
attention_overlay(image, words, maps, notes)
attention_on_photograph("photo.jpg", caption, maps)
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageFilter

from captioning.base.tokens import split_words
from captioning.data.images import centre_crop
from captioning.figures.inference import image_beside
from captioning.figures.plots import BLUE, ORANGE, caption_grid

SIDE = 320  # of a photograph, in pixels
MOST = 3  # times the mean attention: the strongest colour


def caption_with_probabilities(model, path, beam_size=5):
    """A photograph, and beside it the words of its caption with their probabilities."""
    decoded = model.generate(model.preprocess([path]), beam_size=beam_size)
    words = split_words(model.decode(decoded)[0][0])
    probabilities = decoded.log_probs[0, 0, : len(words)].exp().tolist()
    ax = image_beside(centre_crop(path, SIDE), width=4.6, height=3.05)
    places = range(len(words))
    ax.barh(places, probabilities, color=BLUE)
    for place, probability in zip(places, probabilities, strict=True):
        ax.text(probability + 0.02, place, f"{probability:.0%}", va="center", fontsize=9)
    ax.set_yticks(places, words, fontsize=12)
    ax.set(xlim=(0, 1.1), xticks=())
    ax.set_title("caption, and the probability of each word", fontsize=11, loc="left")
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    return ax


def attention_overlay(image, words, strengths, notes, boxes=None, columns=3, side=3.1):
    """An image, and once more for each of several words, with the attention as a colour.

    strengths: (words, H, W) from 0, no colour, to 1. notes: a text per word, printed after it.
    boxes: {place of a word: (x, y, width, height)}, rectangles in pixels of the image.
    """
    rows = -(-(len(words) + 1) // columns)
    size = (columns * side, rows * (side * image.height / image.width + 0.4))
    axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")[1].ravel()
    for ax in axes:
        ax.set_axis_off()
    axes[0].imshow(image, interpolation="bicubic")
    axes[0].set_title("the image", fontsize=13, loc="left")
    grey = image.convert("L").convert("RGB").filter(ImageFilter.GaussianBlur(0.004 * image.width))
    pale = Image.blend(grey, Image.new("RGB", image.size, "white"), 0.5)
    for ax, word, strength, note in zip(axes[1:], words, strengths, notes, strict=False):
        ax.imshow(pale, interpolation="bicubic")
        add_overlay(ax, strength, image.size)
        ax.set_title(f"{word}: {note}", fontsize=13, loc="left")
    for place, (x, y, *size) in (boxes or {}).items():
        axes[place + 1].add_patch(plt.Rectangle((x, y), *size, fill=False, ec=BLUE, lw=3))
    return axes


def add_overlay(ax, strength, size):
    """Colour the positions of a map (H, W) over an image of `size`, and draw the grid."""
    height, width = strength.shape
    left, right, bottom, top = extent = (-0.5, size[0] - 0.5, size[1] - 0.5, -0.5)
    overlay = np.empty((height, width, 4))
    overlay[..., :3] = to_rgb(ORANGE)
    overlay[..., 3] = 0.9 * strength
    ax.imshow(overlay, extent=extent, interpolation="nearest")
    grid = {"color": "white", "lw": 0.8}
    ax.hlines(np.linspace(top, bottom, height + 1), left, right, **grid)
    ax.vlines(np.linspace(left, right, width + 1), top, bottom, **grid)
    ax.set(xlim=(left, right), ylim=(bottom, top))


def attention_on_photograph(path, caption, maps, words=2):
    """The attention at the words of a photograph's caption at which it differs most from the mean.

    Positions have a colour if they have more attention than in the mean over all words. The note
    is the share of the attention that they have, and in parentheses their share in the mean.
    """
    mean = maps.mean(0)
    more = np.clip((maps / mean - 1) / (MOST - 1), 0, 1)
    found = sorted(np.argsort(-(maps / mean).max((1, 2)))[:words].tolist())
    names, notes = split_words(caption), []
    for t in found:
        coloured = more[t] > 0
        notes.append(f"{maps[t][coloured].sum():.0%} (mean: {mean[coloured].sum():.0%})")
    return attention_overlay(centre_crop(path, SIDE), [names[t] for t in found], more[found], notes)


def show_captions(paths, captions, longer, confidence):
    """Photographs with their captions, longer captions, and the confidence below them."""
    return caption_grid(
        [centre_crop(path, SIDE) for path in paths],
        captions,
        [f"longer: {caption}" for caption in longer],
        [False] * len(paths),
        [f"confidence {value:.2f}" for value in confidence],
        columns=len(paths),
        width=3.2,
    )
