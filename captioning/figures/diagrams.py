"""A diagram of the model and of its training, drawn from the configuration that is used."""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from PIL import ImageOps

from captioning.figures.plots import BLUE, GREY, ORANGE
from captioning.networks.attention import HIDDEN_RATIO
from captioning.networks.backbones import input_settings

PALE = {BLUE: "#e4eff6", ORANGE: "#fcece2", GREY: "#eef0f3"}
INK = "#495057"  # of arrows and sizes
SIZE = {"va": "center", "fontsize": 8.5, "color": INK, "family": "monospace"}  # of a tensor
TUNED = {"none": "frozen", "last": "last stage trained", "all": "trained"}
STEPS = 6  # that are drawn of a long caption
# in pixels
WIDTH, PITCH, LEFT = 900, 80, 330  # of the diagram; between steps; position of the first step
ROW, GAP, CELL = 34, 33, 54  # height of a row; of the arrows between rows; width of an LSTM cell
LOW = 22  # bottom of the inputs
RIGHT, TURN = 190, 222  # right edge of the encoder's boxes; where arrows from there turn up or down


@dataclass
class Row:
    """A layer of the decoder, which is the same at all steps."""

    text: str
    size: int  # of its output at one step
    recurrent: bool = False  # a cell per step, which passes its state on to the next step
    image: str = ""  # what of the image enters here: the text of its arrow
    y: float = 0  # of its middle, set by `architecture`

    @property
    def height(self):
        return ROW if self.recurrent else ROW + 8 * self.text.count("\n")


def architecture(
    config, vocab_size, feature_size, positions=49, words=("a", "cat"), image=None, ax=None
):
    """The encoder, and the decoder unrolled over a caption, as in training; returns the axes.

    config: a ModelConfig. feature_size: channels of the CNN's output. positions: of its last map,
    for inject attend. words: the caption; of a long one, the first words and the end are drawn.
    image: a PIL image to show as the input.
    """
    rows = decoder_rows(config, vocab_size)
    top = LOW + ROW + GAP
    for row in rows:
        row.y = top + row.height / 2
        top += row.height + GAP
    height = max(top + ROW + 46, 500)
    ax = ax or plt.figure(figsize=(WIDTH / 100, height / 100)).add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, height))
    ax.set_axis_off()
    for left, right, title in ((8, 200, "Encoder"), (210, WIDTH - 8, "Decoder, one step per word")):
        size = right - left, height - 16
        ax.add_patch(plt.Rectangle((left, 8), *size, fc="#fafbfc", ec="#dfe3e8"))
        ax.text(left + 12, height - 26, title, va="center", weight="bold", fontsize=11)
    note = "" if config.inject == "init" else "\n0: initial state of zeros"
    ax.text(20, 17, f"B captions of T tokens{note}", fontsize=8.5, color=INK)
    bottoms = [*(row.y - row.height / 2 for row in rows), top]
    draw_decoder(ax, rows, bottoms, steps(words, first=int(config.inject == "pre")))
    draw_sizes(ax, rows, bottoms)
    y = rows[{"pre": 0, "par": 1, "init": 1, "attend": 2}[config.inject]].y
    draw_encoder(ax, encoder_boxes(config, feature_size, positions), height - 44, y, image)
    draw_image_path(ax, config.inject, rows, y)
    return ax


# ---------------------------------------------------------------------------- the decoder


def decoder_rows(config, vocab_size) -> list[Row]:
    """The layers of the decoder from its input to the probabilities; `config`: a ModelConfig."""
    embed, hidden, attend = config.embed_size, config.hidden_size, config.inject == "attend"
    dropout = f",  dropout {config.dropout:g}" if config.dropout else ""
    scale = f",  times √{embed:,}" if attend else ""
    rows = [Row(f"embedding {vocab_size:,} × {embed:,}{scale}{dropout}", embed)]
    if attend:
        rows += attention_rows(config, dropout)
        linear = f"linear {hidden:,} → {embed:,},   linear {embed:,} → {vocab_size:,}"
        linear += " (embedding's weights)"
    else:
        if config.inject == "par":
            rows.append(Row("concatenate with v at every step", 2 * embed, image="v"))
        rows += [Row(f"LSTM\n{hidden:,}", hidden, True) for _ in range(config.num_layers)]
        linear = f"linear {hidden:,} → {vocab_size:,}"
        linear = f"{dropout.lstrip(', ')},  {linear}" if dropout else linear
    return [*rows, Row(linear, vocab_size), Row("softmax", vocab_size)]


def attention_rows(config, dropout) -> list[Row]:
    """The layers between the embedding and the output of a decoder with attention."""
    embed, hidden = config.embed_size, config.hidden_size
    query = hidden // HIDDEN_RATIO
    attention = f"query q = linear {query:,} → {embed:,};   a = softmax(q Kᵀ / √d) V"
    attention += f",  {config.num_heads} heads" if config.num_heads > 1 else ""
    attention += "\nconcatenate a with the output of the LSTM"
    shortcut = f"add linear {query + embed:,} → {hidden:,} of the LSTM's input{dropout}"
    return [
        Row("concatenate with the mean value", 2 * embed, image="mean value"),
        Row(f"LSTM\n{query:,}", query, recurrent=True),
        Row(attention, query + embed, image="keys, values"),
        Row(f"LSTM\n{hidden:,}", hidden, recurrent=True),
        Row(shortcut, hidden),
    ]


def steps(words, first=0) -> list:
    """(position, input, target) of each step that is drawn; the tokens of a gap are None.

    first: 1 leaves room for a step before `<start>`.
    """
    pairs = list(zip(["<start>", *words], [*words, "<end>"], strict=True))
    if len(pairs) > STEPS - first:
        pairs = [*pairs[: STEPS - first - 2], (None, None), pairs[-1]]
    return [(LEFT + PITCH * n, *pair) for n, pair in enumerate(pairs, first)]


def draw_decoder(ax, rows, bottoms, drawn):
    """Inputs, layers and targets from bottom to top; bottoms: of the layers and the targets."""
    left, right = drawn[0][0] - 33, LEFT + (STEPS - 1) * PITCH + 33  # room for text in any case
    recurrent = [row for row in rows if row.recurrent]
    low, high = LOW + ROW / 2, bottoms[-1] + ROW / 2
    for row in rows:
        if not row.recurrent:  # a bar over all steps
            box(ax, (left + right) / 2, row.y, right - left, row.height, row.text)
    for x, token, target in drawn:
        if token is None:
            for y in (low, *(row.y for row in recurrent), high):
                ax.text(x, y, "· · ·", ha="center", va="center")
            continue
        for text, y, colour in ((token, low, ORANGE), (target, high, BLUE)):
            text = text if len(text) <= 10 else text[:9] + "…"
            box(ax, x, y, PITCH - 14, ROW - 8, text, colour, va="center_baseline")
        for row in recurrent:
            cell(ax, x, row)
        for bottom in bottoms:
            arrow(ax, (x, bottom - GAP), (x, bottom))
    for row in recurrent:  # the state
        for x, _, _ in drawn[1:]:
            arrow(ax, (x - PITCH + CELL / 2, row.y), (x - CELL / 2, row.y))


def draw_sizes(ax, rows, bottoms):
    """The sizes of the tensors, to the right of the arrows that they belong to."""
    x = WIDTH - 18
    sizes = ["(B, T−1)", *(f"(B, T−1, {row.size:,})" for row in rows[:-1]), "loss: −log p"]
    for size, bottom in zip(sizes, bottoms, strict=True):
        ax.text(x, bottom - GAP / 2, size, ha="right", **SIZE)
    tokens = (LOW, "inputs", "captions[:, :-1]"), (bottoms[-1], "targets", "captions[:, 1:]")
    for bottom, name, code in tokens:
        ax.text(x, bottom + ROW / 2 + 8, name, ha="right", va="center", weight="bold")
        ax.text(x, bottom + ROW / 2 - 8, code, ha="right", **SIZE)


# ---------------------------------------------------------------------------- the encoder


def encoder_boxes(config, feature_size, positions) -> list:
    """(height, text, size of the output) of the image and the layers of the encoder, in order."""
    embed, attend = config.embed_size, config.inject == "attend"
    positions, output = (positions, 2 * embed) if attend else (1, embed)
    side = input_settings(config.backbone, config.image_size)["image_size"]
    cnn = f"{config.backbone.removeprefix('timm/')}\n{TUNED[config.fine_tune]}"
    linear = [f"dropout {config.feature_dropout:g}"] * bool(config.feature_dropout)
    linear += [f"linear {feature_size:,} → {output:,}"]
    linear += ["batch normalization"] * config.image_norm
    boxes = [
        (78, "image", f"(B, 3, {side}, {side})"),
        (56, cnn, f"(B, {positions}, {feature_size:,})"),
        (40, "\n".join(linear), f"(B, {positions}, {output:,})" if attend else f"(B, {output:,})"),
    ]
    if config.inject == "init":
        state = 2 * config.num_layers * config.hidden_size
        boxes.append((40, f"linear {embed:,} → {state:,}\ntanh(h), c", ""))
    return boxes


def draw_encoder(ax, boxes, top, y_last, image):
    """The `encoder_boxes` from `top` to the last one, whose middle is at `y_last`."""
    middle, width = (16 + RIGHT) / 2, RIGHT - 24
    bottom = y_last - boxes[-1][0] / 2
    gap = (top - bottom - sum(height for height, _, _ in boxes)) / (len(boxes) - 1)
    for number, (height, text, size) in enumerate(boxes):
        y, low = top - height / 2, top - height
        if number == 0 and image is not None:
            extent = (middle - height / 2, middle + height / 2, low, top)
            ax.imshow(ImageOps.fit(image, (192, 192)), extent=extent, aspect="auto", zorder=2)
        else:
            box(ax, middle, y, height if number == 0 else width, height, text, BLUE)
        top = low - gap
        if number < len(boxes) - 1:
            arrow(ax, (middle - 32, low), (middle - 32, top), colour=BLUE)
        ax.text(middle - 25, low - min(gap, 26) / 2, size, ha="left", **SIZE)


def draw_image_path(ax, inject, rows, y):
    """Arrows from the encoder's output at `y` to where it enters the decoder; initial states."""
    recurrent = [row for row in rows if row.recurrent]
    left = LEFT - CELL / 2  # edge of the first cells
    for row in rows:
        if row.image:
            start, end = y + np.sign(row.y - y) * 10, (LEFT - PITCH / 2 + 7, row.y)
            arrow(ax, (RIGHT, start), (TURN, start), (TURN, row.y), end, colour=BLUE)
            ax.text(226, row.y + 6, row.image, fontsize=8, color=BLUE)
    if inject == "pre":  # the image is the input of a step of its own, the first one
        ax.text(228, y + 6, "v", color=BLUE)
        arrow(ax, (RIGHT, y), (LEFT, y), (LEFT, recurrent[0].y - ROW / 2), colour=BLUE)
        for lower, upper in zip(recurrent[:-1], recurrent[1:], strict=True):
            arrow(ax, (LEFT, lower.y + ROW / 2), (LEFT, upper.y - ROW / 2), colour=BLUE)
        for row in recurrent:
            cell(ax, LEFT, row)
            arrow(ax, (LEFT + CELL / 2, row.y), (LEFT + PITCH - CELL / 2, row.y))
    for row in recurrent:
        if inject == "init":
            ax.text(228, row.y + 6, "h, c", color=BLUE, fontsize=9)
            arrow(ax, (RIGHT, y), (TURN, y), (TURN, row.y), (left, row.y), colour=BLUE)
        else:
            arrow(ax, (left - 18, row.y), (left, row.y))
            ax.text(left - 22, row.y, "0", ha="right", va="center", fontsize=9, color=INK)


# ---------------------------------------------------------------------------- shapes


def box(ax, x, y, width, height, text, colour=GREY, **options):
    """A rectangle centred at (x, y) with a text in it."""
    corner = x - width / 2, y - height / 2
    style = {"fc": PALE[colour], "ec": colour, "lw": 1.2, "zorder": 2}
    ax.add_patch(plt.Rectangle(corner, width, height, **style))
    defaults = {"ha": "center", "va": "center", "fontsize": 9, "linespacing": 1.3}
    ax.text(x, y, text, **defaults | options)


def cell(ax, x, row):
    """The LSTM of a recurrent row at the step at `x`."""
    box(ax, x, row.y, CELL, ROW, row.text, BLUE, fontsize=8.5, linespacing=1.1)


def arrow(ax, *points, colour=INK):
    """A line through `points`, with a head at the last one."""
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        ax.plot(*zip(start, end, strict=True), color=colour, lw=1.3, solid_capstyle="projecting")
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=style)
