"""Diagrams of the model and of its training, drawn from the configuration that is used.

    architecture(model.config, len(model.vocab), model.encoder.feature_size, words=["a", "cat"])
    python diagrams.py      # writes docs/architecture.svg

Each function takes an optional `ax` and returns the axes.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from captioning.figures.plots import BLUE, GREY, ORANGE
from captioning.learning.options import ModelConfig
from captioning.networks.attention import HIDDEN_RATIO
from captioning.networks.backbones import input_settings

ROOT = Path(__file__).resolve().parents[2]
PALE = {BLUE: "#e4eff6", ORANGE: "#fcece2", GREY: "#eef0f3"}
INK = "#495057"  # of arrows and sizes
TUNED = {"none": "frozen", "last": "last stage trained", "all": "trained"}
STEPS = 6  # that are drawn of a long caption
# in pixels
WIDTH, PITCH, LEFT = 900, 80, 330  # of the diagram; between steps; position of the first step
ROW, GAP, CELL = 34, 33, 54  # height of a row; of the arrows between rows; width of an LSTM cell
RIGHT = 190  # right edge of the encoder's boxes


@dataclass
class Row:
    """A layer of the decoder, which is the same at all steps."""

    text: str
    size: int  # of its output at one step
    recurrent: bool = False  # a cell per step, which passes its state on to the next step
    image: str = ""  # what of the image enters here: the text of its arrow


def decoder_rows(config, vocab_size) -> list[Row]:
    """The layers of the decoder from its input to the probabilities; `config`: a ModelConfig."""
    embed, hidden = config.embed_size, config.hidden_size
    dropout = f",  dropout {config.dropout:g}" if config.dropout else ""
    scale = f",  times √{embed:,}" if config.inject == "attend" else ""
    embedding = Row(f"embedding {vocab_size:,} × {embed:,}{scale}{dropout}", embed)
    softmax = Row("softmax", vocab_size)
    if config.inject == "attend":
        query, heads = hidden // HIDDEN_RATIO, ""
        if config.num_heads > 1:
            heads = f",  {config.num_heads} heads"
        return [
            embedding,
            Row("concatenate with the mean value", 2 * embed, image="mean value"),
            Row(f"LSTM\n{query:,}", query, recurrent=True),
            Row(
                f"query q = linear {query:,} → {embed:,};   a = softmax(q Kᵀ / √d) V{heads}\n"
                "concatenate a with the output of the LSTM",
                query + embed,
                image="keys, values",
            ),
            Row(f"LSTM\n{hidden:,}", hidden, recurrent=True),
            Row(f"add linear {query + embed:,} → {hidden:,} of the LSTM's input{dropout}", hidden),
            Row(
                f"linear {hidden:,} → {embed:,},   "
                f"linear {embed:,} → {vocab_size:,} (embedding's weights)",
                vocab_size,
            ),
            softmax,
        ]
    rows = [embedding]
    if config.inject == "par":
        rows.append(Row("concatenate with v at every step", 2 * embed, image="v"))
    rows += [Row(f"LSTM\n{hidden:,}", hidden, recurrent=True)] * config.num_layers
    linear = f"linear {hidden:,} → {vocab_size:,}"
    return [*rows, Row(dropout.lstrip(", ") + ",  " * bool(dropout) + linear, vocab_size), softmax]


def architecture(
    config, vocab_size, feature_size, grid=(7, 7), words=("a", "cat"), image=None, ax=None
):
    """The encoder, and the decoder unrolled over a caption, as in training.

    config: a ModelConfig. feature_size: channels of the CNN's output. grid: (height, width) of its
    last map, which inject attend uses. words: the caption; of a long one, the first words and the
    end are drawn. image: a PIL image to show as the input.
    """
    rows = decoder_rows(config, vocab_size)
    heights = [ROW + 8 * row.text.count("\n") * (not row.recurrent) for row in rows]
    lows = 22 + ROW + GAP + np.cumsum([0, *(height + GAP for height in heights)])
    places = list(zip(lows[:-1] + np.array(heights) / 2, heights, strict=True))
    height = max(lows[-1] + ROW + 46, 500)
    ax = ax or plt.figure(figsize=(WIDTH / 100, height / 100)).add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, height))
    ax.set_axis_off()
    for left, right, title in ((8, 200, "Encoder"), (210, WIDTH - 8, "Decoder, one step per word")):
        panel = plt.Rectangle((left, 8), right - left, height - 16, fc="#fafbfc", ec="#dfe3e8")
        ax.add_patch(panel)
        ax.text(left + 12, height - 26, title, va="center", weight="bold", fontsize=11)
    x = steps(words, first=int(config.inject == "pre"))
    draw_tokens(ax, x, lows[-1] + ROW / 2, 22 + ROW / 2)
    for row, place in zip(rows, places, strict=True):
        draw_row(ax, row, x, *place)
    draw_sizes(ax, rows, [22 + ROW, *(y + h / 2 for y, h in places)])
    draw_encoder(ax, config, feature_size, grid, image, rows, [y for y, _ in places], height)
    note = "" if config.inject == "init" else "\n0: initial state of zeros"
    ax.text(20, 17, f"B captions of T tokens{note}", fontsize=8.5, color=INK)
    return ax


def steps(words, first=0) -> list:
    """(position, input, target) of each step that is drawn; the tokens of a gap are None.

    first: 1 leaves room for a step before `<start>`.
    """
    pairs = list(zip(["<start>", *words], [*words, "<end>"], strict=True))
    if len(pairs) > STEPS - first:
        pairs = [*pairs[: STEPS - first - 2], (None, None), pairs[-1]]
    return [(LEFT + PITCH * n, *pair) for n, pair in enumerate(pairs, first)]


# ---------------------------------------------------------------------------- the decoder


def draw_tokens(ax, x, top, bottom):
    """The targets above and the inputs below."""
    for position, *pair in x:
        for token, y, colour in zip(pair, (bottom, top), (ORANGE, BLUE), strict=True):
            if token is None:
                ax.text(position, y, "· · ·", ha="center", va="center")
            else:
                text = token if len(token) <= 10 else token[:9] + "…"
                box(ax, position, y, PITCH - 14, ROW - 8, text, colour, va="center_baseline")


def draw_row(ax, row, x, y, height):
    """A bar over all steps, or a cell per step; and the arrows to the next row."""
    if row.recurrent:
        draw_cells(ax, row.text, x, y, height)
    else:
        start, stop = x[0][0], LEFT + (STEPS - 1) * PITCH  # of a short caption too: room for text
        box(ax, (start + stop) / 2, y, stop - start + PITCH - 14, height, row.text)
    for position, token, _ in x:
        if token is not None:
            arrow(ax, (position, y - height / 2 - GAP), (position, y - height / 2))
    if row.text == "softmax":
        for position, token, _ in x:
            if token is not None:
                arrow(ax, (position, y + height / 2), (position, y + height / 2 + GAP))


def draw_cells(ax, text, x, y, height):
    """The same LSTM at each step, with its state as arrows between them."""
    for position, token, _ in x:
        if token is None:
            ax.text(position, y, "· · ·", ha="center", va="center")
        else:
            box(ax, position, y, CELL, height, text, BLUE, fontsize=8.5, linespacing=1.1)
    for position, _, _ in x[1:]:
        arrow(ax, (position - PITCH + CELL / 2, y), (position - CELL / 2, y))


def draw_sizes(ax, rows, tops):
    """The sizes of the tensors, to the right of the arrows that they belong to."""
    sizes = ["(B, T−1)", *(f"(B, T−1, {row.size:,})" for row in rows[:-1])]
    for size, top in zip(sizes, tops[:-1], strict=True):
        write_size(ax, WIDTH - 18, top + GAP / 2, size, "right")
    ax.text(
        WIDTH - 18,
        tops[-1] + GAP / 2,
        "loss: −log p",
        ha="right",
        va="center",
        fontsize=9,
        color=INK,
    )
    for y, name, code in (
        (tops[0] - ROW / 2, "inputs", "captions[:, :-1]"),
        (tops[-1] + GAP + ROW / 2, "targets", "captions[:, 1:]"),
    ):
        ax.text(WIDTH - 18, y + 8, name, ha="right", va="center", weight="bold")
        write_size(ax, WIDTH - 18, y - 8, code, "right")


# ---------------------------------------------------------------------------- the encoder


def draw_encoder(ax, config, feature_size, grid, image, rows, middles, height):
    """The image, the CNN and the linear layer from top to bottom, and where their output goes."""
    attend = config.inject == "attend"
    positions = grid[0] * grid[1] if attend else 1
    side = input_settings(config.backbone, config.image_size)["image_size"]
    output = 2 * config.embed_size if attend else config.embed_size
    boxes = [
        (78, "image", f"(B, 3, {side}, {side})"),
        (56, cnn_text(config), f"(B, {positions}, {feature_size:,})"),
        (
            40,
            linear_text(config, feature_size, output),
            f"(B, {positions}, {output:,})" if attend else f"(B, {output:,})",
        ),
    ]
    recurrent = [y for row, y in zip(rows, middles, strict=True) if row.recurrent]
    last = {"par": middles[1], "pre": middles[0], "init": recurrent[0], "attend": middles[2]}
    y_last = last[config.inject]
    if config.inject == "init":
        size = 2 * config.num_layers * config.hidden_size
        boxes.append((40, f"linear {config.embed_size:,} → {size:,}\ntanh(h), c", ""))
    draw_stack(ax, boxes, height - 44, y_last, image)
    draw_image_path(ax, config.inject, rows, middles, recurrent, y_last)


def cnn_text(config):
    lines = [config.backbone.removeprefix("timm/"), TUNED[config.fine_tune]]
    lines += ["mean with its flip"] * config.flip + ["outputs replaced by 0"] * config.no_image
    return "\n".join(lines)


def linear_text(config, feature_size, output):
    lines = [f"dropout {config.feature_dropout:g}"] * bool(config.feature_dropout)
    lines += [f"linear {feature_size:,} → {output:,}"]
    return "\n".join(lines + ["batch normalization"] * config.image_norm)


def draw_stack(ax, boxes, top, y_last, image):
    """Boxes (height, text, size of the output) from `top` to the last one, centred at `y_last`."""
    middle, width = (16 + RIGHT) / 2, RIGHT - 24
    bottom = y_last - boxes[-1][0] / 2
    gap = (top - bottom - sum(height for height, _, _ in boxes)) / (len(boxes) - 1)
    for number, (height, text, size) in enumerate(boxes):
        y = top - height / 2
        if number == 0 and image is not None:
            extent = (middle - height / 2, middle + height / 2, y - height / 2, y + height / 2)
            ax.imshow(centre_square(image), extent=extent, aspect="auto", zorder=2)
        else:
            box(ax, middle, y, height if number == 0 else width, height, text, BLUE)
        top -= height + gap
        if number < len(boxes) - 1:
            arrow(ax, (middle - 32, y - height / 2), (middle - 32, top), colour=BLUE)
        write_size(ax, middle - 25, y - height / 2 - min(gap, 26) / 2, size, "left")


def centre_square(image):
    """The part of an image that `images.eval_transform` uses."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((192, 192)))


def draw_image_path(ax, inject, rows, middles, recurrent, y):
    """Arrows from the encoder's output to where it enters the decoder; the initial states."""
    bar, cell = LEFT - PITCH / 2 + 7, LEFT - CELL / 2
    for row, middle in zip(rows, middles, strict=True):
        if row.image:
            start = y + np.sign(middle - y) * 10
            arrow(ax, (RIGHT, start), (222, start), (222, middle), (bar, middle), colour=BLUE)
            ax.text(226, middle + 6, row.image, fontsize=8, color=BLUE)
    if inject == "pre":
        arrow(ax, (RIGHT, y), (LEFT, y), (LEFT, recurrent[0] - ROW / 2), colour=BLUE)
        ax.text(228, y + 6, "v", color=BLUE)
        for lower, upper in zip(recurrent[:-1], recurrent[1:], strict=True):
            arrow(ax, (LEFT, lower + ROW / 2), (LEFT, upper - ROW / 2), colour=BLUE)
        for middle in recurrent:
            box(ax, LEFT, middle, CELL, ROW, rows[1].text, BLUE, fontsize=8.5, linespacing=1.1)
            arrow(ax, (LEFT + CELL / 2, middle), (LEFT + PITCH - CELL / 2, middle))
    for middle in recurrent:
        if inject == "init":
            arrow(ax, (RIGHT, y), (222, y), (222, middle), (cell, middle), colour=BLUE)
        else:
            arrow(ax, (cell - 18, middle), (cell, middle))
            ax.text(cell - 22, middle, "0", ha="right", va="center", fontsize=9, color=INK)
    if inject == "init":
        ax.text(228, y + 6, "h, c", color=BLUE, fontsize=9)


# ---------------------------------------------------------------------------- shapes


def box(ax, x, y, width, height, text, colour=GREY, **options):
    """A rectangle centred at (x, y) with a text in it."""
    corner = x - width / 2, y - height / 2
    patch = plt.Rectangle(corner, width, height, fc=PALE[colour], ec=colour, lw=1.2, zorder=2)
    ax.add_patch(patch)
    defaults = {"ha": "center", "va": "center", "fontsize": 9, "linespacing": 1.3}
    ax.text(x, y, text, **defaults | options)


def arrow(ax, *points, colour=INK):
    """A line through `points`, with a head at the last one."""
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        ax.plot(*zip(start, end, strict=True), color=colour, lw=1.3, solid_capstyle="projecting")
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=style)


def write_size(ax, x, y, size, side):
    ax.text(x, y, size, ha=side, va="center", fontsize=8.5, color=INK, family="monospace")


def main():
    parser = argparse.ArgumentParser(description="Write the figure of the README.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    out = parser.parse_args().out
    photo = ROOT / "photos" / "coffee.jpg"
    words = ["a", "cup", "of", "coffee", "and", "a", "spoon", "on", "a", "red", "saucer"]
    with Image.open(photo) as image, plt.rc_context({"svg.hashsalt": "0"}):
        ax = architecture(ModelConfig(), 9_000, 2_048, words=words, image=image)
        ax.figure.savefig(out / "architecture.svg", metadata={"Date": None})  # text as paths


if __name__ == "__main__":
    main()
