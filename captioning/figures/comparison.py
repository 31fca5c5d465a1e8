"""What 2_Training compares: models, epochs of a run, and captions before and after training.

count_right(captions, val)                 # "190 of 200"
print(best_epochs(histories))              # a line per model
most_improved(captions_1, captions_10, val)    # a row of `val`
small = first_images(config, 1600)         # of a dataset that would take too long
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from captioning.data.coco import read_captions, write_captions
from captioning.figures.plots import bars
from captioning.scenes.dataset import DESCRIPTION
from captioning.scenes.mistakes import is_wrong
from captioning.scoring.evaluation import score_sources

# Self-critical training on Flickr8k, means of three seeds, from docs/flickr8k.md.
NAMES = ("epoch", "train_reward", "val_cider", "val_perplexity")
ROWS = (
    (1, 0.53, 0.551, 22.9),
    (2, 0.75, 0.568, 30.6),
    (3, 0.82, 0.575, 36.7),
    (4, 0.87, 0.580, 42.8),
    (5, 0.90, 0.586, 47.2),
    (6, 0.94, 0.587, 54.6),
    (7, 0.97, 0.586, 61.7),
    (8, 1.00, 0.595, 64.6),
)
FLICKR8K_REWARDED = [{"epoch": 0, "val_cider": 0.548, "val_perplexity": 14.3}]
FLICKR8K_REWARDED += [dict(zip(NAMES, row, strict=True)) for row in ROWS]


def count_right(captions, data):
    """How many captions of scenes describe exactly their scene, as text: "190 of 200"."""
    if data.description != DESCRIPTION:
        return "known for synthetic scenes only"
    pairs = zip(captions, data.captions, strict=True)
    right = sum(not is_wrong(caption, actual[0]) for caption, actual in pairs)
    return f"{right} of {len(captions)}"


def most_improved(first, last, data):
    """The row of the image whose caption gains most CIDEr-D from `first` to `last`."""
    before, after = (score_sources(captions, data)[1] for captions in (first, last))
    return int(np.subtract(after, before).argmax())


def perplexity_bars(perplexities, ax=None):
    """A bar with its value for each {model: perplexity}, on a logarithmic scale from 1."""
    ax = bars(perplexities, ax, "model", "validation perplexity (log scale)")
    ax.set(yscale="log", ylim=(1, 2 * max(perplexities.values())))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    for name, value in perplexities.items():
        ax.text(name, value, f"{value:.2f}", ha="center", va="bottom")
    return ax


def first_images(config, count):
    """The config with at most `count` training and `count` validation images, in their order.

    Datasets that have no more remain as they are; of others, captions files are written to
    `config.out`/first.
    """
    changes = {}
    for name in ("train_captions", "val_captions"):
        content = read_captions(getattr(config, name)).dataset
        images = content["images"][:count]
        if len(images) < len(content["images"]):
            ids = {image["id"] for image in images}
            kept = [x for x in content["annotations"] if x["image_id"] in ids]
            file = Path(config.out, "first", f"{name}.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_captions(file, images, kept, f"the first {count} images")
            changes[name] = str(file)
    return replace(config, **changes)
