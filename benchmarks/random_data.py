"""Random images and captions, and an untrained captioner, that cost what real ones do.

write_data("data", images=6_091)      # data/images, data/train.json, data/val.json
"""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

FILES = 256  # different image files; image i is the file (i % FILES).jpg
LETTERS = str.maketrans("0123456789", "aeioubdkmt")


def write_data(folder, images):
    """Write captions of `images` training and 1,000 validation images, and the image files."""
    folder = Path(folder)
    write_images(folder / "images")
    write_captions(folder / "train.json", images, seed=0)
    write_captions(folder / "val.json", min(images, 1_000), seed=1)


def write_images(folder):
    """JPEG files of 640x480 pixels: smooth random colours with noise, about 60 kB each."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(FILES):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth) + rng.integers(-12, 13, (480, 640, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number}.jpg", quality=85)


def write_captions(file, images, seed):
    """A captions file in COCO's format, with five captions per image."""
    captions = enumerate(make_captions(5 * images, seed))
    content = {
        "info": {"description": "random captions for a benchmark"},
        "images": [{"id": i, "file_name": f"{i % FILES}.jpg"} for i in range(images)],
        "annotations": [{"id": i, "image_id": i // 5, "caption": text} for i, text in captions],
    }
    file.write_text(json.dumps(content))


def make_captions(count, seed, words=10_000, exponent=1.25):
    """`count` sentences of 10.5 words on average, with word frequencies that follow Zipf's law.

    The lengths vary a little less than COCO's. About 2,600 words occur at least five times in
    30,000 captions, as in Flickr8k, and all of them in 600,000, as in COCO.
    """
    rng = np.random.default_rng(seed)
    names = np.array([str(number).translate(LETTERS) for number in range(words)])
    probabilities = np.arange(1, words + 1) ** -exponent
    lengths = 7 + rng.poisson(3.5, count)
    sampled = names[rng.choice(words, lengths.sum(), p=probabilities / probabilities.sum())]
    sentences = np.split(sampled, np.cumsum(lengths)[:-1])
    return [" ".join(sentence).capitalize() + "." for sentence in sentences]


def end_at_length(decoder, end):
    """Make the LSTM's first unit count words, and `end` most probable after about eleven of them.

    Its gates stay open, so that its cell grows by about 0.1 per word; what remains of its random
    weights makes some captions longer than others. The other words get the large differences in
    probability of a trained decoder, without which a beam search would rarely end early.

    decoder: with a single LSTM and a linear layer, or an `AttentionDecoder`. Changes it in place.
    """
    weights = decoder.requires_grad_(False).state_dict()
    lstm = "language_lstm" if "projection.weight" in weights else "lstm"
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        input_gate, forget_gate, cell, output_gate = weights[f"{lstm}.{kind}_l0"].chunk(4)
        for gate in (input_gate, forget_gate, output_gate):
            gate[0] = 5.0 if "bias" in kind else 0.0
        cell[0] = 0.05 if "bias" in kind else 0.05 * cell[0]
    if lstm == "language_lstm":  # keep the first unit through the layers before the logits
        weights["projection.weight"] *= 40
        for name in ("projection", "shortcut"):
            weights[f"{name}.weight"][0], weights[f"{name}.bias"][0] = 0.0, 0.0
        weights["projection.weight"][0, 0] = 1.0
    else:
        weights["linear.weight"] *= 40
    weights["linear.weight"][:, 0] = 0.0
    weights["linear.weight"][end] = 0.0
    weights["linear.weight"][end, 0] = 200.0
    weights["linear.bias"][end] = -200.0 * math.tanh(1)
