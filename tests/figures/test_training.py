"""Learning curves: which epochs they show, and which they mark as the best."""

import json
from pathlib import Path

import pytest

from captioning.data.coco import CocoCaptions
from captioning.figures.training import (
    FLICKR8K_REWARDED,
    best_epochs,
    best_of,
    cider_curves,
    count_right,
    learning_curves,
    load_histories,
    most_improved,
    perplexity_bars,
    perplexity_curves,
    reward_curves,
)
from captioning.scenes.generation import write_synthetic

HISTORY = [
    {"epoch": 0, "val_perplexity": 90.0, "val_cider": 0.1},
    {"epoch": 1, "val_perplexity": 20.0, "val_cider": 0.5, "train_perplexity": 30.0},
    {"epoch": 2, "val_perplexity": 22.0, "val_cider": 0.7, "train_perplexity": 9.0},
]


def lines_of(ax):
    """{label: (epochs, values)} of the labelled curves, and the places of the rings."""
    known = {True: [], False: []}
    for line in ax.lines:
        known[line.get_label().startswith("_")].append(line)
    curves = {line.get_label(): (*map(list, line.get_data()),) for line in known[False]}
    return curves, [(*map(float, line.get_xydata()[0]),) for line in known[True]]


def test_load_histories(tmp_path, monkeypatch):
    """The included captioner is "attend"; the names are in the order of the comparison."""
    file = tmp_path / "history.json"
    compared = {name: [{"epoch": name}] for name in ("self-critical", "par", "init")}
    content = {"photographs": HISTORY, "compared": compared, "captions": {"par": {"a.jpg": "a"}}}
    file.write_text(json.dumps(content))
    monkeypatch.setattr("captioning.figures.training.HISTORY", file)
    histories, captions = load_histories()
    assert list(histories) == ["init", "par", "attend", "self-critical"]
    assert histories["attend"] == HISTORY and histories["par"] == [{"epoch": "par"}]
    assert captions == {"par": {"a.jpg": "a"}}


@pytest.mark.parametrize("first", [0, 1, 2])
def test_perplexity_curves(first):
    """Epochs before `first` are left out, those without a value too; a ring marks the lowest."""
    curves, rings = lines_of(perplexity_curves(HISTORY, first=first))
    assert curves["training"] == [([1, 2], [30, 9]), ([1, 2], [30, 9]), ([2], [9])][first]
    assert curves["validation"][0] == list(range(first, 3))
    assert rings == [[(1, 20), (1, 20), (2, 22)][first]]


def test_learning_curves():
    """Perplexity and CIDEr-D side by side, each with its best epoch."""
    left, right = learning_curves(HISTORY)
    assert lines_of(left)[1] == [(1, 20)] and lines_of(right)[1] == [(2, 0.7)]


def test_cider_curves():
    """A curve for each model; a ring marks its highest CIDEr-D, and the text says it."""
    ax = cider_curves({"par": HISTORY, "init": HISTORY[:2]})
    curves, rings = lines_of(ax)
    assert curves == {"par": ([1, 2], [0.5, 0.7]), "init": ([1], [0.5])}
    assert rings == [(2, 0.7), (1, 0.5)]
    assert [text.get_text() for text in ax.texts] == ["0.70", "0.50"]


def test_reward_curves():
    history = [HISTORY[0], HISTORY[2] | {"train_reward": 0.9}]
    curves, rings = lines_of(reward_curves(history))
    assert curves["training (reward of samples)"] == ([2], [0.9])
    assert curves["validation"] == ([0, 2], [0.1, 0.7]) and rings == [(2, 0.7)]


def test_best_of():
    assert best_of(HISTORY, "val_perplexity")["epoch"] == 1
    assert best_of(HISTORY, "val_cider")["epoch"] == 2


def test_best_epochs():
    """The best epoch is that with the highest CIDEr-D."""
    lines = [
        {"epoch": epoch, "val_cider": cider, "val_perplexity": 14.0, "val_distinct": 0.8}
        for epoch, cider in ((1, 0.4), (2, 0.6), (3, 0.5))
    ]
    first, second = best_epochs({"par": lines, "init": lines[:1]}).split("\n")
    assert first.startswith("par") and "best epoch  2   CIDEr-D 0.600" in first
    assert second.startswith("init") and "best epoch  1" in second


def test_rewarded_history():
    """Every line is a row of the table in docs/flickr8k.md."""
    page = Path(__file__).parents[2].joinpath("docs", "flickr8k.md").read_text(encoding="utf-8")
    for line in FLICKR8K_REWARDED:
        reward = f"{line['train_reward']:.2f}" if "train_reward" in line else ""
        start = f"| {line['epoch']} | {reward} | {line['val_cider']:.3f} ".replace("|  |", "| |")
        (row,) = (row for row in page.splitlines() if row.startswith(start))
        assert f"| {line['val_perplexity']:.1f} |" in row


def test_most_improved(tmp_path):
    """The row whose caption was wrong first and is a reference at last."""
    files = write_synthetic(tmp_path / "scenes", {"train": 4, "val": 1, "test": 1})
    data = CocoCaptions(*files["train"])
    last = [texts[0] for texts in data.captions]
    first = [*last[:2], "something else", last[3]]
    assert most_improved(first, last, data) == 2


def test_perplexity_bars():
    ax = perplexity_bars({"uniform": 69, "with image": 1.61})
    assert [bar.get_height() for bar in ax.patches] == [69, 1.61]
    assert [text.get_text() for text in ax.texts] == ["69.00", "1.61"]


def test_count_right(tmp_path):
    """A caption with another colour is wrong; of photographs nothing is known."""
    files = write_synthetic(tmp_path / "scenes", {"train": 3, "val": 1, "test": 1})
    data = CocoCaptions(*files["train"])
    captions = [texts[1] for texts in data.captions]  # another wording of the same scene
    assert count_right(captions, data) == "3 of 3"
    assert count_right(["a red cat in the meadow", *captions[1:]], data) == "2 of 3"
    data.description = "photographs"
    assert count_right(captions, data) == "known for synthetic scenes only"
