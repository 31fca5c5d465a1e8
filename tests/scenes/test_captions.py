"""Scenes and their captions: what a caption says is true of the image, and can be read back."""

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations
from random import Random

import numpy as np
import pytest

from captioning.scenes.captions import make_captions, parse_scene
from captioning.scenes.drawing import render
from captioning.scenes.scene import random_scene


@pytest.fixture(scope="module")
def scenes():
    rng = Random("test")
    return [random_scene(rng) for _ in range(1600)]


@pytest.fixture(scope="module")
def captions(scenes):
    rng = Random("test captions")
    return [make_captions(scene, rng) for scene in scenes]


def pixels_of(scene, thing):
    """The pixels that change if this thing is added to the background: a mask (128, 128)."""
    empty = np.asarray(render(replace(scene, things=())), dtype=int)
    return (np.asarray(render(replace(scene, things=(thing,))), dtype=int) != empty).any(2)


def test_captions_are_read_back_exactly(scenes, captions):
    """`parse_scene` finds the background and all pairs of every caption, and nothing else."""
    for scene, five in zip(scenes, captions, strict=True):
        truth = scene.background, Counter((thing.colour, thing.name) for thing in scene.things)
        assert len(set(five)) == 5
        assert all(parse_scene(caption) == truth for caption in five), five


@pytest.mark.parametrize(
    "caption, background, pairs",
    [
        ("a red cat on the beach", "beach", ["red cat"]),
        ("A TINY ORANGE KITTEN, BY THE LAKE!", "lake", ["orange cat"]),
        ("red red kite kite a blue in the", None, ["red kite"]),
        ("a green house in the meadow in the desert", None, ["green house"]),
        ("a red , car in the city at <unk>", "city", ["red car"]),
        ("a red cat, a blue cat and a red kitten", None, ["red cat", "red cat", "blue cat"]),
        ("a cat of purple", None, []),
        ("", None, []),
    ],
)
def test_any_caption_can_be_parsed(caption, background, pairs):
    """Case, punctuation and unknown words are ignored, repetitions are counted, and of several
    backgrounds none is believed."""
    assert parse_scene(caption) == (background, Counter(tuple(pair.split()) for pair in pairs))


def test_stated_relations_hold_in_the_pixels(scenes, captions):
    """Left, right, above and below in a caption are true of the pixels of the objects."""
    verb = r"(?: sits| stands| waits| grows| floats| flies| flutters| zooms)? "
    pattern = re.compile(f"(.+?){verb}(to the left of|to the right of|above|over|below|under) (.+)")
    checked = Counter()
    for scene, five in zip(scenes[:80], captions, strict=False):
        if len(scene.things) == 1:
            continue
        spans = {}
        for thing in scene.things:
            rows, cols = np.nonzero(pixels_of(scene, thing))
            spans[thing.colour, thing.name] = rows.min(), rows.max(), cols.min(), cols.max()
        for match in filter(None, map(pattern.match, five)):
            first, relation, rest = match.groups()
            (one,) = parse_scene(first)[1]
            for other in parse_scene(rest)[1]:
                (top, bottom, left, right), (y0, y1, x0, x1) = spans[one], spans[other]
                holds = {"left": right < x0, "right": left > x1, "above": bottom < y0}
                holds |= {"over": bottom < y0, "below": top > y1, "under": top > y1}
                word = relation.removeprefix("to the ").removesuffix(" of")
                assert holds[word], match.string
                checked[word] += 1
    assert len(checked) == 6 and min(checked.values()) >= 5


@pytest.mark.parametrize("count", [None, 4])
def test_things_are_visible_and_do_not_overlap(count):
    """All things differ, each changes more than 150 pixels, and no pixel belongs to two; also if
    there are four, more than in the dataset."""
    for scene in [random_scene(Random(number), count) for number in range(40)]:
        assert count in (None, len({(thing.colour, thing.name) for thing in scene.things}))
        masks = [pixels_of(scene, thing) for thing in scene.things]
        assert all(mask.sum() > 150 for mask in masks)
        assert not any((a & b).any() for a, b in combinations(masks, 2))


def test_captions_are_proper_sentences(captions):
    """Correct articles, a capital and a full stop, and six to eighteen words."""
    for caption in sum(captions, []):
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", caption.lower()), caption
        assert caption[0].isupper() and caption.endswith(".") and 6 <= len(caption.split()) <= 18


def test_size_words_are_true(scenes, captions):
    """Only things in the smallest boxes are called small, only those in the largest large."""
    pattern = "(small|little|tiny|large|big|huge) ([a-z]+ [a-z]+)"
    words = {28: {"small", "little", "tiny"}, 52: {"large", "big", "huge"}}
    for scene, five in zip(scenes, captions, strict=True):
        sides = {(thing.colour, thing.name): thing.side for thing in scene.things}
        for size, pair in re.findall(pattern, " ".join(five)):
            (named,) = parse_scene(pair)[1]
            assert size in words[sides[named]]


def test_words_are_few_and_frequent(captions):
    """8,000 captions use 60 to 110 words, each at least 50 times."""
    counts = Counter(re.findall("[a-z]+", " ".join(sum(captions, [])).lower()))
    assert 60 <= len(counts) <= 110 and min(counts.values()) >= 50
