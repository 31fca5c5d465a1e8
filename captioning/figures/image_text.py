"""Images with text below them, or to their right.

image_grid(images, ["a dog", "two lines\nof text"], columns=2)
pictures(images, [[Paragraph("a dog", 15, weight="bold"), Paragraph("by a person")]], 4, side=3.0)
"""

from collections.abc import Collection
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

INK, FADED, RED = "#1b1f24", "#6b7280", "#c1121f"
GAP = 0.2  # between the images, in inches
MARGIN = 0.4  # between an image and the text to its right, in inches


class Paragraph(NamedTuple):
    """Text in one font; lines that are too long are broken."""

    text: str
    size: float = 12  # of the font, in points
    colour: str = INK
    weight: str = "normal"
    red: Collection[int] = ()  # positions in text.split() of the words that are red


def image_grid(images, texts=None, columns=4, width=3.0, size=10):
    """Images (PIL or arrays) in rows of `columns`, each with a text below it.

    width: of a column in inches. size: of the font in points.
    """
    texts = texts or [""] * len(images)
    blocks = [[Paragraph(line, size) for line in text.split("\n")] for text in texts]
    return pictures(images, blocks, columns, width - GAP)


def pictures(images, blocks, columns, side, beside=None):
    """Images (PIL or arrays) in rows, each with a block of paragraphs below it, or to its right.

    side: the width of an image in inches. beside: the width of the text to the right of an image;
    None: it is below. Images of one row end at the same height. Returns the axes of the images.
    """
    arrays = [np.asarray(image) for image in images]
    highs = [side * len(array) / array.shape[1] for array in arrays]
    texts, heights = zip(*(typeset(block, beside or side) for block in blocks), strict=True)
    rows = [range(i, min(i + columns, len(arrays))) for i in range(0, len(arrays), columns)]
    talls = [max(highs[i] for i in row) for row in rows]
    needed = [max(heights[i] for i in row) for row in rows]
    spaces = [
        max(need - tall, 0) if beside else need for need, tall in zip(needed, talls, strict=True)
    ]
    step = side + (MARGIN + beside if beside else 0) + GAP
    width, total = columns * step - GAP, sum(talls) + sum(spaces) + (len(rows) - 1) * GAP
    figure, axes, top = plt.figure(figsize=(width, total)), [], 0.0
    for row, tall, space in zip(rows, talls, spaces, strict=True):
        for column, i in enumerate(row):
            x = column * step
            corner = x / width, 1 - (top + tall) / total
            axes.append(figure.add_axes((*corner, side / width, highs[i] / total)))
            extent = 0, arrays[i].shape[1], len(arrays[i]), 0
            axes[-1].imshow(arrays[i], extent=extent, interpolation="hanning")
            axes[-1].set_axis_off()
            left, start = (x + side + MARGIN, top) if beside else (x, top + tall)
            for text, indent, y, style in texts[i]:
                figure.text((left + indent) / width, 1 - (start + y) / total, text, **style)
        top += tall + space + GAP
    return np.array(axes, dtype=object)


def typeset(paragraphs, width):
    """The texts (text, x, y, style) of paragraphs in lines of `width` inches, and their height.

    x and y: of the left end of a baseline, in inches from the upper left corner.
    """
    texts, y = [], 0.05
    for paragraph in paragraphs:
        style = {"size": paragraph.size, "weight": paragraph.weight}
        for line in wrap(paragraph, width):
            x, y = 0.0, y + 1.3 * paragraph.size / 72
            for colour, words in groupby(line, itemgetter(1)):
                text = " ".join(word for word, _ in words)
                texts.append((text, x, y, {"color": colour, **style}))
                x += inches(f"{text} .", style) - inches(".", style)
        y += 0.06
    return texts, y


def wrap(paragraph, width):
    """The lines of a paragraph, at most `width` inches wide: lists of (word, colour)."""
    style = {"size": paragraph.size, "weight": paragraph.weight}
    lines = [[]]
    for t, word in enumerate(paragraph.text.split()):
        line = " ".join([other for other, _ in lines[-1]] + [word])
        if lines[-1] and inches(line, style) > 0.97 * width:
            lines.append([])
        lines[-1].append((word, RED if t in paragraph.red else paragraph.colour))
    return lines


def inches(text, style):
    """The width of a text in one line, as matplotlib draws it at the resolution of its figures."""
    dpi = plt.rcParams["figure.dpi"]
    renderer = RendererAgg(1, 1, dpi)
    return renderer.get_text_width_height_descent(text, FontProperties(**style), False)[0] / dpi
