"""What a wrong word does to a caption: which substitution to show, and its figure."""

from difflib import SequenceMatcher

import matplotlib.pyplot as plt
import numpy as np

from captioning.figures.image_text import RED
from captioning.figures.plots import GREY
from captioning.scenes.captions import SYNONYMS
from captioning.scenes.scene import BACKGROUNDS, COLOURS, OBJECTS
from captioning.scoring.chair import PHRASES
from captioning.scoring.metrics import BAD_ENDINGS

# Where these words differ, the content does not: function words, and those with which the captions
# of scenes describe the same background, such as "the dark city" and "the city at night".
FUNCTION_WORDS = {*BAD_ENDINGS, "by", "there"}
for background, (_, *phrases) in BACKGROUNDS.items():
    FUNCTION_WORDS |= set(" ".join(phrases).split()) - {background}
AFTER = 5  # the number of words, at least, that follow a noun that is replaced


def nouns_among(words):
    """Those of `words` that name an object of the scenes or of COCO; if none does, all content."""
    named = {*OBJECTS, *SYNONYMS, *(p[0] for p, c in PHRASES.items() if c and len(p) == 1)}
    content = [word for word in words if word not in FUNCTION_WORDS and word.isalpha()]
    return [word for word in content if word in named and word not in COLOURS] or content


def short_captions(dataset, vocab, nouns, count):
    """(row, position of the first noun) of the shortest captions of a `CaptionDataset`.

    Each is of another image; the position is that in the caption with `<start>`.
    """
    found, images = [], set()
    for row in np.argsort(dataset.lengths, kind="stable").tolist():
        words = [vocab.words[index] for index in dataset.caption(row).tolist()]
        position = next((t for t, word in enumerate(words) if word in nouns), len(words))
        if position + AFTER < len(words) - 1 and dataset.image_rows[row] not in images:
            found.append((row, position))
            images.add(dataset.image_rows[row])
        if len(found) == count:
            break
    return found


def worst_substitution(dataset, vocab, run, count=20):
    """The row of a caption, and the captions that `run` returns for it and a wrong noun.

    All nouns of the vocabulary are tried in `count` short captions. The substitution is the one
    after which free running makes the most errors beyond those of teacher forcing.

    run: a function of (row, position, wrong noun) that returns a dict of four captions, as lists of
        words: the actual one, with teacher forcing the inputs and the predictions, in free running.
    """
    nouns = nouns_among(vocab.words)
    found = []
    for row, position in short_captions(dataset, vocab, nouns, count):
        actual = vocab.words[dataset.caption(row)[position]]
        found += [(row, run(row, position, noun)) for noun in nouns if noun != actual]
    return max(found, key=lambda item: added_errors(*item[1].values()))


def added_errors(actual, _inputs, forced, free):
    """The errors of free running beyond those of the predictions under teacher forcing."""
    return len(content_errors(free, actual)) - len(content_errors(forced, actual))


def content_errors(words, actual):
    """The positions in `words` of nouns, verbs and the like that `actual` does not have there.

    Both are lists of words. They are aligned first, so that a missing or an additional word does
    not make an error of each word that follows.
    """
    right = set()
    for start, _, length in SequenceMatcher(None, words, actual, False).get_matching_blocks():
        right.update(range(start, start + length))
    return [t for t, word in enumerate(words) if t not in right and word not in FUNCTION_WORDS]


def caption_rows(image, rows):
    """An image beside captions, a row of words each, whose errors of content are red.

    rows: a dict name -> words. The first row is the actual caption, without errors.
    """
    actual = next(iter(rows.values()))
    longest = max(map(len, rows.values()))
    size = (5.3 + 0.8 * longest, 3.2)
    widths = (3.2, size[0] - 3.2)
    _, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=widths, layout="constrained")
    left.imshow(image)
    for row, (name, words) in enumerate(rows.items()):
        right.text(-0.7, -row, name, ha="right", va="center", weight="bold", fontsize=9)
        wrong = content_errors(words, actual)
        for column, word in enumerate(words):
            edge, face = (RED, "#fbe3e4") if column in wrong else (GREY, "white")
            box = {"boxstyle": "round,pad=0.4", "fc": face, "ec": edge}
            right.text(column, -row, word, ha="center", va="center", fontsize=9, bbox=box)
    right.set(xlim=(-3.2, longest - 0.4), ylim=(0.6 - len(rows), 0.6))
    for ax in (left, right):
        ax.set_axis_off()
    return left, right
