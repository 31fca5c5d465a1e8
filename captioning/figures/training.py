"""Learning curves, histories of the models that were trained on photographs, and comparisons.

    histories, captions = load_histories()
    learning_curves(histories["attend"])       # rings mark the best epochs
    cider_curves({"par": histories["par"]})
    count_right(captions, val)                 # "190 of 200"

A history is a list of dicts, one per epoch, as `fit` returns it.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from captioning.figures.plots import COLOURS, bars
from captioning.scenes.generation import DESCRIPTION
from captioning.scenes.mistakes import is_wrong
from captioning.scoring.evaluation import score_sources

HISTORY = Path(__file__).parents[2] / "pretrained" / "photo_captioner.history.json"
# Self-critical training on Flickr8k, means of three seeds, from docs/flickr8k.md.
HISTORY_NAMES = ("epoch", "train_reward", "val_cider", "val_perplexity")
ROWS = (
    (1, 0.53, 0.551, 22.9),
    (2, 0.75, 0.568, 30.6),
    (3, 0.82, 0.575, 36.7),
    (4, 0.87, 0.580, 42.8),
    (5, 0.90, 0.586, 47.2),
    (6, 0.94, 0.587, 54.6),
    (7, 0.97, 0.586, 61.7),
    (8, 1.00, 0.595, 64.6),
)
FLICKR8K_REWARDED = [{"epoch": 0, "val_cider": 0.548, "val_perplexity": 14.3}]
FLICKR8K_REWARDED += [dict(zip(HISTORY_NAMES, row, strict=True)) for row in ROWS]


def load_histories():
    """({name: history}, {name: {photograph: caption}}) of init, par, attend and self-critical.

    "attend" is the included captioner; self-critical training continues it.
    """
    content = json.loads(HISTORY.read_text(encoding="utf-8"))
    compared, attend = content["compared"], content["photographs"]
    histories = {"init": compared["init"], "par": compared["par"], "attend": attend}
    return histories | {"self-critical": compared["self-critical"]}, content["captions"]


def best_of(history, name):
    """The line of the best epoch: the one with the highest CIDEr-D, or the lowest other value."""
    choose = max if name == "val_cider" else min
    return choose(history, key=lambda line: line[name])


def best_epochs(histories):
    """A line of text for the best epoch, by CIDEr-D, of each {name: history}."""
    lines = []
    for name, history in histories.items():
        best = best_of(history, "val_cider")
        lines.append(
            f"{name:14s} best epoch {best['epoch']:2d}   CIDEr-D {best['val_cider']:.3f}   "
            f"perplexity {best['val_perplexity']:5.2f}   distinct {best['val_distinct']:.0%}"
        )
    return "\n".join(lines)


def learning_curves(history):
    """The perplexity and the CIDEr-D side by side."""
    _, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    perplexity_curves(history, axes[0])
    cider_curves({"validation": history}, axes[1])
    return axes


def perplexity_curves(history, ax=None, first=1):
    """Training and validation perplexity, from the epoch `first` on; the best epoch is marked."""
    ax = ax or plt.subplots(figsize=(6, 3), layout="constrained")[1]
    shown = [line for line in history if line["epoch"] >= first] or history
    _plot(shown, "train_perplexity", "training", COLOURS[0], ax)
    _plot(shown, "val_perplexity", "validation", COLOURS[1], ax)
    _mark_best(shown, "val_perplexity", COLOURS[1], ax)
    return _finish(ax, "perplexity")


def cider_curves(histories, ax=None):
    """The CIDEr-D of the validation captions of each {name: history}; best epochs are marked."""
    ax = ax or plt.subplots(figsize=(6, 3), layout="constrained")[1]
    for (name, history), colour in zip(histories.items(), COLOURS, strict=False):
        trained = [line for line in history if line["epoch"] > 0]
        _plot(trained, "val_cider", name, colour, ax)
        _mark_best(trained, "val_cider", colour, ax)
    return _finish(ax, "CIDEr-D (validation)")


def reward_curves(history, ax=None):
    """Self-critical training: the reward of the samples, and the CIDEr-D of validation captions."""
    ax = ax or plt.subplots(figsize=(6, 3), layout="constrained")[1]
    _plot(history, "train_reward", "training (reward of samples)", COLOURS[0], ax)
    _plot(history, "val_cider", "validation", COLOURS[1], ax)
    _mark_best(history, "val_cider", COLOURS[1], ax)
    return _finish(ax, "CIDEr-D")


def _plot(history, name, label, colour, ax):
    """The value `name` over the epochs that have it."""
    lines = [line for line in history if name in line]
    epochs, values = [line["epoch"] for line in lines], [line[name] for line in lines]
    ax.plot(epochs, values, "o-", ms=3, color=colour, label=label)


def _mark_best(history, name, colour, ax):
    """A ring around the best epoch, with its value."""
    best = best_of(history, name)
    place = best["epoch"], best[name]
    ax.plot(*place, "o", ms=11, mfc="none", mec=colour, mew=1.5)
    offset = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    ax.annotate(f"{best[name]:.2f}", place, color=colour, fontsize=9, **offset)


def _finish(ax, ylabel):
    ax.legend(frameon=False)
    ax.set(xlabel="epoch", ylabel=ylabel)
    ax.margins(y=0.15)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


# ---------------------------------------------------------------------------- comparisons


def count_right(captions, data):
    """How many captions of scenes describe exactly their scene, as text: "190 of 200"."""
    if data.description != DESCRIPTION:
        return "known for synthetic scenes only"
    pairs = zip(captions, data.captions, strict=True)
    right = sum(not is_wrong(caption, actual[0]) for caption, actual in pairs)
    return f"{right} of {len(captions)}"


def most_improved(first, last, data):
    """The row of the image whose caption gains most CIDEr-D from `first` to `last`."""
    before, after = (score_sources(captions, data)[1] for captions in (first, last))
    return int(np.subtract(after, before).argmax())


def perplexity_bars(perplexities):
    """A bar with its value for each {model: perplexity}, on a logarithmic scale from 1."""
    ax = bars(perplexities, xlabel="model", ylabel="validation perplexity (log scale)")
    ax.set(yscale="log", ylim=(1, 2 * max(perplexities.values())))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    for name, value in perplexities.items():
        ax.text(name, value, f"{value:.2f}", ha="center", va="bottom")
    return ax
