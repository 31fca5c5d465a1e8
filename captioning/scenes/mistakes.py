"""The mistakes of a caption of a synthetic scene, by kind.

(mistake,) = find_mistakes("a red cat in the meadow", "a blue cat in the meadow")
mistake.kind, mistake.text, mistake.words      # "colour", "red instead of blue cat", (1,)
"""

from typing import NamedTuple

from captioning.scenes.captions import named_pairs, parse_scene, plain_words
from captioning.scenes.scene import BACKGROUNDS

KINDS = ("background", "colour", "missing", "added", "named twice")


class Mistake(NamedTuple):
    """A difference between a caption and a correct one."""

    kind: str  # one of KINDS
    text: str  # for example "red instead of blue cat"
    words: tuple[int, ...]  # positions of the wrong words in caption.split(); none if missing


def is_wrong(caption: str, reference: str) -> bool:
    """Whether a caption describes another scene than `reference`, a caption that is correct."""
    return parse_scene(caption) != parse_scene(reference)


def find_mistakes(caption: str, reference: str) -> list[Mistake]:
    """The mistakes of a caption of the scene that `reference` describes correctly, by kind.

    An object with a wrong colour is one mistake. One in place of another is two: one is added, and
    one is missing. The list is empty exactly if `is_wrong` is false.
    """
    found = find_background_mistakes(caption, reference)
    named, others = set(), []
    missing = list(parse_scene(reference)[1])
    for positions, pair in named_pairs(caption):
        if pair in named:
            found.append(Mistake("named twice", " ".join(pair), positions))
        elif pair in missing:
            missing.remove(pair)
        else:
            others.append((positions, pair))
        named.add(pair)
    for positions, (colour, name) in others:
        match = next((pair for pair in missing if pair[1] == name), None)
        if match is None:
            found.append(Mistake("added", f"{colour} {name}", positions))
        else:
            missing.remove(match)
            text = f"{colour} instead of {match[0]} {name}"
            found.append(Mistake("colour", text, positions[:1]))
    found += [Mistake("missing", " ".join(pair), ()) for pair in missing]
    return sorted(found, key=lambda mistake: KINDS.index(mistake.kind))


def find_background_mistakes(caption: str, reference: str) -> list[Mistake]:
    """No or one mistake, with the names of all wrong backgrounds."""
    place, true_place = parse_scene(caption)[0], parse_scene(reference)[0]
    if place == true_place:
        return []
    words = plain_words(caption)
    wrong = [t for t, word in enumerate(words) if word in BACKGROUNDS and word != true_place]
    named = " and ".join(words[t] for t in wrong) or "none"
    return [Mistake("background", f"{named} instead of {true_place}", tuple(wrong))]


def wrong_words(mistakes) -> set[int]:
    """The positions in caption.split() of the words that are part of a caption's mistakes."""
    return {t for mistake in mistakes for t in mistake.words}
