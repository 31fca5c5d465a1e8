"""Figures of 3_Inference: the branches of a beam search, and the n-grams that BLEU counts."""

from collections import Counter
from typing import NamedTuple

import matplotlib.pyplot as plt

from captioning.figures.plots import BLUE, GREY, ORANGE

TINTS = ("#a9d3ea", "#f6c9a8", "#b7dfb2", "#d8c3e8", "#f3e29b")  # behind black text


class Branch(NamedTuple):
    """A prefix that a beam search has considered."""

    word: str  # its last word
    log_prob: float  # of the prefix, in nats
    parent: int  # position of the prefix without that word among the branches of the step before
    kept: bool  # whether it was among the best of its step
    score: float | None = None  # if it is a complete caption


def beam_tree(steps, ax=None):
    """The branches of a beam search, a row per step: lists of `Branch`, the best ones first.

    Dropped branches are grey, complete captions have their score, and the caption with the highest
    one is orange. Dashed lines are the path of greedy decoding, as far as the beam contains it.
    """
    width = max(map(len, steps))
    ax = ax or plt.subplots(figsize=(1.9 * width, 0.42 * len(steps)), layout="constrained")[1]
    best, greedy = best_path(steps), greedy_path(steps)
    style = {"ha": "center", "va": "center", "fontsize": 8}
    for t, step in enumerate(steps):
        for i, branch in enumerate(step):
            edge = ORANGE if (t, i) in best else BLUE if branch.kept else "silver"
            if t:
                line = "--" if (t, i) in greedy else "-"
                ax.plot([branch.parent, i], [0.8 - t, 0.2 - t], line, color=edge, zorder=0)
            text = f"{branch.word} {branch.log_prob:.2f}"
            text += "" if branch.score is None else f", score {branch.score:.3f}"
            box = {"boxstyle": "round", "fc": "white", "ec": edge}
            ax.text(i, -t, text, bbox=box, color="black" if branch.kept else "grey", **style)
    ax.set(xlim=(-0.5, width - 0.5), ylim=(0.5 - len(steps), 0.5))
    ax.set_axis_off()
    return ax


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


def ngram_matches(words, references, max_n=4, ax=None):
    """The n-grams of a caption as overlapping bars, n = 1 .. max_n from top to bottom.

    The colour and the number of a bar are those of the first reference that contains the n-gram;
    n-grams without a match are white. words, references: as in `matched_by`, at most five of these.
    """
    rows = max_n * (max_n + 1) // 2
    ax = ax or plt.subplots(figsize=(0.95 * len(words) + 1, 0.3 * rows + 0.3))[1]
    y = 0
    for n in range(1, max_n + 1):
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
