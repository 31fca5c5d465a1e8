"""Photos, captions and a captioner made up for the benchmark: meaningless, but as costly as real.

draw_photos("photos", 256)
write_captions("captions.json", images=6091, files=256)     # 30,455 captions, ~2,600 words
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model import END

CONSONANTS, VOWELS = "bdfghjklmnprstv", "aeiou"
SYLLABLES = ["".join(letters) for letters in itertools.product(CONSONANTS, VOWELS, CONSONANTS)]


def make_data(folder, quick):
    """Drawn photos and made-up captions in `folder`: (images folder, captions file)."""
    files, images = (8, 400) if quick else (256, 6_091)
    photos, captions = Path(folder) / "photos", Path(folder) / "captions.json"
    draw_photos(photos, files)
    write_captions(captions, images, files)
    return str(photos), str(captions)


def draw_photos(folder, count, size=(640, 480), seed=0):
    """`count` JPEGs named 0.jpg, 1.jpg, ..: soft blobs of colour with some grain, ~60 kB each."""
    rng = np.random.default_rng(seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        photo = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
        photo = photo + rng.integers(-12, 13, photo.shape, dtype=np.int16)
        photo = Image.fromarray(photo.clip(0, 255).astype(np.uint8))
        photo.save(Path(folder) / f"{number}.jpg", quality=85)


def word(number):
    """A word of one or more syllables; small numbers make short words, as frequent words are."""
    text = SYLLABLES[number % len(SYLLABLES)]
    while number := number // len(SYLLABLES):
        text += SYLLABLES[number % len(SYLLABLES)]
    return text


def make_captions(count, words=9_000, exponent=1.25, seed=0):
    """`count` sentences of 10.5 words on average, out of `words` words that follow Zipf's law.

    The lengths vary a little less than COCO's do. With the defaults, about 2,600 words occur five
    times in 30,000 captions, as in Flickr8k.
    """
    rng = np.random.default_rng(seed)
    names = np.array([word(number) for number in range(words)])
    chances = np.arange(1, words + 1) ** -exponent
    lengths = 7 + rng.poisson(3.5, count)
    drawn = names[rng.choice(words, lengths.sum(), p=chances / chances.sum())]
    parts = np.split(drawn, np.cumsum(lengths)[:-1])
    return [" ".join(part).capitalize() + "." for part in parts]


def write_captions(path, images, files=1, captions=None, **settings):
    """A captions file in COCO's format with five captions per image, or `captions` in all.

    Image i is the file (i % files).jpg, so that few photos can stand for many.
    """
    texts = make_captions(captions or 5 * images, **settings)
    content = {
        "images": [{"id": i, "file_name": f"{i % files}.jpg"} for i in range(images)],
        "annotations": [
            {"id": i, "image_id": i % images, "caption": text} for i, text in enumerate(texts)
        ],
    }
    Path(path).write_text(json.dumps(content))


def write_features(path, images, feature_size, seed=0):
    """Random numbers in the shape and precision of a CNN's features, as a .npy file."""
    rng = np.random.default_rng(seed)
    rows = np.lib.format.open_memmap(path, "w+", np.float16, (images, feature_size))
    for start in range(0, images, 4096):  # in blocks: at COCO's size 505 MB in all
        block = rows[start : start + 4096]
        block[:] = rng.standard_normal(block.shape, dtype=np.float32)
    rows.flush()


@torch.no_grad()
def end_at_length(decoder, rise=0.1, full=1.0, steepness=200.0):
    """Make the LSTM's first unit count words, and `<end>` win when it has counted enough.

    Its gates stay open, so its memory grows by about `rise` per word; what is left of its random
    weights makes some captions longer than others. The other words get the sharp preferences of a
    trained decoder, or a beam search would have no reason to stop.
    """
    size = decoder.lstm.hidden_size
    for name, weights in decoder.lstm.named_parameters():
        for gate in (0, 1, 3):  # input, forget, output
            weights[gate * size] = 5.0 if name.startswith("bias") else 0.0
        weights[2 * size] *= 0.1
        if name.startswith("bias"):
            weights[2 * size] = rise / 2  # there are two biases
    decoder.linear.weight *= 40
    decoder.linear.weight[:, 0] = 0.0
    decoder.linear.weight[END] = 0.0
    decoder.linear.weight[END, 0] = steepness
    decoder.linear.bias[END] = -steepness * np.tanh(full)
