"""Random images, captions and features, and an untrained captioner, that cost what real ones do.

write_random_images("images", 256)
write_random_captions("captions.json", images=6091, files=256)     # 30,455 captions, ~2,600 words
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captioning.data import coco
from captioning.data.features import SHARD_SIZE, write_shard
from vocabulary import END

CONSONANTS, VOWELS = "bdfghjklmnprstv", "aeiou"
SYLLABLES = ["".join(letters) for letters in itertools.product(CONSONANTS, VOWELS, CONSONANTS)]


def write_random_data(folder, quick):
    """Write images and captions into `folder`: (folder of the images, captions file)."""
    files, images = (8, 400) if quick else (256, 6_091)
    image_dir, captions = Path(folder) / "images", Path(folder) / "captions.json"
    write_random_images(image_dir, files)
    write_random_captions(captions, images, files)
    return str(image_dir), str(captions)


def write_random_images(folder, count, size=(640, 480), seed=0):
    """`count` JPEG files 0.jpg, 1.jpg, ..: smooth random colors with noise, about 60 kB each."""
    rng = np.random.default_rng(seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        pixels = pixels.astype(np.int16) + rng.integers(-12, 13, pixels.shape, dtype=np.int16)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(Path(folder) / f"{number}.jpg", quality=85)


def word(number):
    """A word of one or more syllables; small numbers give short words, as frequent words are."""
    text = SYLLABLES[number % len(SYLLABLES)]
    while number := number // len(SYLLABLES):
        text += SYLLABLES[number % len(SYLLABLES)]
    return text


def make_captions(count, words=9_000, exponent=1.25, seed=0):
    """`count` sentences of 10.5 words on average, with word frequencies that follow Zipf's law.

    The lengths vary a little less than COCO's. With the defaults, about 2,600 words occur at least
    five times in 30,000 captions, as in Flickr8k.
    """
    rng = np.random.default_rng(seed)
    names = np.array([word(number) for number in range(words)])
    probabilities = np.arange(1, words + 1) ** -exponent
    lengths = 7 + rng.poisson(3.5, count)
    sampled = names[rng.choice(words, lengths.sum(), p=probabilities / probabilities.sum())]
    sentences = np.split(sampled, np.cumsum(lengths)[:-1])
    return [" ".join(sentence).capitalize() + "." for sentence in sentences]


def write_random_captions(path, images, files=1, captions=None, **settings):
    """A captions file in COCO's format with five captions per image, or `captions` in all.

    Image i is the file (i % files).jpg, so that a few files can serve for many images.
    """
    texts = make_captions(captions or 5 * images, **settings)
    coco.write_captions(
        path,
        [{"id": i, "file_name": f"{i % files}.jpg"} for i in range(images)],
        [{"id": i, "image_id": i % images, "caption": text} for i, text in enumerate(texts)],
        "random captions for a benchmark",
    )


def write_random_features(folder, images, shape, seed=0):
    """Random features (images, *shape), in the files that features.py would write."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, images, SHARD_SIZE):
        size = min(SHARD_SIZE, images - start), *shape
        write_shard(folder, start, rng.standard_normal(size, dtype=np.float32).astype("f2"), {})


@torch.no_grad()
def end_at_length(decoder, rise=0.1, full=1.0, steepness=200.0):
    """Make the LSTM's first unit count words, and `<end>` most probable when it has counted enough.

    Its gates stay open, so that its cell grows by about `rise` per word; what remains of its random
    weights makes some captions longer than others. The other words get the large differences in
    probability of a trained decoder, without which a beam search would rarely end early.
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
