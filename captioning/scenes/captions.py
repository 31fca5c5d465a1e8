"""Captions of a scene, and the way back from a caption to the objects that it names.

Each caption names every (colour, object) pair and the background, so `parse_scene` can turn any
caption, an actual or a generated one, into facts that can be compared with the scene.
"""

import re
from collections import Counter
from itertools import pairwise
from random import Random

from captioning.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    FLYING,
    OBJECTS,
    SIZE_WORDS,
    Scene,
    Thing,
    relations,
)

SYNONYMS = {"kitten": "cat", "cottage": "house"}


def make_captions(scene: Scene, rng: Random) -> list[str]:
    """Five different captions of at most 18 words."""
    captions = []
    while len(captions) < 5:
        caption = make_sentence(scene, rng)
        if caption not in captions and len(caption.split()) <= 18:
            captions.append(caption)
    return captions


def make_sentence(scene: Scene, rng: Random) -> str:
    """A random sentence that names every thing and the background, in random order."""
    things = list(scene.things)
    rng.shuffle(things)
    first, *others = things
    one, *more = (noun_phrase(thing, rng) for thing in things)
    rest = " and ".join(more)
    everything = ", ".join([one, rest]) if len(more) == 2 else " and ".join([one, *more])
    verb, (preposition, *nouns) = OBJECTS[first.name], BACKGROUNDS[scene.background]
    noun = rng.choice(nouns)
    place = f"{preposition} {noun}"
    image = rng.choice(("a picture", "a drawing", "an image"))
    choices = [f"{everything} {place}", f"{noun} with {everything}"]
    choices += [f"there is {everything} {place}", f"{image} of {everything} {place}"]
    if not others:
        choices += [f"{one} {verb} {'over ' + noun if first.name in FLYING else place}"] * 2
    for relation in relations(first, others[0]) if others else []:
        if all(relation in relations(first, other) for other in others):
            where = f"{relation} {rest} {place}"
            choices += [f"{one} {where}", f"{one} {verb} {where}"]
    return rng.choice(choices).capitalize() + "."


def noun_phrase(thing: Thing, rng: Random) -> str:
    """For example `a small red cat`."""
    name = rng.choice([thing.name] * 3 + [word for word, n in SYNONYMS.items() if n == thing.name])
    words = [thing.colour, name]
    if SIZE_WORDS[thing.side] and rng.random() < 0.3:
        words.insert(0, rng.choice(SIZE_WORDS[thing.side]))
    return " ".join(["an" if words[0] == "orange" else "a", *words])


def plain_words(caption: str) -> list[str]:
    """The words of caption.split() in lower case, without punctuation; synonyms are replaced."""
    words = [re.sub("[^a-z]", "", word) for word in caption.lower().split()]
    return [SYNONYMS.get(word, word) for word in words]


def named_pairs(caption: str) -> list[tuple[tuple[int, int], tuple[str, str]]]:
    """The (colour, object) pairs that a caption names, with their positions in caption.split()."""
    words = [(t, word) for t, word in enumerate(plain_words(caption)) if word]
    return [
        ((s, t), (colour, name))
        for (s, colour), (t, name) in pairwise(words)
        if colour in COLOURS and name in OBJECTS
    ]


def parse_scene(caption: str) -> tuple[str | None, Counter[tuple[str, str]]]:
    """The background of a caption, and how often it names each (colour, object) pair.

    The background is None if the caption names none or several. No scene has a pair twice, so a
    caption that repeats one is wrong.
    """
    backgrounds = set(plain_words(caption)) & set(BACKGROUNDS)
    background = backgrounds.pop() if len(backgrounds) == 1 else None
    return background, Counter(pair for _, pair in named_pairs(caption))
