"""Synthetic scenes in COCO's layout: a dataset that needs no download.

A scene is one to three coloured objects on a background, with five captions. Each caption names
every (colour, object) pair and the background, so `parse_scene` can turn any caption, a reference
or a generated one, back into facts that can be compared with the image.

    write_synthetic("data/synthetic")  # train/*.jpg, annotations/captions_train.json, val/ ...

The files are identical, byte for byte, on every machine: shapes are rasterized in integer
arithmetic, and `random.Random(str)` gives the same numbers in every Python version.
"""

import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from captioning.scenes.rasterize import downsample, rasterize, rgba

VERSION = "2"  # increase it whenever the generated files change
SIZES = {"train": 1600, "val": 200, "test": 200}  # scenes per split
DESCRIPTION = "Synthetic scenes with generated captions; no photographs."
IMAGE_SIDE = 128  # pixels; images are square

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
STANDING = {"cat": "sits", "house": "stands", "car": "waits", "mushroom": "grows"}
FLYING = {"balloon": "floats", "kite": "flies", "butterfly": "flutters", "rocket": "zooms"}
OBJECTS = STANDING | FLYING
SYNONYMS = {"kitten": "cat", "cottage": "house"}
SMALL, LARGE = ("small", "little", "tiny"), ("large", "big", "huge")
THING_SIDES = {28: SMALL, 36: (), 42: (), 52: LARGE}  # pixels: the adjectives for that size
BACKGROUNDS = {  # name: preposition, noun phrases; these contain the name, for `parse_scene`
    "beach": ("on", "the beach", "the sandy beach"),
    "meadow": ("in", "the meadow", "a grassy meadow"),
    "hill": ("on", "the snowy hill", "a snowy hill"),
    "desert": ("in", "the desert", "the sandy desert"),
    "city": ("in", "the city at night", "the dark city"),
    "lake": ("by", "the lake at sunset", "the calm lake"),
}


@dataclass(frozen=True)
class Thing:
    """A coloured object in a square box of `side` pixels whose top left pixel is (x, y)."""

    colour: str
    name: str
    x: int
    y: int
    side: int
    flipped: bool  # left to right


@dataclass(frozen=True)
class Scene:
    background: str
    variant: int  # 0..7, of the background
    things: tuple[Thing, ...]


def random_scene(rng: Random, count: int | None = None) -> Scene:
    """A scene of `count` things (default: one to three) in disjoint boxes.

    No two things have both the same colour and the same name.
    """
    background, variant = rng.choice(list(BACKGROUNDS)), rng.randrange(8)
    count = count or rng.choice((1, 2, 2, 3, 3))
    while True:
        things = tuple(random_thing(rng) for _ in range(count))
        distinct = len({(thing.colour, thing.name) for thing in things}) == count
        if distinct and all(relations(a, b) for a, b in combinations(things, 2)):
            return Scene(background, variant, things)


def random_thing(rng: Random) -> Thing:
    """A random thing, in the upper half if it flies, and on the ground if it stands."""
    colour, name, side = (rng.choice(list(table)) for table in (COLOURS, OBJECTS, THING_SIDES))
    x = rng.randrange(1, IMAGE_SIDE - side)
    y = rng.randrange(1, 66 - side) if name in FLYING else rng.randrange(100, 127) - side
    return Thing(colour, name, x, y, side, rng.random() < 0.5)


def relations(a: Thing, b: Thing) -> list[str]:
    """The position of box `a` relative to box `b`; empty if they overlap."""
    left, right = a.x + a.side <= b.x, b.x + b.side <= a.x
    above, below = a.y + a.side <= b.y, b.y + b.side <= a.y
    horizontal = ["to the left of"] * left + ["to the right of"] * right
    return horizontal + ["above", "over"] * above + ["below", "under"] * below


def make_captions(scene: Scene, rng: Random) -> list[str]:
    """Five different captions of at most 18 words."""
    captions = []
    while len(captions) < 5:
        caption = make_sentence(scene, rng)
        if caption not in captions and len(caption.split()) <= 18:
            captions.append(caption)
    return captions


def make_sentence(scene: Scene, rng: Random) -> str:
    """A random sentence that names every thing and the background, in random order."""
    things = list(scene.things)
    rng.shuffle(things)
    first, *others = things
    one, *more = (noun_phrase(thing, rng) for thing in things)
    rest = " and ".join(more)
    everything = ", ".join([one, rest]) if len(more) == 2 else " and ".join([one, *more])
    verb, (preposition, *nouns) = OBJECTS[first.name], BACKGROUNDS[scene.background]
    noun = rng.choice(nouns)
    place = f"{preposition} {noun}"
    image = rng.choice(("a picture", "a drawing", "an image"))
    choices = [f"{everything} {place}", f"{noun} with {everything}"]
    choices += [f"there is {everything} {place}", f"{image} of {everything} {place}"]
    if not others:
        choices += [f"{one} {verb} {'over ' + noun if first.name in FLYING else place}"] * 2
    for relation in relations(first, others[0]) if others else []:
        if all(relation in relations(first, other) for other in others):
            where = f"{relation} {rest} {place}"
            choices += [f"{one} {where}", f"{one} {verb} {where}"]
    return rng.choice(choices).capitalize() + "."


def noun_phrase(thing: Thing, rng: Random) -> str:
    """For example `a small red cat`."""
    name = rng.choice([thing.name] * 3 + [word for word, n in SYNONYMS.items() if n == thing.name])
    words = [thing.colour, name]
    if THING_SIDES[thing.side] and rng.random() < 0.3:
        words.insert(0, rng.choice(THING_SIDES[thing.side]))
    return " ".join(["an" if words[0] == "orange" else "a", *words])


def parse_scene(caption: str) -> tuple[str | None, Counter[tuple[str, str]]]:
    """The background of a caption, and how often it names each (colour, object) pair.

    The background is None if the caption names none or several. No scene has a pair twice, so a
    caption that repeats one is wrong.
    """
    words = [SYNONYMS.get(word, word) for word in re.findall("[a-z]+", caption.lower())]
    backgrounds = set(words) & set(BACKGROUNDS)
    pairs = Counter(p for p in pairwise(words) if p[0] in COLOURS and p[1] in OBJECTS)
    return backgrounds.pop() if len(backgrounds) == 1 else None, pairs


def is_wrong(caption: str, reference: str) -> bool:
    """Whether a caption describes another scene than `reference`, a caption that is correct."""
    return parse_scene(caption) != parse_scene(reference)


def render(scene: Scene) -> Image.Image:
    """The RGB image of a scene, IMAGE_SIDE x IMAGE_SIDE pixels."""
    image = render_background(scene.background, scene.variant).copy()
    for thing in scene.things:
        sprite = render_sprite(thing.name, thing.colour, thing.side)
        sprite = sprite[:, ::-1] if thing.flipped else sprite
        box = image[thing.y : thing.y + thing.side, thing.x : thing.x + thing.side]
        box[:] = sprite[..., :3] + box * (255 - sprite[..., 3:]) // 255
    return Image.fromarray(image)


@cache
def render_background(name: str, variant: int) -> np.ndarray:
    """A background, (IMAGE_SIDE, IMAGE_SIDE, 3) uint8; odd variants are the flipped even ones."""
    if variant % 2:
        return render_background(name, variant - 1)[:, ::-1]
    rng = Random(f"{name} {variant}")
    canvas = rasterize(artwork()[name], IMAGE_SIDE, artwork()["paints"], rng)
    return downsample(canvas)[..., :3].astype(np.uint8)


@cache
def render_sprite(name: str, colour: str, side: int) -> np.ndarray:
    """An object as premultiplied RGBA, (side, side, 4), with a shadow and a cream outline."""
    paints = artwork()["paints"] | artwork()["colours"][colour]
    body = rasterize(artwork()[name], side, paints, Random(name))
    opaque = body[..., 3] > 0
    disc = [(i, j) for i in range(-5, 6) for j in range(-5, 6) if i * i + j * j <= 25]
    outline = np.any([np.roll(opaque, shift, (0, 1)) for shift in disc], axis=0)
    shadow = artwork()["shadow"] if name in STANDING else []
    canvas = rasterize(shadow, side, paints, Random(name))
    canvas[outline] = rgba(paints["cream"])
    canvas[opaque] = body[opaque]
    return downsample(canvas)


@cache
def artwork() -> dict:
    """Shapes and paints; see `rasterize` and `fill_shape` for the syntax."""
    return json.loads((Path(__file__).parent / "artwork.json").read_text())


def write_synthetic(root, sizes: dict[str, int] = SIZES, seed: int = 0) -> dict[str, tuple]:
    """Write the dataset to `root` unless it is there; {split: (image folder, captions file)}.

    Raises FileExistsError if `root` holds anything else, or an incomplete or outdated dataset.
    """
    root = Path(root)
    files = {name: (root / name, root / "annotations" / f"captions_{name}.json") for name in sizes}
    info = {"description": DESCRIPTION, "version": VERSION, "contributor": "synthetic.py"}
    info |= {"sizes": sizes, "seed": seed}
    if not is_written(files, info):
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
            write_scenes(Path(folder) / "complete", info)
            try:
                os.replace(Path(folder) / "complete", root)  # all or nothing
            except OSError:
                if not is_written(files, info):  # by another process, in the meantime
                    raise FileExistsError(
                        f"{root} holds other files, or a synthetic dataset that is incomplete or "
                        "of another version: in that case delete the folder, else choose another"
                    ) from None
    return files


def is_written(files: dict[str, tuple[Path, Path]], info: dict) -> bool:
    """Whether every captions file has this `info`, and every split all of its images."""
    try:
        return all(
            json.loads(captions.read_text())["info"] == info
            and len(list(images.glob("*.jpg"))) == info["sizes"][split]
            for split, (images, captions) in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):  # a missing or damaged captions file
        return False


def write_scenes(root: Path, info: dict) -> None:
    """Write the images and captions files of all splits."""
    (root / "annotations").mkdir(parents=True)
    coco = {}
    for split, number, scene, captions in generate_scenes(info["sizes"], info["seed"]):
        (root / split).mkdir(exist_ok=True)
        licence = {"id": 1, "name": "Generated by a program", "url": ""}
        content = coco.setdefault(
            split, {"info": info, "licenses": [licence], "images": [], "annotations": []}
        )
        image = {"id": number, "file_name": f"{number:012d}.jpg", "license": 1}
        content["images"].append(image | {"width": IMAGE_SIDE, "height": IMAGE_SIDE})
        render(scene).save(root / split / image["file_name"], quality=95, subsampling=0)
        content["annotations"] += [
            {"id": 5 * number + i, "image_id": number, "caption": caption}
            for i, caption in enumerate(captions)
        ]
    for split, content in coco.items():
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))


def generate_scenes(sizes: dict[str, int] = SIZES, seed: int = 0):
    """Yield (split, image id, scene, captions) of a dataset; no scene occurs twice."""
    used = set()
    for split, size in sizes.items():
        rng = Random(f"{seed} {split}")
        for _ in range(size):
            while (scene := random_scene(rng)) in used:
                pass
            used.add(scene)
            yield split, len(used), scene, make_captions(scene, rng)


# ---------------------------------------------------------------------------- attention


def named_things(caption: str, scene: Scene) -> dict[int, Thing]:
    """{position of a noun in the caption: the thing of the scene with that colour and name}."""
    words = [SYNONYMS.get(word, word) for word in caption.split()]
    things = {(thing.colour, thing.name): thing for thing in scene.things}
    return {t: things[pair] for t, pair in enumerate(pairwise(words), 1) if pair in things}


def attention_on_things(caption: str, maps: np.ndarray, scene: Scene) -> list:
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
    covered = [
        np.clip((start + thing.side) / IMAGE_SIDE * n - np.arange(n), 0, 1)
        - np.clip(start / IMAGE_SIDE * n - np.arange(n), 0, 1)
        for start, n in zip((thing.y, thing.x), weights.shape, strict=True)
    ]  # the part of each row and of each column
    return float(covered[0] @ weights @ covered[1])
