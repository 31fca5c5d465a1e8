"""The mistakes of a caption of a synthetic scene, by kind.

(mistake,) = find_mistakes("a red cat in the meadow", "a blue cat in the meadow")
mistake.kind, mistake.text, mistake.words      # "colour", "red instead of blue cat", (1,)
"""

import re
from itertools import pairwise
from typing import NamedTuple

from captioning.scenes.synthetic import BACKGROUNDS, COLOURS, OBJECTS, SYNONYMS, parse_scene

KINDS = ("background", "colour", "missing", "added", "named twice")


class Mistake(NamedTuple):
    """A difference between a caption and a correct one."""

    kind: str  # one of KINDS
    text: str  # for example "red instead of blue cat"
    words: tuple[int, ...]  # positions of the wrong words in caption.split(); none if missing


def find_mistakes(caption: str, reference: str) -> list[Mistake]:
    """The mistakes of a caption of the scene that `reference` describes correctly, by kind.

    An object with a wrong colour is one mistake. One in place of another is two: one is added, and
    one is missing. The list is empty exactly if `synthetic.is_wrong` is false.
    """
    words = [re.sub("[^a-z]", "", word) for word in caption.lower().split()]
    words = [SYNONYMS.get(word, word) for word in words]
    place, true_place = parse_scene(caption)[0], parse_scene(reference)[0]
    found = [_background(words, place, true_place)] if place != true_place else []
    added, twice, missing = [], [], parse_scene(reference)[1]
    named = set()
    for t, pair in enumerate(pairwise(words)):
        if pair[0] in COLOURS and pair[1] in OBJECTS:
            if missing[pair]:
                missing[pair] -= 1
            elif pair in named:
                twice.append(Mistake("named twice", " ".join(pair), (t, t + 1)))
            else:
                added.append((t, pair))
            named.add(pair)
    missing = list(missing.elements())
    return found + _objects(added, missing) + twice


def wrong_words(caption: str, reference: str) -> set[int]:
    """The positions in caption.split() of the words that are part of a mistake."""
    return {t for mistake in find_mistakes(caption, reference) for t in mistake.words}


def _background(words, place, true_place):
    wrong = [t for t, word in enumerate(words) if word in BACKGROUNDS and word != true_place]
    named = " and ".join(words[t] for t in wrong) if wrong else place or "none"
    return Mistake("background", f"{named} instead of {true_place}", tuple(wrong))


def _objects(added, missing):
    """Mistakes of colour, and what is missing or added besides."""
    found = {kind: [] for kind in ("colour", "missing", "added")}
    for t, (colour, name) in added:
        true = next((pair for pair in missing if pair[1] == name), None)
        if true is None:
            found["added"].append(Mistake("added", f"{colour} {name}", (t, t + 1)))
            continue
        missing.remove(true)
        text = f"{colour} instead of {true[0]} {name}"
        found["colour"].append(Mistake("colour", text, (t,)))
    found["missing"] = [Mistake("missing", " ".join(pair), ()) for pair in missing]
    return [mistake for of_kind in found.values() for mistake in of_kind]
