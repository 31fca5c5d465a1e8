"""Figures of 3_Inference, beside the image that they are about.

caption_with_probabilities(model, "photo.jpg")
next_word_map(image, words, probabilities, actual)      # at every step
beam_tree(image, steps)                                 # the branches of a beam search
ngram_matches(words, references)                        # what BLEU counts
"""

from collections import Counter
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from captioning.base.tokens import END, split_words
from captioning.data.images import centre_crop
from captioning.figures.image_text import FADED, Paragraph, pictures
from captioning.figures.plots import BLUE, GREY, ORANGE, SIDE

LEAST_PROBABLE = 0.03
TINTS = ("#a9d3ea", "#f6c9a8", "#b7dfb2", "#d8c3e8", "#f3e29b")  # behind black text


class Branch(NamedTuple):
    """A prefix that a beam search has considered."""

    word: str  # its last word
    log_prob: float  # of the prefix, in nats
    parent: int  # position of the prefix without that word among the branches of the step before
    kept: bool  # whether it was among the best of its step
    score: float | None = None  # if it is a complete caption


def image_beside(image, width, height, beside=True):
    """Show an image, 3.05 inches wide, and return axes of width x height inches to its right.

    beside: False: the axes are below the image.
    """
    side = 3.05
    high = side * image.height / image.width
    total = (side + 0.9 + width, max(high, height)) if beside else (width, high + height)
    figure = plt.figure(figsize=total)
    picture = figure.add_axes((0, 1 - high / total[1], side / total[0], high / total[1]))
    picture.imshow(image, interpolation="bicubic")
    picture.set_axis_off()
    left, bottom = (side + 0.9, total[1] - height) if beside else (0, 0)
    return figure.add_axes(
        (left / total[0], bottom / total[1], width / total[0], height / total[1])
    )


def caption_with_probabilities(model, path):
    """A photograph, and beside it the words of its caption with their probabilities."""
    decoded = model.generate(model.preprocess([path]), beam_size=5)
    words = split_words(model.decode(decoded)[0][0])
    probabilities = decoded.log_probs[0, 0, : len(words)].exp().tolist()
    ax = image_beside(centre_crop(path, SIDE), width=4.6, height=3.05)
    places = range(len(words))
    ax.barh(places, probabilities, color=BLUE)
    for place, probability in zip(places, probabilities, strict=True):
        ax.text(probability + 0.02, place, f"{probability:.0%}", va="center", fontsize=9)
    ax.set_yticks(places, words, fontsize=12)
    ax.set(xlim=(0, 1.1), xticks=())
    ax.set_title("caption, and the probability of each word", fontsize=11, loc="left")
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    return ax


def show_captions(paths, captions, longer, confidence):
    """Photographs with their captions, longer captions, and the confidence below them."""
    blocks = []
    for caption, other, value in zip(captions, longer, confidence, strict=True):
        known = Paragraph(f"longer: {other}", 10, FADED), Paragraph(f"confidence {value:.2f}", 10)
        blocks.append([Paragraph(caption, weight="bold"), *known])
    return pictures([centre_crop(path, SIDE) for path in paths], blocks, len(paths), 3.0)


def next_word_map(image, words, probabilities, actual):
    """An image and the probabilities of the next word at all steps, as a heat map.

    words: the vocabulary. probabilities: (steps, words). actual: the word index of each step, which
    is framed. Words that never have a probability of LEAST_PROBABLE are left out.
    """
    probabilities = np.asarray(probabilities)
    shown = set(np.flatnonzero(probabilities.max(0) >= LEAST_PROBABLE)) | set(actual)
    first = {
        i: np.argmax(probabilities[:, i] >= min(LEAST_PROBABLE, probabilities[:, i].max()))
        for i in shown
    }
    rows = sorted(shown, key=lambda i: (first[i], -probabilities[first[i], i]))
    steps = len(actual)
    ax = image_beside(image, width=0.46 * steps, height=0.21 * len(rows) + 0.6)
    ax.imshow(probabilities[:, rows].T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for t, index in enumerate(actual):
        corner = t - 0.5, rows.index(index) - 0.5
        ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, ec=ORANGE, lw=2, clip_on=False))
        for row, i in enumerate(rows):
            if (p := probabilities[t, i]) >= 0.1:
                colour = "white" if p > 0.5 else "black"
                text = f"{p:.2f}"[1 if p < 0.995 else 0 :][:3]
                ax.text(t, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    ax.set_xlabel("actual next word", loc="left")
    ax.xaxis.set_label_position("top")
    ax.set_yticks(range(len(rows)), [words[i] for i in rows], fontsize=9)
    ax.set_xticks(range(steps), [words[i] for i in actual], fontsize=9, rotation=40, ha="left")
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.set_xticks(np.arange(steps) + 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows)) + 0.5, minor=True)
    ax.grid(which="minor", color="#e9ecef")
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(False)
    return ax


def branches(steps, words, beam_size):
    """The `Branch`es of each step of a beam search: those in the beam, and the next one.

    steps: a list of all prefixes of each step, the most probable one first, with the attributes
    ids, log_p, parent (a prefix of the step before) and score(). words: of the vocabulary.
    """
    tree, before = [], [None]
    for step in steps:
        tree.append([])
        for place, prefix in enumerate(step[: beam_size + 1]):
            word, kept = words[prefix.ids[-1]], place < beam_size
            score = prefix.score() if kept and prefix.ids[-1] == END else None
            parent = before.index(prefix.parent) if len(tree) > 1 else 0
            tree[-1].append(Branch(word, prefix.log_p, parent, kept, score))
        before = step
    return tree


def beam_tree(image, steps, notes=""):
    """An image with notes and, below it, the branches of a beam search from left to right.

    steps: a list of `Branch` per step, the best ones first. Dropped branches are grey, complete
    captions have their score in parentheses, and the caption with the highest one is orange. Dashed
    lines are the path of greedy decoding, as far as the beam contains it. A coloured column marks
    where the orange path overtakes it.
    """
    height = max(map(len, steps))
    ax = image_beside(image, 0.76 * len(steps), 0.55 * height + 0.5, beside=False)
    best, greedy = best_path(steps), greedy_path(steps)
    ax.figure.text(3.4 / ax.figure.get_figwidth(), 0.97, notes, va="top", size=13, linespacing=1.6)
    style = {"ha": "center", "va": "center", "fontsize": 8.5}
    for t, step in enumerate(steps):
        for i, branch in enumerate(step):
            edge = ORANGE if (t, i) in best else BLUE if branch.kept else "#a9adb3"
            if t:
                line = "--" if (t, i) in greedy else "-"
                ax.plot([t - 0.75, t - 0.25], [-branch.parent, -i], line, color=edge, zorder=0)
            text = branch.word + (f"\n{branch.log_prob:.2f}" if branch.kept else "")
            text += "" if branch.score is None else f"\n({branch.score:.3f})"
            box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": edge}
            ax.text(t, -i, text, bbox=box, color="black" if branch.kept else "dimgrey", **style)
    t = overtaken(steps)
    if t is not None:
        ax.axvspan(t - 0.5, t + 0.5, color=ORANGE, alpha=0.15, zorder=-1)
        ax.text(
            t, 0.75, "the beam overtakes\ngreedy decoding", color=ORANGE, weight="bold", **style
        )
    ax.set(xlim=(-0.5, len(steps) - 0.5), ylim=(0.5 - height, 1.1))
    ax.set_axis_off()
    return ax


def overtaken(steps) -> int | None:
    """The first step at which the best caption's prefix ranks above that of greedy decoding.

    From that step on it stays above, or greedy decoding has left the beam.
    """
    best, greedy = dict(best_path(steps)), dict(greedy_path(steps))
    if best.keys() <= greedy.keys() and all(greedy[t] == i for t, i in best.items()):
        return None
    behind = [t for t, i in best.items() if greedy.get(t, len(steps[t])) <= i]
    return max(behind, default=-1) + 1


def best_path(steps) -> set[tuple[int, int]]:
    """The (step, position) of the branches of the complete caption with the highest score."""
    complete = [
        (branch.score, t, i)
        for t, step in enumerate(steps)
        for i, branch in enumerate(step)
        if branch.score is not None
    ]
    _, last, i = max(complete, default=(0, -1, 0))
    path = set()
    for t in range(last, -1, -1):
        path.add((t, i))
        i = steps[t][i].parent
    return path


def greedy_path(steps) -> set[tuple[int, int]]:
    """The (step, position) of the branches of greedy decoding, as far as the beam contains it."""
    path, i = {(0, 0)}, 0
    for t, step in enumerate(steps[1:], start=1):
        i = next((n for n, branch in enumerate(step) if branch.parent == i), None)
        if i is None:
            break
        path.add((t, i))
    return path


def matched_by(words, references, n):
    """The reference that each n-gram of a caption counts as a match of, or None: a list.

    words: of the caption. references: lists of words. An n-gram that occurs several times is
    matched at most as often as it occurs in one reference, as in BLEU.
    """

    def ngrams(words):
        return list(zip(*(words[i:] for i in range(n)), strict=False))

    counts, seen, found = [Counter(ngrams(reference)) for reference in references], Counter(), []
    for gram in ngrams(words):
        seen[gram] += 1
        enough = (r for r, count in enumerate(counts) if count[gram] >= seen[gram])
        found.append(next(enough, None))
    return found


def ngram_matches(words, references):
    """The n-grams of a caption as overlapping bars, n = 1 .. 4 from top to bottom.

    The colour and the number of a bar are those of the first reference that contains the n-gram;
    n-grams without a match are white. words, references: as in `matched_by`, at most five of these.
    """
    ax = plt.subplots(figsize=(0.95 * len(words) + 1, 3.3))[1]
    y = 0
    for n in range(1, 5):
        found = matched_by(words, references, n)
        share = f"n = {n}:  {sum(r is not None for r in found)} of {len(found)}"
        ax.text(-0.1, y - n / 2, share, ha="right", va="center", weight="bold")
        for start, reference in enumerate(found):
            matched = reference is not None
            low = y - 1 - start % n  # n-grams that overlap are drawn one below the other
            tint, corner = TINTS[reference] if matched else "white", (start + 0.03, low + 0.1)
            ax.add_patch(plt.Rectangle(corner, n - 0.06, 0.8, fc=tint, ec=GREY))
            text = " ".join(words[start : start + n])
            ax.text(start + n / 2, low + 0.5, text, ha="center", va="center", fontsize=7.5)
            number = reference + 1 if matched else ""
            ax.text(start + n - 0.05, low + 0.85, number, ha="right", va="top", fontsize=6)
        y -= n + 0.4
    ax.set(xlim=(-1.6, len(words)), ylim=(y, 0.1))
    ax.set_axis_off()
    return ax
