"""The photographs of result_show with their captions.

photographs = caption_photographs(CaptionModel.pretrained())    # the highest confidence first
show_photographs(photographs[:12])
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from captioning.data.coco import CocoCaptions
from captioning.data.images import centre_crop
from captioning.figures.gallery import FADED, GAP, GREEN, INK, RED, WIDTH, pictures

SIDE = 320  # of the images, in pixels
VERDICTS = {True: ("✓ right", GREEN), False: ("✗ wrong", RED), None: ("not judged", FADED)}


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
