"""Captions of a photo with their probabilities and attention, as data and as HTML.

describe(model, "photo.jpg")    # Description(["a dog runs", ..], [0.12, ..], (words, H, W) or None)
cards(model, ["photo.jpg"])     # the same as HTML for app.py, with the images in it
"""

import base64
import html
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from captioning.data.images import BadImageError, attention_mask, load_image

ALTERNATIVES = 5
MAX_PHOTOS = 10  # that are captioned together
BEAM, SAMPLING = "beam search", "sampling"


class Description(NamedTuple):
    """Captions of one image, and the attention of the first one."""

    captions: list  # of strings, at most ALTERNATIVES, all different
    probabilities: list  # of floats: exp(sum of the log-probabilities) of each caption
    maps: np.ndarray | None  # (words of the first caption, H, W); None without square maps


def describe(model, image, method=BEAM, beam_size=5, temperature=1.0) -> Description:
    """Caption an image (path or PIL image) in several ways.

    method: "beam search" returns the captions in the order of their scores; "sampling" returns
        ALTERNATIVES sampled captions, the most probable one first.

    Raises BadImageError, or ValueError for an option that the decoder refuses.
    """
    images = model.preprocess([image])  # (1, 3, H, W)
    if method == BEAM:  # N captions of one image: fields of shape (1, N, ..)
        decoded = model.generate(images, beam_size=beam_size, n_best=min(beam_size, ALTERNATIVES))
        rows = (decoded.scores[0] > -np.inf).nonzero().flatten().tolist()
    else:  # a sample of each of N equal images: fields of shape (N, 1, ..)
        decoded = model.generate(images.expand(ALTERNATIVES, -1, -1, -1), temperature=temperature)
        rows = decoded.log_probs.sum(-1).flatten().argsort(descending=True).tolist()
    captions = [caption for of_image in model.decode(decoded) for caption in of_image]
    first = {}  # caption -> its first row
    for row in rows:
        first.setdefault(captions[row], row)
    probabilities = decoded.log_probs.sum(-1).flatten().exp()[list(first.values())].tolist()
    maps = None if decoded.attention is None else model.attention_maps(decoded)[rows[0]]
    return Description(list(first), probabilities, maps if np.ndim(maps) == 3 else None)


# ---------------------------------------------------------------------------- HTML


def cards(model, paths, *options) -> str:
    """HTML of the photos in files, or a sentence; `options` are those of `describe`, in order."""
    result = []
    if len(paths) > MAX_PHOTOS:
        result.append(f'<p class="error">Only the first {MAX_PHOTOS} photos are captioned.</p>')
    for path in map(Path, paths[:MAX_PHOTOS]):
        try:
            if not path.exists():
                raise BadImageError(f"{path}: the upload has been deleted, add the photo again")
            description = describe(model, path, *options)
            result.append(card(load_image(path, min_size=640), description))
        except ValueError as error:
            message = str(error).replace(str(path), path.name)  # no path of the server
            result.append(f'<p class="error">{escape(message)}</p>')
    return "".join(result)


def card(image, description: Description) -> str:
    """HTML of a photo (PIL, RGB) with its captions, and a map of the attention for each word."""
    captions = [escape(caption) or "(no words)" for caption in description.captions]
    (caption, probability), *others = zip(captions, description.probabilities, strict=True)
    rows = "".join(f"<li><span>{text}</span><b>{p:.2g}</b></li>" for text, p in others)
    return (
        f'<article class="photo"><img src="{data_url(ImageOps.contain(image, (640, 640)))}" alt="">'
        f'<div><p class="caption">{caption}</p><p class="probability">probability '
        f'{probability:.2g}</p><ol class="alternatives">{rows}</ol></div>'
        f"{word_maps(image, description)}</article>"
    )


def word_maps(image, description: Description) -> str:
    """HTML of the square that the model sees, for each word; the less attention, the darker."""
    if description.maps is None:
        return ""
    square, figures = ImageOps.fit(image, (160, 160)), []  # the crop of `eval_transform`
    for word, weights in zip(description.captions[0].split(), description.maps, strict=True):
        opacity = attention_mask(weights, square.size).point(lambda value: 64 + value * 191 // 255)
        shaded = Image.composite(square, Image.new("RGB", square.size), opacity)
        label = f"<figcaption>{escape(word)}</figcaption>"
        figures.append(f'<figure><img src="{data_url(shaded)}" alt="">{label}</figure>')
    return f'<section class="maps">{"".join(figures)}</section>'


def data_url(image) -> str:
    """The image (PIL, RGB) as a URL that contains it, so that no file has to be served."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def escape(text) -> str:
    """Text for HTML that Gradio renders: its templates also interpret `{{..}}` and `${..}`."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;")
