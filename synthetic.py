"""Synthetic scenes in COCO's layout: a dataset that needs no download.

A scene is one to three coloured objects on a background, with five captions. Each caption names
every (colour, object) pair and the background, so `parse_scene` can turn any caption, a reference
or a generated one, back into facts that can be compared with the image.

    write_synthetic("data/synthetic")  # train/*.jpg, annotations/captions_train.json, val/ ...

The files are identical, byte for byte, on every machine: shapes are rasterised in integer
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

VERSION = "2"  # to be raised with every change of the files
SIZES = {"train": 1600, "val": 200, "test": 200}  # scenes per split
IMAGE_SIDE = 128  # pixels; images are square
SUPERSAMPLING = 4  # sub-pixels per pixel and axis, averaged for smooth edges

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
    canvas = rasterise(artwork()[name], IMAGE_SIDE, artwork()["paints"], rng)
    return downsample(canvas)[..., :3].astype(np.uint8)


@cache
def render_sprite(name: str, colour: str, side: int) -> np.ndarray:
    """An object as premultiplied RGBA, (side, side, 4), with a shadow and a cream outline."""
    paints = artwork()["paints"] | artwork()["colours"][colour]
    body = rasterise(artwork()[name], side, paints, Random(name))
    opaque = body[..., 3] > 0
    disc = [(i, j) for i in range(-5, 6) for j in range(-5, 6) if i * i + j * j <= 25]
    outline = np.any([np.roll(opaque, shift, (0, 1)) for shift in disc], axis=0)
    shadow = artwork()["shadow"] if name in STANDING else []
    canvas = rasterise(shadow, side, paints, Random(name))
    canvas[outline] = rgba(paints["cream"])
    canvas[opaque] = body[opaque]
    return downsample(canvas)


@cache
def artwork() -> dict:
    """Shapes and paints; see `rasterise` and `fill_shape` for the syntax."""
    return json.loads((Path(__file__).parent / "synthetic_artwork.json").read_text())


def downsample(canvas: np.ndarray) -> np.ndarray:
    """Average the sub-pixels of each pixel."""
    n = SUPERSAMPLING
    return sum(canvas[i::n, j::n] for i in range(n) for j in range(n)) // n**2


def rasterise(steps: list[str], side: int, paints: dict[str, str], rng: Random) -> np.ndarray:
    """Fill shapes in order: premultiplied RGBA sub-pixels, (side * n, side * n, 4), int32.

    A step is `paint shape x y x y ...`, see `fill_shape`. `a & b @ n x0 y0 x1 y1` fills shapes a
    and b n times, shifted together by random amounts in x0..x1 and y0..y1.
    """
    canvas = np.zeros((side * SUPERSAMPLING, side * SUPERSAMPLING, 4), np.int32)
    for step in steps:
        shapes, _, repeat = step.partition("@")
        count, x0, y0, x1, y1 = [int(word) for word in repeat.split()] or [1, 0, 0, 1, 1]
        for _ in range(count):
            shift = rng.randrange(x0, x1), rng.randrange(y0, y1)
            for shape in shapes.split("&"):
                fill_shape(canvas, shape.split(), shift, paints)
    return canvas


def fill_shape(canvas: np.ndarray, words: list[str], shift: tuple[int, int], paints: dict) -> None:
    """Fill one shape, given as `paint shape x y x y ...` in percent of the canvas.

    The paint is #rrggbb or a name, optionally `top-bottom` for a vertical gradient and `~opacity`
    in percent. `line:3` is 3 % of the canvas wide on either side (default 1 %).
    """
    paint, shape, *numbers = words
    paint, _, opacity = paint.partition("~")
    first, _, last = paint.partition("-")
    start, end = (rgba(paints.get(name, name)) for name in (first, last or first))
    shape, _, width = shape.partition(":")
    size = len(canvas)
    # Lengths are in half sub-pixels, so that the centres of sub-pixels are odd integers.
    dx, dy, width, *n = (int(v) * 2 * size // 100 for v in (*shift, width or 1, *numbers))
    width = max(width, SUPERSAMPLING)
    left, right, top, bottom = min(n[::2]), max(n[::2]), min(n[1::2]), max(n[1::2])
    rows = slice(max(0, (top + dy - width) // 2), max(0, (bottom + dy + width) // 2 + 1))
    cols = slice(max(0, (left + dx - width) // 2), max(0, (right + dx + width) // 2 + 1))
    centres = 2 * np.arange(size, dtype=np.int64) + 1
    x, y = centres[None, cols] - dx, centres[rows, None] - dy
    colour = start + (end - start) * (y[..., None] - top) // max(1, bottom - top)
    part, mask = canvas[rows, cols], shape_mask(shape, n, width, x, y)[..., None]
    part += mask * ((colour.astype(np.int32) - part) * int(opacity or 100) // 100)


def rgba(paint: str) -> np.ndarray:
    return np.array([*bytes.fromhex(paint[1:]), 255], np.int32)


def shape_mask(shape: str, n: list[int], width: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points (x, y) are inside the shape with coordinates n, in exact arithmetic.

    ellipse x y x y ...  one ellipse per pair of opposite corners; dome: their upper halves
    polygon x y ...      its corners, in order
    line x y ...         all points within `width` of the line through these points
    """
    points = list(zip(n[0::2], n[1::2], strict=True))
    mask = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    if shape in ("ellipse", "dome"):
        for (x0, y0), (x1, y1) in zip(points[0::2], points[1::2], strict=True):
            w, h = x1 - x0, y1 - y0
            mask |= ((2 * x - x0 - x1) * h) ** 2 + ((2 * y - y0 - y1) * w) ** 2 <= (w * h) ** 2
        return mask & (2 * y <= n[1] + n[3]) if shape == "dome" else mask
    if shape == "polygon":  # inside, a point has an odd number of edges on its left
        for a, b in pairwise(points + points[:1]):
            (x0, y0), (x1, y1) = sorted((a, b), key=lambda point: point[1])
            mask ^= (y0 <= y) & (y < y1) & ((x - x0) * (y1 - y0) > (x1 - x0) * (y - y0))
        return mask
    for (x0, y0), (x1, y1) in pairwise(points):
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2  # squared, as is the distance below
        along = np.clip((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0), 0, length)
        off_x, off_y = (x - x0) * length - along * (x1 - x0), (y - y0) * length - along * (y1 - y0)
        mask |= off_x**2 + off_y**2 <= (width * length) ** 2
    return mask


def write_synthetic(root, sizes: dict[str, int] = SIZES, seed: int = 0) -> dict[str, tuple]:
    """Write the dataset to `root` unless it is there; {split: (image folder, captions file)}.

    Raises FileExistsError if `root` holds anything else, or an incomplete or outdated dataset.
    """
    root = Path(root)
    files = {name: (root / name, root / "annotations" / f"captions_{name}.json") for name in sizes}
    info = {"description": "Synthetic scenes with generated captions; no photographs."}
    info |= {"version": VERSION, "contributor": "synthetic.py", "sizes": sizes, "seed": seed}
    if not is_written(files, info):
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
            write_splits(Path(folder) / "complete", info)
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


def write_splits(root: Path, info: dict) -> None:
    used = set()  # scenes; each is in one split only
    (root / "annotations").mkdir(parents=True)
    for split, size in info["sizes"].items():
        (root / split).mkdir()
        rng = Random(f"{info['seed']} {split}")
        coco = {"info": info, "licenses": [{"id": 1, "name": "Generated by a program", "url": ""}]}
        coco |= {"images": [], "annotations": []}
        for _ in range(size):
            while (scene := random_scene(rng)) in used:
                pass
            used.add(scene)
            number = len(used)
            image = {"id": number, "file_name": f"{number:012d}.jpg", "license": 1}
            coco["images"].append(image | {"width": IMAGE_SIDE, "height": IMAGE_SIDE})
            render(scene).save(root / split / image["file_name"], quality=95, subsampling=0)
            coco["annotations"] += [
                {"id": 5 * number + i, "image_id": number, "caption": caption}
                for i, caption in enumerate(make_captions(scene, rng))
            ]
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(coco))
