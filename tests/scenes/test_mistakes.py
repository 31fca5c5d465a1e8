"""The mistakes of captions of synthetic scenes."""

from itertools import pairwise
from random import Random

import pytest

from captioning.scenes.mistakes import KINDS, find_mistakes, wrong_words
from captioning.scenes.synthetic import is_wrong, make_captions, random_scene

TRUE = "A red cat and a blue cottage on the snowy hill."


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a blue house and a red kitten on a snowy hill", []),
        (
            "a red cat and a blue house on the beach",
            [("background", "beach instead of hill", (9,))],
        ),
        ("a red cat and a blue house", [("background", "none instead of hill", ())]),
        (
            "a green cat and a blue house on the snowy hill",
            [("colour", "green instead of red cat", (1,))],
        ),
        ("a red cat on the snowy hill", [("missing", "blue house", ())]),
        ("a red cat and a blue house and a red car on the hill", [("added", "red car", (9, 10))]),
        (
            "a red cat and a blue house and a red cat on the hill",
            [("named twice", "red cat", (9, 10))],
        ),
        (
            "a blue cat and a red house on the hill",
            [
                ("colour", "blue instead of red cat", (1,)),
                ("colour", "red instead of blue house", (5,)),
            ],
        ),
    ],
)
def test_kinds(caption, expected):
    """Each kind of mistake is found once, with the words that are wrong."""
    assert find_mistakes(caption, TRUE) == expected
    assert wrong_words(caption, TRUE) == {t for _, _, words in expected for t in words}


def test_mistakes_exactly_if_wrong():
    """A caption has mistakes exactly if `is_wrong` says that it is wrong."""
    rng = Random("mistakes")
    captions = [make_captions(random_scene(rng), rng) for _ in range(300)]
    for five, others in pairwise(captions):
        assert not find_mistakes(five[0], five[1])
        found = find_mistakes(five[0], others[0])
        assert bool(found) == is_wrong(five[0], others[0])
        assert {mistake.kind for mistake in found} <= set(KINDS)
