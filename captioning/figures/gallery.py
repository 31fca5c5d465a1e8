"""The photographs of result_show with their captions, in large type.

photographs = caption_photographs(CaptionModel.pretrained())    # the highest confidence first
show_photographs(photographs[:12])
attention_strip(photographs[0])
show_versions(photographs[0], {"epoch 1": "a group of people", "epoch 12": "a cow"})
"""

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image

from captioning.base.tokens import split_words
from captioning.data.coco import CocoCaptions
from captioning.data.images import centre_crop
from captioning.figures.attention import add_overlay
from captioning.figures.plots import SIDE

INK, FADED, GREEN, RED, GLOW = "#1b1f24", "#6b7280", "#2e7d4f", "#b3452c", "#ff8c1a"
WIDTH, GAP = 12.6, 0.2  # of a figure and between its pictures, in inches
VERDICTS = {True: ("✓ right", GREEN), False: ("✗ wrong", RED), None: ("not judged", FADED)}


def wrap(text, width, size, weight="normal"):
    """The lines of a text that are at most `width` inches wide in a font of `size` points."""
    font, lines = FontProperties(size=size, weight=weight), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        points, _, _ = text_to_path.get_text_width_height_descent(longer, font, False)
        if lines[-1] and points > 70 * width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def typeset(paragraphs, width):
    """Paragraphs (text, size in points, colour, weight) as lines, and their height in inches.

    A line is a text, the distance of its baseline from the top in inches, and its style.
    """
    lines, y = [], 0.0
    for text, size, colour, weight in paragraphs:
        for line in wrap(text, width, size, weight):
            y += 1.3 * size / 72
            lines.append((line, y, {"size": size, "color": colour, "weight": weight}))
        y += 0.06
    return lines, y


def pictures(images, blocks, columns, side, beside=None):
    """Square images in rows, each with a block of paragraphs below it, or to its right.

    side: of an image in inches. beside: the width of the text to the right of an image; None: it
    is below. Returns the axes of the images.
    """
    texts, heights = zip(*(typeset(block, beside or side) for block in blocks), strict=True)
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    below = [max(heights[i] for i in row) - (side if beside else -0.05) for row in rows]
    below = [max(space, 0) for space in below]
    total = sum(below) + len(rows) * (side + GAP)
    figure, axes, top = plt.figure(figsize=(WIDTH, total)), [], 0.0
    for row, space in zip(rows, below, strict=True):
        for column, i in enumerate(row):
            x = column * (side + (beside or 0) + GAP)
            corner = x / WIDTH, 1 - (top + side) / total
            axes.append(figure.add_axes((*corner, side / WIDTH, side / total)))
            width, height = images[i].size
            axes[-1].imshow(images[i], extent=(0, width, height, 0))
            axes[-1].set_axis_off()
            left, start = (x + side + 0.4, top) if beside else (x, top + side + 0.05)
            for line, y, style in texts[i]:
                figure.text(left / WIDTH, 1 - (start + y) / total, line, **style)
        top += side + space + GAP
    return axes


def show_versions(photograph, captions, side=2.8):
    """A photograph with several captions to its right: {label: caption}."""
    block = []
    for label, caption in captions.items():
        block += [(label, 12, FADED, "normal"), (caption, 16, INK, "bold"), ("", 5, INK, "normal")]
    return pictures([photograph.image], [block], 1, side, WIDTH - side - 0.4)


def attention_strip(photograph, strongest=4.0):
    """The photograph, and once more for each predicted word, coloured by its attention: two rows.

    The colour and the number are the attention of a position as a multiple of its mean over the
    words of the caption: no colour for 1 and less, the strongest from `strongest` on.
    """
    image, maps = photograph.image, photograph.attention
    factors = maps / maps.mean(0)  # (words, H, W)
    words = split_words(photograph.predicted)
    blocks = [[("the photograph", 15, FADED, "normal")]]
    for word, factor in zip(words, factors, strict=True):
        peak = f"up to {factor.max():.1f} ×"
        blocks.append([(word, 15, INK, "bold"), (peak, 12, FADED, "normal")])
    grey = Image.blend(image.convert("L").convert("RGB"), image, 0.25)
    pale = Image.blend(grey, Image.new("RGB", image.size, "white"), 0.3)
    columns = -(-len(blocks) // 2)
    side = (WIDTH + GAP) / columns - GAP
    axes = pictures([image, *[pale] * len(words)], blocks, columns, side)
    for ax, factor in zip(axes[1:], factors, strict=True):
        strength = np.clip((factor - 1) / (strongest - 1), 0, 1)
        add_overlay(ax, strength, image.size, GLOW)
    return axes


# ---------------------------------------------------------------------------- photographs


class Photograph(NamedTuple):
    """A photograph with its captions."""

    name: str  # of the file
    image: Image.Image  # the square in its middle, which the model sees
    predicted: str
    actual: str
    confidence: float
    attention: np.ndarray  # (words, H, W)
    verdict: bool | None  # whether every content word is right; None: not judged


def caption_photographs(model, folder="photos") -> list[Photograph]:
    """The photographs of a folder, captioned with a beam of 5, the highest confidence first.

    The folder has the actual captions in captions.json and the verdicts in judgements.json.
    """
    data = CocoCaptions(folder, Path(folder, "captions.json"))
    judged = json.loads(Path(folder, "judgements.json").read_text(encoding="utf-8"))
    options = {"beam_size": 5, "return_attention": True, "return_confidence": True}
    captioned = zip(data.paths, data.captions, *model.caption(data.paths, **options), strict=True)
    found = []
    for path, actual, predicted, attention, confidence in captioned:
        name = Path(path).name
        verdict = judged.get(name, {}).get(predicted)
        known = predicted, actual[0], confidence, attention, verdict
        found.append(Photograph(name, centre_crop(path, SIDE), *known))
    return sorted(found, key=lambda photograph: -photograph.confidence)


def show_photographs(photographs, columns=4):
    """Photographs with the predicted caption, its verdict, its confidence and an actual caption."""
    blocks = []
    for photograph in photographs:
        verdict, colour = VERDICTS[photograph.verdict]
        line = f"{verdict} · confidence {photograph.confidence:.2f}"
        actual = f"actual: {photograph.actual}", 12, FADED, "normal"
        blocks.append(
            [(photograph.predicted, 15, INK, "bold"), (line, 12, colour, "normal"), actual]
        )
    side = (WIDTH + GAP) / columns - GAP
    return pictures([photograph.image for photograph in photographs], blocks, columns, side)
