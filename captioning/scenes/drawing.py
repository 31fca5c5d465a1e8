"""The image of a scene, drawn in exact integer arithmetic: identical on every machine.

artwork.json holds the paints, and the shapes of each object and background as steps such as
"#c03020 ellipse 10 10 90 90"; see `rasterize` and `fill_shape` for the syntax.
"""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from captioning.scenes.scene import IMAGE_SIDE, STANDING, Scene

SUPERSAMPLING = 4  # sub-pixels per pixel and axis, averaged for smooth edges
ARTWORK = json.loads((Path(__file__).parent / "artwork.json").read_text())
PAINTS = ARTWORK["paints"]


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
    canvas = rasterize(ARTWORK[name], IMAGE_SIDE, PAINTS, Random(f"{name} {variant}"))
    return downsample(canvas)[..., :3].astype(np.uint8)


@cache
def render_sprite(name: str, colour: str, side: int) -> np.ndarray:
    """An object as premultiplied RGBA, (side, side, 4), with a shadow and a cream outline."""
    body = rasterize(ARTWORK[name], side, PAINTS | ARTWORK["colours"][colour], Random(name))
    opaque = body[..., 3] > 0
    disc = [(i, j) for i in range(-5, 6) for j in range(-5, 6) if i * i + j * j <= 25]
    outline = np.any([np.roll(opaque, shift, (0, 1)) for shift in disc], axis=0)
    shadow = ARTWORK["shadow"] if name in STANDING else []
    canvas = rasterize(shadow, side, PAINTS, Random(name))
    canvas[outline] = rgba(PAINTS["cream"])
    canvas[opaque] = body[opaque]
    return downsample(canvas)


def downsample(canvas: np.ndarray) -> np.ndarray:
    """Average the sub-pixels of each pixel: (side * n, side * n, 4) -> (side, side, 4)."""
    n = SUPERSAMPLING
    return sum(canvas[i::n, j::n] for i in range(n) for j in range(n)) // n**2


def rasterize(steps: list[str], side: int, paints: dict[str, str], rng: Random) -> np.ndarray:
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
    start, end, opacity = parse_paint(paint, paints)
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
    part += mask * ((colour.astype(np.int32) - part) * opacity // 100)


def parse_paint(paint: str, paints: dict[str, str]) -> tuple[np.ndarray, np.ndarray, int]:
    """The colours at the top and at the bottom of a shape, and its opacity in percent."""
    paint, _, opacity = paint.partition("~")
    top, _, bottom = paint.partition("-")
    start, end = (rgba(paints.get(name, name)) for name in (top, bottom or top))
    return start, end, int(opacity or 100)


def rgba(paint: str) -> np.ndarray:
    """#rrggbb -> (4,) int32, opaque."""
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
