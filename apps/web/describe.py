"""The captions of a photo, with their confidence and attention, as HTML.

cards(model, ["photo.jpg"])     # for app.py, with the images in it
"""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from captioning.base.tokens import split_words
from captioning.data.images import BadImageError, attention_heatmap, load_image
from captioning.decoding.captioner import Captioned

ALTERNATIVES = 5
MAX_PHOTOS = 10  # that are captioned together
MAX_PIXELS = 120e6  # of a photo: the largest phones have 108 megapixels
BEAM, SAMPLING = "beam search", "sampling"
UNSURE = 0.4  # captions of lower confidence are called unsure


def describe(model, image, method=BEAM, beam_size=5, temperature=1.0, min_len=0) -> Captioned:
    """Caption an image (path or PIL image) in several ways, all different.

    method: "beam search" returns the captions in the order of their scores; "sampling" returns
        ALTERNATIVES sampled captions, the most probable one first. min_len: words of a caption at
        least.

    Raises BadImageError, or ValueError for an option that the decoder refuses.
    """
    attends = model.config.inject == "attend"
    if method == BEAM:
        n_best = min(beam_size, ALTERNATIVES)
        return next(
            model.describe(image, attends, beam_size=beam_size, n_best=n_best, min_len=min_len)
        )
    drawn = {"temperature": temperature, "min_len": min_len}
    samples = list(model.describe([image] * ALTERNATIVES, attends, **drawn))
    samples.sort(key=lambda sample: sample.scores, reverse=True)
    captions = dict.fromkeys(caption for sample in samples for caption in sample.captions)
    return samples[0]._replace(captions=list(captions))


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
            image = load_image(path, min_size=640, max_pixels=MAX_PIXELS)
            result.append(card(image, describe(model, path, *options)))
        except ValueError as error:
            message = str(error).replace(str(path), path.name)  # no path of the server
            result.append(f'<p class="error">{escape(message)}</p>')
    return "".join(result)


def card(image, found: Captioned) -> str:
    """HTML of a photo (PIL, RGB) with its captions, and a map of the attention for each word."""
    caption, *others = [escape(caption) or "(no words)" for caption in found.captions]
    rows = "".join(f"<li>{text}</li>" for text in others)
    return (
        f'<article class="photo"><img src="{data_url(ImageOps.contain(image, (640, 640)))}" alt="">'
        f'<div><p class="caption">{caption}</p>{badge(found.confidence)}'
        f'<ol class="alternatives">{rows}</ol></div>{word_maps(image, found)}</article>'
    )


def badge(confidence) -> str:
    """HTML of the confidence, if it is known."""
    if confidence is None:
        return ""
    kind = "unsure" if confidence < UNSURE else "sure"
    text = f"{'unsure, ' * (kind == 'unsure')}expected CIDEr-D {confidence:.2f}"
    return f'<p class="confidence {kind}">{text}</p>'


def word_maps(image, found: Captioned) -> str:
    """HTML of the square that the model sees, for each word; the less attention, the darker."""
    if np.ndim(found.attention) != 3:  # no attention, or positions that form no square
        return ""
    square, figures = ImageOps.fit(image, (160, 160)), []  # the crop of `eval_transform`
    for word, weights in zip(split_words(found.captions[0]), found.attention, strict=True):
        opacity = attention_heatmap(weights, square.size).point(
            lambda value: 64 + value * 191 // 255
        )
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
