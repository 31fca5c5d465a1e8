"""A scene: one to three coloured objects on a background, without overlaps."""

from dataclasses import dataclass
from itertools import combinations
from random import Random

IMAGE_SIDE = 128  # pixels; images are square

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
STANDING = {"cat": "sits", "house": "stands", "car": "waits", "mushroom": "grows"}
FLYING = {"balloon": "floats", "kite": "flies", "butterfly": "flutters", "rocket": "zooms"}
OBJECTS = STANDING | FLYING  # name: verb
SIZE_WORDS = {  # side of the box in pixels: adjectives
    28: ("small", "little", "tiny"),
    36: (),
    42: (),
    52: ("large", "big", "huge"),
}
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
    colour, name, side = (rng.choice(list(table)) for table in (COLOURS, OBJECTS, SIZE_WORDS))
    x = rng.randrange(1, IMAGE_SIDE - side)
    y = rng.randrange(1, 66 - side) if name in FLYING else rng.randrange(100, 127) - side
    return Thing(colour, name, x, y, side, rng.random() < 0.5)


def relations(a: Thing, b: Thing) -> list[str]:
    """The position of box `a` relative to box `b`; empty if they overlap."""
    left, right = a.x + a.side <= b.x, b.x + b.side <= a.x
    above, below = a.y + a.side <= b.y, b.y + b.side <= a.y
    horizontal = ["to the left of"] * left + ["to the right of"] * right
    return horizontal + ["above", "over"] * above + ["below", "under"] * below
