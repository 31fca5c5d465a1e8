"""How much of a model's attention falls on the objects that it names."""

import numpy as np

from captioning.scenes.captions import named_pairs
from captioning.scenes.scene import IMAGE_SIDE, Scene, Thing


def named_things(caption: str, scene: Scene) -> dict[int, Thing]:
    """{position of a noun in the caption: the thing of the scene with that colour and name}."""
    things = {(thing.colour, thing.name): thing for thing in scene.things}
    return {t: things[pair] for (_, t), pair in named_pairs(caption) if pair in things}


def attention_on_things(caption: str, maps: np.ndarray, scene: Scene) -> list[tuple[float, float]]:
    """How much attention falls on the box of a thing when its noun is generated.

    maps: (words, H, W), the attention weights for each word, which sum to 1.

    Returns (share of the attention within the box, share of the image within the box) for each noun
    of the caption whose (colour, name) is in the scene. A position of the map stands for its part
    of the image, over which its weight is spread evenly.
    """
    named = named_things(caption, scene).items()
    return [(box_share(maps[t], thing), (thing.side / IMAGE_SIDE) ** 2) for t, thing in named]


def box_share(weights: np.ndarray, thing: Thing) -> float:
    """The part of the attention `weights` (H, W) within the box of a thing."""
    rows, columns = (
        np.clip((start + thing.side) / IMAGE_SIDE * n - np.arange(n), 0, 1)
        - np.clip(start / IMAGE_SIDE * n - np.arange(n), 0, 1)
        for start, n in zip((thing.y, thing.x), weights.shape, strict=True)
    )  # the part of each row and of each column of the map that the box covers
    return float(rows @ weights @ columns)
