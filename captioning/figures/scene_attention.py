"""Where a model with attention looks in synthetic scenes, whose objects have known boxes.

captioned = caption_scenes(model, "synthetic", 40)
print_shares(captioned)
show_right_scene(captioned)
"""

from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from captioning.base.tokens import split_words
from captioning.figures.attention import attention_overlay
from captioning.scenes.attention import attention_on_things, box_share, named_things
from captioning.scenes.drawing import render
from captioning.scenes.scene import Scene, random_scene


class CaptionedScene(NamedTuple):
    """A random scene with its caption and the attention at each word, (words, H, W)."""

    scene: Scene
    image: Image.Image
    caption: str
    maps: np.ndarray


def caption_scenes(model, dataset, count):
    """Random scenes, captioned by a model with attention; none if it was not trained on scenes.

    model: None if there is none. dataset: that of its training.
    """
    if model is None or dataset != "synthetic":
        print("There is no model with attention for synthetic scenes, so they are skipped.")
        return []
    scenes = [random_scene(Random(f"attention {number}")) for number in range(count)]
    images = [render(scene) for scene in scenes]
    captions, maps = model.caption(images, return_attention=True)
    rows = zip(scenes, images, captions, maps, strict=True)
    return [CaptionedScene(*row) for row in rows]


def print_shares(captioned):
    """Print how much attention falls on the boxes of the objects that the captions name."""
    found = [
        shares
        for example in captioned
        for shares in attention_on_things(example.caption, example.maps, example.scene)
    ]
    if not found:
        return
    attention, area = np.mean(found, 0)
    print(f"{len(found)} objects are named by their noun and colour")
    print(f"area of their boxes: {area:.1%} of the image on average")
    print(f"attention within:    {attention:.1%}")


def show_right_scene(captioned):
    """The attention in the scene of two objects with the shortest caption that names both."""
    right = [
        example
        for example in captioned
        if len(example.scene.things) == 2 == len(named_things(example.caption, example.scene))
    ]
    return attention_on_scene(min(right, key=lambda x: len(x.caption))) if right else None


def attention_on_scene(example):
    """The attention at each noun of a scene's caption, the object's box, and the share in it.

    The colour is strongest at the position with the largest weight.
    """
    named = named_things(example.caption, example.scene)
    words, maps = split_words(example.caption), example.maps[sorted(named)]
    notes, boxes = [], {}
    for place, (t, thing) in enumerate(sorted(named.items())):
        notes.append(f"{box_share(example.maps[t], thing):.0%} in the box")
        boxes[place] = (thing.x, thing.y, thing.side, thing.side)
    names = [words[t] for t in sorted(named)]
    return attention_overlay(example.image, names, maps / maps.max(), notes, boxes)
