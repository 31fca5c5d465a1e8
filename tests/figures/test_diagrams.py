"""The architecture diagram says what the model computes, and its texts can be read."""

import re
from itertools import combinations

import matplotlib
import pytest
import torch
from PIL import Image

matplotlib.use("Agg")  # draws without a display

import matplotlib.pyplot as plt

from captioning.figures.diagrams import architecture, decoder_rows, steps
from captioning.learning.options import ModelConfig
from model import CaptionModel

WORDS = ["<pad>", "<start>", "<end>", "<unk>", *(f"word{n}" for n in range(1100))]
CONFIGS = [
    {"inject": "par"},
    {"inject": "pre"},
    {"inject": "init"},
    {"inject": "attend"},
    {"inject": "pre", "num_layers": 2, "image_norm": True},
    {"inject": "init", "num_layers": 2, "feature_dropout": 0.5},
    {"inject": "attend", "num_heads": 4, "fine_tune": "all"},
]
each_config = pytest.mark.parametrize("options", CONFIGS, ids=str)


def config_of(options):
    sizes = {"backbone": "mobilenet_v3_small", "image_size": 64, "precision": "float32"}
    return ModelConfig(**sizes, embed_size=24, hidden_size=40, **options)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def texts_of(ax):
    return [text for text in ax.texts if text.get_text().strip()]


@each_config
def test_sizes_are_those_of_the_model(options):
    """The size of each row's output is the size of that tensor in a forward pass of the model."""
    config = config_of(options)
    model, sizes = CaptionModel(WORDS, config, weights=None).eval(), {}
    for name, module in model.decoder.named_modules():

        def record(_, __, output, name=name):
            sizes[name] = (output[0] if isinstance(output, tuple) else output).size(-1)

        module.register_forward_hook(record)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64), torch.ones(1, 4).long())
    decoder, last = model.decoder, [sizes["linear"], len(WORDS)]
    if config.inject == "attend":
        inputs = decoder.attention_lstm.input_size, decoder.language_lstm.input_size
        middle = [inputs[0], sizes["attention_lstm"], inputs[1], sizes["language_lstm"]]
        middle.append(sizes["shortcut"])
    else:
        concatenated = [decoder.lstm.input_size] * (config.inject == "par")
        middle = [*concatenated, *[sizes["lstm"]] * config.num_layers]
    rows = decoder_rows(config, len(WORDS))
    assert [row.size for row in rows] == [sizes["embedding"], *middle, *last]


@each_config
def test_layers_are_those_of_the_model(options):
    """The sizes `a → b` in the diagram are the linear layers of the model, and no others."""
    config = config_of(options)
    model = CaptionModel(WORDS, config, weights=None)
    layers = [m for part in (model.encoder.linear, model.decoder) for m in part.modules()]
    linear = [(m.in_features, m.out_features) for m in layers if isinstance(m, torch.nn.Linear)]
    ax = architecture(config, len(WORDS), model.encoder.feature_size)
    drawn = re.findall(r"([\d,]+) → ([\d,]+)", "\n".join(t.get_text() for t in texts_of(ax)))
    drawn = [(int(a.replace(",", "")), int(b.replace(",", ""))) for a, b in drawn]
    assert sorted(drawn) == sorted(linear)


@each_config
def test_number_of_cells(options):
    """Each LSTM layer has a cell per step, and with `pre` one more for the image."""
    config = config_of(options)
    ax = architecture(config, 1000, 576, words=["a", "red", "cat"])
    cells = [text for text in texts_of(ax) if text.get_text().startswith("LSTM\n")]
    layers = 2 if config.inject == "attend" else config.num_layers
    assert len(cells) == layers * (5 if config.inject == "pre" else 4)


@each_config
@pytest.mark.parametrize("count", [1, 4, 12])
def test_texts_can_be_read(options, count):
    """All texts are within the figure, and no two of them overlap."""
    config = ModelConfig(**options)
    words = ["a", "photographer", "walks"] * 4
    ax = architecture(config, 10_004, 2_048, words=words[:count], image=Image.new("RGB", (60, 40)))
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(ax)]
    for text, extent in boxes:
        assert extent.x0 >= 0 and extent.y0 >= 0, text
        assert extent.x1 <= ax.bbox.x1 and extent.y1 <= ax.bbox.y1, text
    for (one, extent), (other, second) in combinations(boxes, 2):
        assert not extent.overlaps(second), (one, other)


def test_steps_are_shifted():
    """Each input is the target of the step before; a long caption has a gap before its end."""
    short = [pair[1:] for pair in steps(["a", "cat"])]
    assert short == [("<start>", "a"), ("a", "cat"), ("cat", "<end>")]
    long = [pair[1:] for pair in steps([f"w{n}" for n in range(1, 10)])]
    assert long[:2] == [("<start>", "w1"), ("w1", "w2")]
    assert long[-2:] == [(None, None), ("w9", "<end>")]
