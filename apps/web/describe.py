"""Captions of a photo with their probabilities and attention, as data and as HTML.

description = describe(model, "photo.jpg", beam_size=5)
description.captions, description.probabilities     # ["a dog runs"], [0.12]
description.maps                                    # (words, H, W), or None

html = cards(model, ["photo.jpg"])                  # for app.py; contains the images
"""

import base64
import html
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from captioning.data.images import BadImageError, attention_mask, load_image
from captioning.decoding.search import Decoded

ALTERNATIVES = 5
MAX_BEAM_SIZE, TEMPERATURES = 10, (0.1, 2.0)
MAX_PHOTOS = 10  # that are captioned together
BEAM, SAMPLING = "beam search", "sampling"


class Description(NamedTuple):
    """Captions of one image, and the attention of the first one."""

    captions: list  # of strings, at most ALTERNATIVES, all different
    probabilities: list  # of floats: exp(sum of the log-probabilities) of each caption
    maps: np.ndarray | None  # (words of the first caption, H, W); None without attention


def describe(model, image, method=BEAM, beam_size=5, temperature=1.0) -> Description:
    """Caption an image (path or PIL image) in several ways.

    method: "beam search" returns the captions in the order of their scores; "sampling" returns
        ALTERNATIVES sampled captions, the most probable one first.

    Raises BadImageError, or ValueError for an option that is out of range.
    """
    if method not in (BEAM, SAMPLING):
        raise ValueError(f"unknown method {method!r}; choose {BEAM!r} or {SAMPLING!r}")
    if method == BEAM and not 1 <= beam_size <= MAX_BEAM_SIZE:
        raise ValueError(f"beam size {beam_size}: choose 1 to {MAX_BEAM_SIZE}")
    if method == SAMPLING and not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
        raise ValueError(
            f"temperature {temperature}: choose {TEMPERATURES[0]} to {TEMPERATURES[1]}"
        )
    images = model.preprocess([image])  # (1, 3, H, W)
    if method == BEAM:
        count = min(beam_size, ALTERNATIVES)
        decoded = model.generate(images, beam_size=beam_size, n_best=count)
        decoded = Decoded(*(None if field is None else field[0] for field in decoded))
        rows = (decoded.scores > -np.inf).nonzero().flatten().tolist()
    else:
        decoded = model.generate(images.expand(ALTERNATIVES, -1, -1, -1), temperature=temperature)
        rows = decoded.log_probs.sum(1).argsort(descending=True).tolist()
    captions, first = model.decode(decoded), {}  # caption -> its first row
    for row in rows:
        first.setdefault(captions[row], row)
    probabilities = decoded.log_probs.sum(1).exp().tolist()
    return Description(
        list(first), [probabilities[row] for row in first.values()], _maps(model, decoded, rows[0])
    )


def _maps(model, decoded, row):
    """The attention of one caption, (words, H, W); None without, or if it is not square."""
    if decoded.attention is None:
        return None
    one = Decoded(*(field[row : row + 1] for field in decoded))
    maps = model.attention_maps(one)[0]
    return maps if maps.ndim == 3 else None


# ---------------------------------------------------------------------------- HTML


def card(image, description: Description) -> str:
    """HTML of a photo (PIL, RGB) with its captions, and a map of the attention for each word."""
    captions = [escape(caption) or "(no words)" for caption in description.captions]
    shown = [number(probability) for probability in description.probabilities]
    alternatives = "".join(
        f"<li><span>{text}</span><b>{p}</b></li>"
        for text, p in zip(captions[1:], shown[1:], strict=True)
    )
    whole = ImageOps.contain(image, (640, 640))
    return (
        f'<article class="photo"><img src="{data_url(whole)}" alt="{captions[0]}"><div>'
        f'<p class="caption">{captions[0]}</p><p class="probability">probability {shown[0]}</p>'
        f'<ol class="alternatives">{alternatives}</ol></div>'
        f"{word_maps(image, description)}</article>"
    )


def number(probability) -> str:
    """HTML of a probability: "12 %", or "1.4 × 10<sup>-6</sup>" below 0.01 %."""
    if probability >= 0.1:
        return f"{100 * probability:.0f} %"
    if probability >= 1e-4:
        return f"{100 * probability:.2g} %"
    mantissa, exponent = f"{probability:.1e}".split("e")
    return f"{mantissa} × 10<sup>{int(exponent)}</sup>"


def word_maps(image, description: Description) -> str:
    """HTML of the attention maps over the square that the model sees; "" without attention.

    A photo is darkened where the weight is small relative to the largest of the word.
    """
    if description.maps is None or not len(description.maps):
        return ""
    square = ImageOps.fit(image, (224, 224))  # the crop of `eval_transform`
    figures = []
    for word, weights in zip(description.captions[0].split(), description.maps, strict=True):
        mask = attention_mask(weights, (56, 56))
        black = Image.new("L", mask.size)
        black.putalpha(mask.point(lambda value: 190 - 190 * value // 255))  # opacity <= 0.75
        figures.append(
            f'<figure><div><img src="{data_url(black, "PNG")}" alt=""></div>'
            f"<figcaption>{escape(word)}</figcaption></figure>"
        )
    style = f"--photo: url({data_url(square)})"
    return f'<section class="maps" style="{style}">{"".join(figures)}</section>'


def data_url(image, kind="JPEG") -> str:
    """The image (PIL) as a URL that contains it, so that no file has to be served."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def escape(text) -> str:
    """Text for HTML that Gradio renders: its templates also interpret `{{..}}` and `${..}`."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;")


def cards(model, paths, **options) -> str:
    """HTML of the photos in files; a sentence in place of one that cannot be captioned."""
    result = [f'<p class="error">Only the first {MAX_PHOTOS} photos are captioned.</p>'] * (
        len(paths) > MAX_PHOTOS
    )
    for path in map(Path, paths[:MAX_PHOTOS]):
        try:
            if not path.exists():
                raise BadImageError(f"{path}: the upload has been deleted, add the photo again")
            description = describe(model, path, **options)
            result.append(card(load_image(path, min_size=640), description))
        except ValueError as error:
            message = str(error).replace(str(path), path.name)  # no path of the server
            result.append(f'<p class="error">{escape(message)}</p>')
    return "".join(result)
