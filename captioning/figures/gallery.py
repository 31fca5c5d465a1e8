"""The photographs of result_show with their captions, in large type.

photographs = caption_photographs(CaptionModel.pretrained())    # the highest confidence first
show_photographs(photographs[:12])
attention_strip(photographs[0])
show_versions(photographs[0], {"epoch 1": "a group of people", "epoch 12": "a cow"})
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from captioning.base.tokens import split_words
from captioning.data.coco import CocoCaptions
from captioning.data.images import centre_crop
from captioning.figures.attention import add_overlay
from captioning.figures.image_text import FADED, GAP, MARGIN, RED, Paragraph, pictures
from captioning.figures.plots import SIDE

GREEN, GLOW = "#2e7d4f", "#ff8c1a"
WIDTH = 12.6  # of a figure, in inches
VERDICTS = {True: ("✓ right", GREEN), False: ("✗ wrong", RED), None: ("not judged", FADED)}


def show_versions(photograph, captions):
    """A photograph with several captions to its right: {label: caption}."""
    block = []
    for label, caption in captions.items():
        block += [Paragraph(label, 12, FADED), Paragraph(caption, 16, weight="bold")]
        block.append(Paragraph("", 5))
    return pictures([photograph.image], [block], 1, 2.8, WIDTH - 2.8 - MARGIN)


def attention_strip(photograph):
    """The photograph, and once more for each predicted word, coloured by its attention: two rows.

    The colour and the number are the attention of a position as a multiple of its mean over the
    words of the caption: no colour for 1 and less, the strongest from 4 on.
    """
    image, maps = photograph.image, photograph.attention
    factors = maps / maps.mean(0)  # (words, H, W)
    words = split_words(photograph.predicted)
    blocks = [[Paragraph("the photograph", 15, FADED)]]
    for word, factor in zip(words, factors, strict=True):
        peak = f"up to {factor.max():.1f} ×"
        blocks.append([Paragraph(word, 15, weight="bold"), Paragraph(peak, 12, FADED)])
    grey = image.convert("L").convert("RGB")
    pale = Image.blend(grey, Image.new("RGB", image.size, "white"), 0.2)
    columns = -(-len(blocks) // 2)
    side = (WIDTH + GAP) / columns - GAP
    axes = pictures([image, *[pale] * len(words)], blocks, columns, side)
    for ax, factor in zip(axes[1:], factors, strict=True):
        strength = np.clip((factor - 1) / 3, 0, 1)
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


def show_photographs(photographs):
    """Photographs with the predicted caption, its verdict, its confidence and an actual caption."""
    blocks = []
    for photograph in photographs:
        verdict, colour = VERDICTS[photograph.verdict]
        line = f"{verdict} · confidence {photograph.confidence:.2f}"
        predicted = Paragraph(photograph.predicted, 15, weight="bold")
        actual = Paragraph(f"actual: {photograph.actual}", 12, FADED)
        blocks.append([predicted, Paragraph(line, 12, colour), actual])
    side = (WIDTH + GAP) / 4 - GAP
    return pictures([photograph.image for photograph in photographs], blocks, 4, side)
