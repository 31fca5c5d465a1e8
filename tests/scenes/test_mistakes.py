"""The mistakes of captions of synthetic scenes."""

import re
from itertools import pairwise
from random import Random

import pytest

from captioning.scenes.captions import make_captions
from captioning.scenes.mistakes import KINDS, find_mistakes, is_wrong, wrong_words
from captioning.scenes.scene import random_scene

TRUE = "A red cat and a blue cottage on the snowy hill."


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a blue house and a red kitten on a snowy hill", []),
        ("a red cat and a blue house on the beach", ["background: beach instead of hill 9"]),
        ("a red cat and a blue house", ["background: none instead of hill"]),
        ("a green cat and a blue house on the hill", ["colour: green instead of red cat 1"]),
        ("a red cat on the snowy hill", ["missing: blue house"]),
        ("a red cat and a blue house and a red car on the hill", ["added: red car 9 10"]),
        ("a red cat and a blue house and a red cat on the hill", ["named twice: red cat 9 10"]),
        (
            "a blue cat and a red house on the hill",
            ["colour: blue instead of red cat 1", "colour: red instead of blue house 5"],
        ),
    ],
)
def test_kinds(caption, expected):
    """Each kind of mistake is found once, with the positions of the words that are wrong."""
    found = find_mistakes(caption, TRUE)
    assert [" ".join([f"{m.kind}: {m.text}", *map(str, m.words)]) for m in found] == expected
    assert wrong_words(found) == {int(t) for t in re.findall(r"\d+", str(expected))}


def test_mistakes_exactly_if_wrong():
    """A caption is wrong, and has mistakes, exactly if its scene has other contents."""
    rng = Random("mistakes")
    scenes = [random_scene(rng) for _ in range(500)]
    facts = [(s.background, {(t.colour, t.name) for t in s.things}) for s in scenes]
    captions = [make_captions(scene, rng) for scene in scenes]
    for (fact, five), (other, others) in pairwise(zip(facts, captions, strict=True)):
        assert not is_wrong(five[0], five[1]) and not find_mistakes(five[0], five[1])
        found = find_mistakes(five[0], others[0])
        assert bool(found) == is_wrong(five[0], others[0]) == (fact != other)
        assert {mistake.kind for mistake in found} <= set(KINDS)
