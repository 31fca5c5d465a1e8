"""What the tests of training runs share: a tiny model, interruptions, and equal results."""

import json
from pathlib import Path

import conftest
import torch
from conftest import WORDS

from captioning.base.checkpoints import load_safely
from captioning.learning import loop
from captioning.learning.optimizer import schedule
from vocabulary import Vocabulary

TIMING = {"seconds", "captions_per_second", "date"}


def tiny_model(captions=None, **options):
    """A model without dropout, with the words of `captions` or WORDS."""
    words = WORDS if captions is None else Vocabulary.build(captions, threshold=1).words
    torch.manual_seed(2)
    return conftest.tiny_model(words, **{"dropout": 0.0, **options})


# ---------------------------------------------------------------------------- interruptions


def ctrl_c():
    raise KeyboardInterrupt


def interrupt_at(monkeypatch, config, epoch, interrupt=ctrl_c):
    """Call `interrupt` in an optimizer step after `epoch` epochs."""

    def interrupting(progress, shape):
        if progress * config.epochs >= epoch:
            interrupt()
        return schedule(progress, shape)

    monkeypatch.setattr(loop, "schedule", interrupting)


# ---------------------------------------------------------------------------- results


def history_of(folder):
    """The lines of history.jsonl, without what differs between equal runs."""
    lines = [json.loads(line) for line in (Path(folder) / "history.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def contents(folder):
    """{name: content} of the files, without that of the lock."""
    files = sorted(Path(folder).iterdir()) if Path(folder).exists() else []
    return {path.name: path.read_bytes() for path in files if path.name != ".lock"}


def assert_equal(one, other, name="checkpoint"):
    """Two checkpoints are equal bit for bit, except for durations and the date."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one.keys() - TIMING:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{name}[{index}]")
    else:
        assert one == other, name


def assert_same_result(out, uninterrupted):
    """Two runs ended with the same history and checkpoints."""
    assert history_of(out) == history_of(uninterrupted)
    for name in ("last.pt", "best.pt"):
        one, other = load_safely(Path(out) / name), load_safely(Path(uninterrupted) / name)
        del one["train_config"], other["train_config"]  # which differ in `out` and `resume`
        assert_equal(one, other)
