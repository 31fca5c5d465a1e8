"""Pre-trains the encoder of the drawn scenes: it stands in for ImageNet weights, offline.

    python pretrain_sample.py                   # writes sample_encoder.pt

Captioning starts from a frozen CNN that already sees. Photographs have ImageNet for that; drawn
scenes have this script, which trains torchvision's `mobilenet_v3_small` on an endless stream of
scenes, none of them in `write_sample`'s stream, to name every (colour, object) pair and the
background. The head is linear, so whatever it can name is linearly readable from the 576 pooled
features, and linear is what a captioner puts on top of them. Only `features.*` is saved, in half
precision.

With the defaults, about 16 minutes on one core (128,000 scenes). Measured: 99.5 % of 2,000 unseen
scenes exactly right after the rounding to half precision, every pair, no extra, and the background.
"""

import argparse
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v3_small

from checkpoint import save_atomically
from sample_data import BACKGROUNDS, COLOURS, OBJECTS, Scene, draw, random_scene

PAIRS = list(product(COLOURS, OBJECTS))
PLACES = list(BACKGROUNDS)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as captioning uses


class Namer(nn.Module):
    """Images (B, 3, 96, 96) to logits of each pair (B, 48) and of each background (B, 6)."""

    def __init__(self):
        super().__init__()
        self.features = mobilenet_v3_small().features
        self.head = nn.Linear(576, len(PAIRS) + len(PLACES))

    def forward(self, images):
        pooled = self.features(images).mean((2, 3))  # (B, 576)
        return self.head(pooled).split([len(PAIRS), len(PLACES)], dim=1)


def make_batch(rng: Random, size: int):
    """Fresh scenes as images (size, 3, 96, 96), pairs (size, 48) of 0 and 1, places (size,)."""
    scenes = [random_scene(rng) for _ in range(size)]
    pixels = torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes]))
    images = pixels.permute(0, 3, 1, 2).float() / 255  # (size, 3, 128, 128)
    images = F.interpolate(images, size=96, mode="bilinear", antialias=True)
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    pairs = torch.tensor([named_pairs(scene) for scene in scenes])
    places = torch.tensor([PLACES.index(scene.background) for scene in scenes])
    return images, pairs, places


def named_pairs(scene: Scene) -> list[float]:
    present = {(thing.colour, thing.name) for thing in scene.things}
    return [float(pair in present) for pair in PAIRS]


def train(model: Namer, scenes: int, batch_size: int, seed: int) -> None:
    rng, steps = Random(f"pretrain {seed}"), scenes // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.2)
    model.train()
    for step in range(1, steps + 1):
        images, pairs, places = make_batch(rng, batch_size)
        pair_logits, place_logits = model(images)
        # Summed over the pairs, or 48 mostly absent ones would count as little as one place.
        loss = F.binary_cross_entropy_with_logits(pair_logits, pairs) * len(PAIRS)
        loss = loss + F.cross_entropy(place_logits, places)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = exactly_right(pair_logits, place_logits, pairs, places).float().mean()
            print(f"scene {step * batch_size:7d}  loss {loss:.4f}  right {right:.2f}", flush=True)


def exactly_right(pair_logits, place_logits, pairs, places):
    """Which scenes are named in full, without an extra: (B,) of bool."""
    return ((pair_logits > 0) == pairs.bool()).all(1) & (place_logits.argmax(1) == places)


@torch.inference_mode()
def accuracy(model: Namer, scenes: int) -> float:
    model.eval()
    rng, right = Random("pretrain check"), 0
    for _ in range(scenes // 50):
        images, *truth = make_batch(rng, 50)
        right += exactly_right(*model(images), *truth).sum().item()
    return right / (scenes // 50 * 50)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=128_000, help="drawn scenes to train on")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample_encoder.pt")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = Namer()
    train(model, args.scenes, args.batch_size, args.seed)

    weights = {f"features.{name}": value for name, value in model.features.state_dict().items()}
    weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    save_atomically(weights, Path(args.out))

    model.load_state_dict(weights, strict=False)  # the stored precision; the head stays as it is
    print(f"{accuracy(model, 2000):.2%} of 2000 unseen scenes exactly right in half precision")


if __name__ == "__main__":
    main()
