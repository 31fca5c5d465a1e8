"""Which captions are wrong, and the pictures that say why."""

import math

import matplotlib
import pytest
from PIL import Image

matplotlib.use("Agg")  # draws without a display

from captioning.figures.image_text import RED
from captioning.figures.mistakes import (
    compare_captions,
    examples_of_kinds,
    in_words,
    known_mistakes,
    report_of_right,
    share_right,
    show_examples,
)
from captioning.figures.plots import BLUE

ACTUAL = "A red cat and a blue car in the meadow."
PREDICTED = ["a red cat and a blue car in the meadow", "a blue cat in the meadow"]
PAIR = PREDICTED, [ACTUAL] * 2


def test_mistakes_are_known_for_scenes_only():
    """Of photographs nobody knows which captions are right: no share is reported."""
    right, wrong = known_mistakes("synthetic", *PAIR)
    assert not right and in_words(wrong) == "colour: blue instead of red cat; missing: blue car"
    assert share_right("synthetic", *PAIR) == 0.5
    assert report_of_right("synthetic", *PAIR) == {"scenes exactly right": 0.5}
    assert known_mistakes("coco2017", *PAIR) == [[], []]
    assert math.isnan(share_right("coco2017", *PAIR)) and report_of_right("coco2017", *PAIR) == {}


def test_compare_captions():
    """A caption that was compared has a mark, with its mistakes below; an actual one has none."""
    right, wrong = known_mistakes("synthetic", *PAIR)
    captions = {"beam": PREDICTED[0], "greedy": PREDICTED[1], "actual": ACTUAL}
    mistakes = {"beam": right, "greedy": wrong}
    (ax,) = compare_captions(Image.new("RGB", (8, 8)), captions, mistakes)
    found = [(text.get_text(), text.get_color()) for text in ax.figure.texts]
    assert ("beam ✓", BLUE) in found and ("greedy ✗", RED) in found and ("actual", BLUE) in found
    assert ("blue", RED) in found and any(text.startswith("colour: ") for text, _ in found)


@pytest.mark.parametrize("most, rows", [(1, [1]), (2, [1, 2]), (9, [1, 2, 0])])
def test_examples_of_kinds(most, rows):
    """Captions with different kinds of mistakes, the one with the fewest of each kind."""
    captions = [
        "a blue cat and a blue cat in the meadow",  # also named twice
        "a blue cat and a blue car in the meadow",
        "a red cat in the meadow",
        "a red cat and a blue car in the meadow",
    ]
    mistakes = known_mistakes("synthetic", captions, [ACTUAL] * 4)
    assert examples_of_kinds(mistakes, most) == rows


def test_without_examples(capsys):
    """Without known mistakes, a sentence says so."""
    assert show_examples([], [], [], [], []) is None
    assert capsys.readouterr().out == "No mistakes are known.\n"
