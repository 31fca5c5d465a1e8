"""Drawn scenes in exactly COCO's layout, so that everything runs before any download.

A scene shows one to three coloured objects before a background, and five captions describe it.
Each caption names every (colour, object) pair and the background, so `scene_of` can read any
caption, written or generated, back into facts and tell whether it is right.

    write_sample("data/sample")     # train/ val/ test/ annotations/captions_{train,val,test}.json

The files are the same, byte for byte, on every machine: shapes are filled in integer arithmetic,
and chance comes from `random.Random(str)`, whose stream is stable over Python versions.
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

VERSION = "1"  # raise it whenever a picture or a caption changes
SPLITS = {"train": 1600, "val": 200, "test": 200}  # scenes
SIDE = 128  # pixels, of the square picture
FINE = 4  # sub-pixels per pixel and axis; averaging them gives smooth edges

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
STANDING = {"cat": "sits", "house": "stands", "car": "waits", "mushroom": "grows"}
FLYING = {"balloon": "floats", "kite": "flies", "butterfly": "flutters", "rocket": "zooms"}
OBJECTS = STANDING | FLYING
SYNONYMS = {"kitten": "cat", "cottage": "house"}
SMALL, LARGE = ("small", "little", "tiny"), ("large", "big", "huge")
SIDES = {28: SMALL, 36: (), 42: (), 52: LARGE}  # pixels, of an object's box
BACKGROUNDS = {  # a preposition, and what to call the place: always by its name, for `scene_of`
    "beach": ("on", "the beach", "the sandy beach"),
    "meadow": ("in", "the meadow", "a grassy meadow"),
    "hill": ("on", "the snowy hill", "a snowy hill"),
    "desert": ("in", "the desert", "the sandy desert"),
    "city": ("in", "the city at night", "the dark city"),
    "lake": ("by", "the lake at sunset", "the calm lake"),
}


@dataclass(frozen=True)
class Thing:
    """A coloured object in a square box of `side` pixels, whose upper left pixel is (x, y)."""

    colour: str
    name: str
    x: int
    y: int
    side: int
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    background: str
    view: int  # which of the background's eight variants
    things: tuple[Thing, ...]


def random_scene(rng: Random, count: int | None = None) -> Scene:
    """One to three things, no two of the same colour and name, whose boxes do not overlap.

    `count` asks for a number of them; the dataset leaves it to chance.
    """
    background, view = rng.choice(list(BACKGROUNDS)), rng.randrange(8)
    count = count or rng.choice((1, 2, 2, 3, 3))
    while True:
        things = tuple(random_thing(rng) for _ in range(count))
        distinct = len({(thing.colour, thing.name) for thing in things}) == count
        if distinct and all(relations(a, b) for a, b in combinations(things, 2)):
            return Scene(background, view, things)


def random_thing(rng: Random) -> Thing:
    colour, name, side = (rng.choice(list(table)) for table in (COLOURS, OBJECTS, SIDES))
    x = rng.randrange(1, SIDE - side)
    y = rng.randrange(1, 66 - side) if name in FLYING else rng.randrange(100, 127) - side
    return Thing(colour, name, x, y, side, rng.random() < 0.5)


def relations(a: Thing, b: Thing) -> list[str]:
    """Where `a` is, seen from `b`: true of their whole boxes, and empty if these overlap."""
    left, right = a.x + a.side <= b.x, b.x + b.side <= a.x
    above, below = a.y + a.side <= b.y, b.y + b.side <= a.y
    across = ["to the left of"] * left + ["to the right of"] * right
    return across + ["above", "over"] * above + ["below", "under"] * below


def describe(scene: Scene, rng: Random) -> list[str]:
    """Five different captions of at most 18 words."""
    captions = []
    while len(captions) < 5:
        caption = sentence(scene, rng)
        if caption not in captions and len(caption.split()) <= 18:
            captions.append(caption)
    return captions


def sentence(scene: Scene, rng: Random) -> str:
    things = list(scene.things)
    rng.shuffle(things)
    first, *others = things
    one, *more = (noun_phrase(thing, rng) for thing in things)
    rest = " and ".join(more)
    everything = ", ".join([one, rest]) if len(more) == 2 else " and ".join([one, *more])
    verb, (preposition, *nouns) = OBJECTS[first.name], BACKGROUNDS[scene.background]
    noun = rng.choice(nouns)
    place = f"{preposition} {noun}"
    picture = rng.choice(("a picture", "a drawing", "an image"))
    ways = [f"{everything} {place}", f"{noun} with {everything}"]
    ways += [f"there is {everything} {place}", f"{picture} of {everything} {place}"]
    if not others:
        ways += [f"{one} {verb} {'over ' + noun if first.name in FLYING else place}"] * 2
    for relation in relations(first, others[0]) if others else []:
        if all(relation in relations(first, other) for other in others):
            ways += [f"{one} {relation} {rest} {place}", f"{one} {verb} {relation} {rest} {place}"]
    return rng.choice(ways).capitalize() + "."


def noun_phrase(thing: Thing, rng: Random) -> str:
    """For example `a small red cat`."""
    name = rng.choice([thing.name] * 3 + [word for word, n in SYNONYMS.items() if n == thing.name])
    words = [thing.colour, name]
    if SIDES[thing.side] and rng.random() < 0.3:
        words.insert(0, rng.choice(SIDES[thing.side]))
    return " ".join(["an" if words[0] == "orange" else "a", *words])


def scene_of(caption: str) -> tuple[str | None, Counter[tuple[str, str]]]:
    """The background (None if none, or several) of a caption, and its (colour, object) pairs.

    They are counted: no scene has the same pair twice, so a caption that repeats one is wrong.
    """
    words = [SYNONYMS.get(word, word) for word in re.findall("[a-z]+", caption.lower())]
    places = set(words) & set(BACKGROUNDS)
    pairs = Counter(p for p in pairwise(words) if p[0] in COLOURS and p[1] in OBJECTS)
    return places.pop() if len(places) == 1 else None, pairs


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of SIDE x SIDE pixels."""
    image = backdrop(scene.background, scene.view).copy()
    for thing in scene.things:
        sprite = cutout(thing.name, thing.colour, thing.side)[:, :: -1 if thing.mirrored else 1]
        spot = image[thing.y : thing.y + thing.side, thing.x : thing.x + thing.side]
        spot[:] = sprite[..., :3] + spot * (255 - sprite[..., 3:]) // 255
    return Image.fromarray(image)


@cache
def backdrop(name: str, view: int) -> np.ndarray:
    """The background's pixels, (SIDE, SIDE, 3); odd views mirror the even ones."""
    if view % 2:
        return backdrop(name, view - 1)[:, ::-1]
    art = paint(artwork()[name], SIDE, artwork()["paints"], Random(f"{name} {view}"))
    return shrink(art)[..., :3].astype(np.uint8)


@cache
def cutout(name: str, colour: str, side: int) -> np.ndarray:
    """An object's premultiplied RGBA, (side, side, 4), with a pale rim, as if cut from paper."""
    paints = artwork()["paints"] | artwork()["colours"][colour]
    art = paint(artwork()[name], side, paints, Random(name))
    solid = art[..., 3] > 0
    around = [(i, j) for i in range(-5, 6) for j in range(-5, 6) if i * i + j * j <= 25]
    rim = np.any([np.roll(solid, shift, (0, 1)) for shift in around], axis=0)
    canvas = paint(artwork()["shadow"] if name in STANDING else [], side, paints, Random(name))
    canvas[rim] = rgba(paints["cream"])
    canvas[solid] = art[solid]
    return shrink(canvas)


@cache
def artwork() -> dict:
    return json.loads((Path(__file__).parent / "sample_drawings.json").read_text())


def shrink(canvas: np.ndarray) -> np.ndarray:
    """Averages every FINE x FINE sub-pixels to a pixel."""
    return sum(canvas[i::FINE, j::FINE] for i in range(FINE) for j in range(FINE)) // FINE**2


def paint(drawing: list[str], side: int, paints: dict[str, str], rng: Random) -> np.ndarray:
    """Carries out a drawing on premultiplied RGBA sub-pixels, (side * FINE, side * FINE, 4).

    A step is `paint shape x y x y ...` in percent of the canvas. The paint is #rrggbb or a name,
    with a second one for a gradient (`top-bottom`) and its opacity in percent after a `~`; see
    `covers` for the shapes. `a & b @ n x y x y` draws a and b n times, moved together at random.
    """
    canvas = np.zeros((side * FINE, side * FINE, 4), np.int32)
    for step in drawing:
        shapes, _, repeat = step.partition("@")
        count, *area = [int(word) for word in repeat.split()] or [1, 0, 0, 1, 1]
        for _ in range(count):
            shift = rng.randrange(area[0], area[2]), rng.randrange(area[1], area[3])
            for shape in shapes.split("&"):
                fill(canvas, shape.split(), shift, paints)
    return canvas


def fill(canvas: np.ndarray, words: list[str], shift: tuple[int, int], paints: dict) -> None:
    """Paints one shape. Lengths are in half sub-pixels, so that pixel centres are odd integers."""
    tone, shape, *numbers = words
    tone, _, opacity = tone.partition("~")
    first, _, last = tone.partition("-")
    start, end = (rgba(paints.get(name, name)) for name in (first, last or first))
    shape, _, width = shape.partition(":")
    size = len(canvas)
    dx, dy, width, *n = (int(v) * 2 * size // 100 for v in (*shift, width or 1, *numbers))
    width = max(width, FINE)
    top, bottom = min(n[1::2]), max(n[1::2])
    rows = slice(max(0, (top + dy - width) // 2), max(0, (bottom + dy + width) // 2 + 1))
    cols = slice(max(0, (min(n[::2]) + dx - width) // 2), (max(n[::2]) + dx + width) // 2 + 1)
    centres = 2 * np.arange(size, dtype=np.int64) + 1
    x, y = centres[None, cols] - dx, centres[rows, None] - dy
    colour = start + (end - start) * (y[..., None] - top) // max(1, bottom - top)
    part, inside = canvas[rows, cols], covers(shape, n, width, x, y)[..., None]
    part += inside * ((colour.astype(np.int32) - part) * int(opacity or 100) // 100)


def rgba(paint: str) -> np.ndarray:
    return np.array([*bytes.fromhex(paint[1:]), 255], np.int32)


def covers(shape: str, n: list[int], width: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in the shape, exactly.

    ellipse x y x y ...  between opposite corners, as is its upper half, a dome x y x y ...
    polygon x y ...      from corner to corner
    line:3 x y ...       through the points, reaching 3 % of the canvas (1 % by default) around
    """
    points = list(zip(n[0::2], n[1::2], strict=True))
    hit = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    if shape in ("ellipse", "dome"):
        for (ax, ay), (bx, by) in zip(points[0::2], points[1::2], strict=True):
            w, h = bx - ax, by - ay
            hit |= ((2 * x - ax - bx) * h) ** 2 + ((2 * y - ay - by) * w) ** 2 <= (w * h) ** 2
        return hit & (2 * y <= n[1] + n[3]) if shape == "dome" else hit
    if shape == "polygon":
        for a, b in pairwise(points + points[:1]):
            (ax, ay), (bx, by) = sorted((a, b), key=lambda point: point[1])
            # Every edge that a point's row meets on its left takes it in or out again.
            hit ^= (ay <= y) & (y < by) & ((x - ax) * (by - ay) > (bx - ax) * (y - ay))
        return hit
    for (ax, ay), (bx, by) in pairwise(points):
        length = (bx - ax) ** 2 + (by - ay) ** 2  # squared, as is the distance below
        along = np.clip((x - ax) * (bx - ax) + (y - ay) * (by - ay), 0, length)
        off_x, off_y = (x - ax) * length - along * (bx - ax), (y - ay) * length - along * (by - ay)
        hit |= off_x**2 + off_y**2 <= (width * length) ** 2
    return hit


def write_sample(root, sizes: dict[str, int] = SPLITS, seed: int = 0) -> dict[str, tuple]:
    """Writes the splits below `root`, unless they are there: {split: (image folder, captions)}.

    Raises FileExistsError if something else is there, or a drawn dataset that is not whole.
    """
    root = Path(root)
    files = {name: (root / name, root / "annotations" / f"captions_{name}.json") for name in sizes}
    info = {"description": "Drawn scenes with made-up captions: no photographs."}
    info |= {"version": VERSION, "contributor": "sample_data.py", "sizes": sizes, "seed": seed}
    if not is_written(files, info):
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
            write_splits(Path(folder) / "sample", info)
            try:
                os.replace(Path(folder) / "sample", root)  # appears whole or not at all
            except OSError:
                if not is_written(files, info):  # by another process, meanwhile
                    raise FileExistsError(
                        f"{root} holds something else, or a drawn dataset that is not whole or of "
                        "another version: delete the folder if it is drawn, or choose another"
                    ) from None
    return files


def is_written(files: dict[str, tuple[Path, Path]], info: dict) -> bool:
    return all(
        info_of(captions) == info and len(list(images.glob("*.jpg"))) == info["sizes"][split]
        for split, (images, captions) in files.items()
    )


def info_of(captions: Path) -> dict | None:
    """What a captions file says of itself; None if it is missing or damaged."""
    try:
        return json.loads(captions.read_text())["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_splits(root: Path, info: dict) -> None:
    seen = set()  # scenes, so that no two splits share one
    (root / "annotations").mkdir(parents=True)
    for split, size in info["sizes"].items():
        (root / split).mkdir()
        rng = Random(f"{info['seed']} {split}")
        coco = {"info": info, "licenses": [{"id": 1, "name": "Drawn by a program", "url": ""}]}
        coco |= {"images": [], "annotations": []}
        for _ in range(size):
            while (scene := random_scene(rng)) in seen:
                pass
            seen.add(scene)
            number = len(seen)
            image = {"id": number, "file_name": f"{number:012d}.jpg", "license": 1}
            coco["images"].append(image | {"width": SIDE, "height": SIDE})
            draw(scene).save(root / split / image["file_name"], quality=95, subsampling=0)
            for i, text in enumerate(describe(scene, rng)):
                caption = {"id": 5 * number + i, "image_id": number, "caption": text}
                coco["annotations"].append(caption)
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(coco))
