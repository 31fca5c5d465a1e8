"""Does the attention fall on the object that is named? Measured on synthetic scenes.

    python scripts/attention_on_scenes.py --out runs/attention

Trains a model with attention on the synthetic scenes (a minute on two cores), and prints which part
of the attention falls within the box of an object when its noun is predicted, in the actual
captions of the validation scenes: for the trained model, the untrained one, and uniform attention.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import config_for
from data_loader import image_loader
from layers import eval_mode
from model import CaptionModel
from run import build_run
from splits import find_splits
from synthetic import attention_on_things, generate_scenes, is_wrong
from train import fit

# The CNN of the scenes was trained with images of 96 pixels, whose last map has only 3 x 3
# positions. With larger images the map is finer, but the features are worse.
IMAGE_SIZE = 128


def shares(model, dataset, scenes) -> np.ndarray:
    """(nouns, 2): the part of the attention, and of the image, in the box of each named object."""
    found = []
    for images, rows in image_loader(dataset.data, features=dataset.features, batch_size=50):
        captions = [dataset.data.captions[row][0] for row in rows]
        ids = [torch.tensor(model.vocab.encode(caption)) for caption in captions]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (B, T)
        with eval_mode(model), model.autocast():
            memory = model.encode(images, precomputed=True)
            _, _, attention = model.decoder.hidden(tokens[:, :-1], None, memory)  # (B, T-1, P)
        side = round(attention.size(2) ** 0.5)
        maps = attention.float().numpy().reshape(*attention.shape[:2], side, side)
        for row, caption, of_words in zip(rows.tolist(), ids, maps, strict=True):
            text = " ".join(model.vocab.words[index] for index in caption[1:].tolist())
            found += attention_on_things(text, of_words, scenes[dataset.data.image_ids[row]])
    return np.array(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/synthetic", help="folder of the scenes")
    parser.add_argument("--out", default="runs/attention", help="folder of the run")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE)
    parser.add_argument("--num-heads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = config_for(
        "synthetic", find_splits("synthetic", args.data), args.out, inject="attend",
        image_size=args.image_size, num_heads=args.num_heads, seed=args.seed, overwrite=True,
    )  # fmt: skip
    run = build_run(config)
    dataset = run.val_loader.dataset
    scenes = {number: scene for split, number, scene, _ in generate_scenes() if split == "val"}
    untrained = shares(run.model, dataset, scenes).mean(0)
    fit(run)
    model = CaptionModel.from_checkpoint(f"{args.out}/best.pt")
    trained = shares(model, dataset, scenes)
    captions = model.caption(dataset.data.paths)
    right = [not is_wrong(c, true[0]) for c, true in zip(captions, dataset.data.captions,
                                                         strict=True)]  # fmt: skip
    print(f"{len(trained)} nouns; attention within the box of the object that is named:")
    print(f"trained {trained[:, 0].mean():.1%}, untrained {untrained[0]:.1%}, "
          f"uniform {untrained[1]:.1%}")  # fmt: skip
    print(f"validation scenes exactly right: {np.mean(right):.1%}")


if __name__ == "__main__":
    main()
