"""What the photographs show, and how often the training photographs of the captioner show it.

noun_counts(main_nouns(history["counts"], photographs), total=8033)
"""

from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

from captioning.base.tokens import split_words
from captioning.figures.gallery import GREEN, WIDTH
from captioning.figures.image_text import RED

# The main object of each first actual caption, in words that captions use.
NOUNS = {
    "astronaut.jpg": "woman girl",
    "camera.jpg": "man person",
    "cat.jpg": "cat cats",
    "chickens.jpg": "chicken chickens hen hens",
    "china.jpg": "tower temple pagoda",
    "clock.jpg": "clock clocks",
    "coffee.jpg": "cup cups coffee",
    "cow.jpg": "cow cows",
    "dogs.jpg": "dog dogs",
    "duck.jpg": "duck ducks",
    "fig.jpg": "fruit fruits fig",
    "flower.jpg": "flower flowers dahlia",
    "grace_hopper.jpg": "woman girl",
    "horses.jpg": "horse horses",
    "kitten.jpg": "kitten cat cats",
    "motorcycle.jpg": "motorcycle motorcycles",
    "mountains.jpg": "mountain mountains meadow",
    "owl.jpg": "owl owls",
    "pig.jpg": "pig pigs",
    "rocket.jpg": "rocket rockets",
    "sheep.jpg": "sheep lamb",
    "shepherd_dog.jpg": "dog dogs",
    "stream.jpg": "stream river creek",
    "wine.jpg": "drum drums",
}


class Noun(NamedTuple):
    """The main object of a photograph."""

    noun: str
    image: Image.Image
    count: int  # of the training photographs that show one
    named: bool  # whether the predicted caption names it


def main_nouns(counts, photographs) -> list[Noun]:
    """The main object of each photograph, the most frequent in training first.

    counts: for each of the NOUNS, of the training photographs whose captions have a word of it.
    """
    found = []
    for photograph in photographs:
        words = NOUNS[photograph.name]
        named = bool(set(words.split()) & set(split_words(photograph.predicted)))
        found.append(Noun(words.split()[0], photograph.image, counts[words], named))
    return sorted(found, key=lambda noun: -noun.count)


def noun_counts(nouns, total):
    """How many of `total` training photographs show each noun; green and filled if it is named."""
    ax = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")[1]
    places = range(len(nouns))
    heights = [max(noun.count, 1) for noun in nouns]
    for x, height, noun in zip(places, heights, nouns, strict=True):
        colour = GREEN if noun.named else RED
        ax.plot(x, height, "o", ms=11, mec=colour, mfc=colour if noun.named else "white", mew=2.5)
        style = {"xycoords": "data", "box_alignment": (0.5, 0), "frameon": False, "pad": 0}
        thumbnail = OffsetImage(noun.image, zoom=0.43 * 72 / noun.image.width)
        ax.add_artist(AnnotationBbox(thumbnail, (x, 1.35 * height), **style))
        ax.text(x, height / 1.35, noun.count, ha="center", va="top", size=12)
    names = [noun.noun for noun in nouns]
    ax.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor", size=13)
    ax.set(yscale="log", ylim=(1, 3 * total), xlim=(-0.6, len(nouns) - 0.4))
    ax.set_ylabel("training photographs", size=13)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.minorticks_off()
    ax.grid(axis="y", color="#e9ecef")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    key = {"ha": "right", "size": 14, "weight": "bold"}
    ax.text(len(nouns) - 0.5, total, "● named in the caption", color=GREEN, **key)
    ax.text(len(nouns) - 0.5, total / 3, "○ not named", color=RED, **key)
    return ax
