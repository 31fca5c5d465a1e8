"""Attention as a colour over photographs and scenes, and the probabilities of a caption's words."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

matplotlib.use("Agg")  # draws without a display

from captioning.decoding.decoded import Decoded
from captioning.figures.attention import (
    CaptionedScene,
    attention_on_photograph,
    attention_on_scene,
    attention_overlay,
    attention_step,
    caption_scenes,
    print_shares,
    show_right_scene,
    weight_grid,
)
from captioning.figures.inference import caption_with_probabilities, show_captions
from captioning.scenes.drawing import render
from captioning.scenes.scene import Scene, Thing

IMAGE = Image.new("RGB", (60, 60), "white")
CAT, KITE = Thing("red", "cat", 64, 64, 32, False), Thing("blue", "kite", 0, 0, 32, False)


@pytest.fixture
def scene():
    """Two objects, each with all attention in its box at its noun."""
    words = ["a", "red", "cat", "and", "a", "blue", "kite", "in", "the", "meadow"]
    maps = np.full((len(words), 4, 4), 1 / 16)
    maps[2], maps[6] = 0, 0
    maps[2, 2, 2], maps[6, 0, 0] = 1, 1
    found = Scene("meadow", 0, (CAT, KITE))
    return CaptionedScene(found, render(found), " ".join(words), maps)


def titles(axes):
    return [ax.get_title(loc="left") for ax in axes]


def test_overlay():
    """The opacity is the strength, the grid has the positions of the map, and boxes are drawn."""
    strength = np.array([[0.0, 1.0], [0.5, 0.0]])
    axes = attention_overlay(IMAGE, ["cat"], [strength], ["50%"], {0: (1, 2, 3, 4)})
    assert titles(axes)[:2] == ["the image", "cat: 50%"]
    np.testing.assert_allclose(axes[1].images[1].get_array()[..., 3], 0.9 * strength)
    assert [len(lines.get_segments()) for lines in axes[1].collections] == [3, 3]
    (box,) = axes[1].patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (1, 2, 3, 4)


def test_photograph(tmp_path):
    """The words that differ most from the mean, with the share of the positions above the mean."""
    IMAGE.save(tmp_path / "a.png")
    maps = np.full((3, 2, 2), 0.25)
    maps[1] = [[0.7, 0.1], [0.1, 0.1]]
    axes = attention_on_photograph(tmp_path / "a.png", "a cat sleeps", maps)
    assert "cat: 70% (average 40%)" in titles(axes)


def test_scene(scene, capsys):
    """Each noun has the box of its object and the share of the attention in it."""
    axes = attention_on_scene(scene)
    assert titles(axes) == ["the image", "cat: 100% in the box", "kite: 100% in the box"]
    assert [ax.patches[0].get_xy() for ax in axes[1:]] == [(64, 64), (0, 0)]
    print_shares([scene])
    assert "2 objects" in (out := capsys.readouterr().out) and "6.2%" in out and "100.0%" in out
    one = scene._replace(caption="a red cat", maps=scene.maps[:3])
    assert titles(show_right_scene([one, scene])) == titles(axes)
    assert show_right_scene([one]) is None


@pytest.mark.parametrize("model, dataset", [(None, "synthetic"), (object(), "coco2017")])
def test_without_a_model_of_scenes(model, dataset, capsys):
    """Without a model that was trained on scenes, there is a sentence instead of numbers."""
    assert caption_scenes(model, dataset, 40) == []
    print_shares([])
    assert capsys.readouterr().out.count("\n") == 1


class Model:
    """A model that always says "a cat"."""

    def preprocess(self, images):
        return torch.zeros(1, 3)

    def generate(self, images, beam_size):
        log_probs = torch.tensor([[[0.5, 0.25, 1.0]]]).log()
        return Decoded(torch.tensor([[[4, 5, 2]]]), log_probs, None, None, None)

    def decode(self, decoded):
        return [["a cat"]]


def test_probabilities(tmp_path):
    """A bar per word, without <end>."""
    IMAGE.save(tmp_path / "a.png")
    ax = caption_with_probabilities(Model(), tmp_path / "a.png")
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.5, 0.25])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "cat"]


def test_captions_of_photographs(tmp_path):
    """One column per photograph."""
    IMAGE.save(tmp_path / "a.png")
    axes = show_captions([tmp_path / "a.png"] * 2, ["a", "b"], ["a a", "b b"], [0.5, 1])
    assert len(axes) == 2
    texts = [text.get_text() for text in axes[0].figure.texts]
    assert texts == ["a", "longer: a a", "confidence 0.50", "b", "longer: b b", "confidence 1.00"]


WIDE = Image.new("RGB", (20, 10))
WEIGHTS = np.array([[0.6, 0.2, 0.0, 0.0], [0.191, 0.009, 0.0, 0.0]])


def test_weight_grid():
    """Each weight of at least 1 % is written into its position, as a percentage."""
    ax = weight_grid(WIDE, WEIGHTS, "title", boxes=[(1, 2, 3, 4)])
    found = {text.get_position(): text.get_text() for text in ax.texts}
    assert found == {(2.5, 2.5): "60", (7.5, 2.5): "20", (2.5, 7.5): "19"}
    (box,) = ax.patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (1, 2, 3, 4)
    overlay = ax.images[1].get_array()
    assert np.allclose(overlay[..., 3] / overlay[0, 0, 3], WEIGHTS / 0.6)


def test_attention_step():
    """The diagram has the words read, the word predicted, both LSTMs and five arrows."""
    ax = attention_step(WIDE, WEIGHTS, ["a", "blue"], "cat")
    written = [text.get_text() for text in ax.texts]
    assert {"a blue", "cat", "attention LSTM", "language LSTM"} < set(written)
    assert written.count("") == 5
    assert ax.figure.axes[0].get_title() == "8 positions and their weights in %"
