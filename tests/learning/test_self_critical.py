"""Runs of self-critical training."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import command_line, tiny_config
from two_processes import train, train_in_two_processes

from captioning.base.checkpoints import load_safely
from captioning.base.modules import select
from captioning.decoding.beam_search import beam_search
from captioning.learning.loop import fit
from captioning.learning.options import SELF_CRITICAL
from runs import assert_same_result, ctrl_c, history_of
from train import build_run, main


@pytest.fixture(scope="module")
def trained(shared_dataset):
    """The config of a finished cross-entropy run."""
    config = tiny_config(
        shared_dataset, epochs=6, learning_rate=0.03, dropout=0.0, out=f"{shared_dataset}/trained"
    )
    fit(build_run(config))
    return config


def continued(trained, out, **changes):
    """A config of self-critical training from the best epoch of `trained`."""
    options = SELF_CRITICAL | {"learning_rate": 2e-3, "epochs": 2, "out": str(out)} | changes
    best = f"{trained.out}/best.pt"
    return replace(trained, loss="self-critical", init_from=best, **options)


def test_history_begins_with_epoch_0(trained, tmp_path, capsys):
    """Epoch 0 is the model that the run starts from; it is best.pt unless an epoch is better."""
    config = continued(trained, tmp_path, learning_rate=1e-9)  # changes no caption
    assert main(command_line(config)) == 0
    history, before = history_of(tmp_path), load_safely(config.init_from)
    assert [line["epoch"] for line in history] == [0, 1, 2]
    expected = min(line["val_loss"] for line in before["history"])
    assert history[0]["val_loss"] == pytest.approx(expected)
    assert "train_reward" not in history[0] and history[1]["train_reward"] > 0
    assert {"val_cider", "val_perplexity", "val_distinct", "val_bad_endings"} < history[0].keys()
    best = load_safely(tmp_path / "best.pt")
    assert [line["epoch"] for line in best["history"]] == [0]
    for name, weight in before["model"].items():
        assert torch.equal(best["model"][name], weight), name
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["CIDEr-D"] == pytest.approx(history[0]["val_cider"])
    rows = [row.split(",") for row in (tmp_path / "history.csv").read_text().splitlines()]
    assert [dict(zip(rows[0], row, strict=True))["epoch"] for row in rows[1:]] == ["0", "1", "2"]
    printed = capsys.readouterr().out
    assert "epoch   0  val loss" in printed and "reward" in printed


@pytest.mark.parametrize("after, save_every", [(0, 0), (2, 1), (4, 3)])
def test_resumed_equals_uninterrupted(trained, tmp_path, monkeypatch, after, save_every):
    """A run that is interrupted, in the first epoch or the second, and resumed is the same."""
    uninterrupted = continued(trained, tmp_path / "one", save_every=save_every)
    config = replace(uninterrupted, out=str(tmp_path / "other"))
    assert main(command_line(uninterrupted)) == 0
    with monkeypatch.context() as patch:
        updates = iter(range(100))
        patch.setattr(
            "captioning.learning.loop.schedule",
            lambda *_: ctrl_c() if next(updates) == after else 1.0,
        )
        assert main(command_line(config)) == 130
    assert len(history_of(config.out)) == 1 + (after > 3)
    assert main([*command_line(config), "--resume"]) == 0
    assert_same_result(config.out, uninterrupted.out)


def best_captions(decoder, memory, max_len):
    """In place of samples, the five best captions of a beam search, which are not random."""
    images = select(memory, torch.arange(0, len(memory), 5))
    tokens = beam_search(decoder, images, 5, max_len, 0.6, n_best=5).tokens
    return SimpleNamespace(tokens=tokens.flatten(0, 1).unsqueeze(1))


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are started by a fork server")
def test_two_processes(trained, tmp_path):
    """Two processes have the gradient, the rewards and the validation results of a single one."""
    one, two = (
        continued(trained, tmp_path / name, grad_accum_steps=2, xe_weight=0.1) for name in "ab"
    )
    patches = {"captioning.learning.losses.sample": best_captions}
    with mock.patch(*patches, *patches.values()):
        train(one)
    train_in_two_processes(two, patches)
    gradients = (load_safely(f"{config.out}-gradient.pt") for config in (one, two))
    for expected, found in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    for expected, found in zip(history_of(one.out), history_of(two.out), strict=True):
        for name in {"train_reward", "val_loss", "val_cider"} & expected.keys():
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_learning_rate_is_constant(trained, tmp_path):
    """All steps have the learning rate of the config, in AdamW without weight decay."""
    run = build_run(continued(trained, tmp_path, epochs=1))
    rates = []
    run.optimizer.register_step_post_hook(
        lambda *_: rates.extend((g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups)
    )
    fit(run)
    assert set(rates) == {(2e-3, 0.0)} and len(rates) > 4


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"init_from": None}, "--init-from"),
        ({"dropout": 0.1}, "--dropout 0"),
        ({"best_by": "loss"}, "--best-by cider"),
        ({"samples": 1}, "samples is 1"),
        ({"xe_weight": -1.0}, "xe_weight is -1.0"),
    ],
    ids=str,
)
def test_wrong_options(trained, tmp_path, capsys, changes, text):
    """Options that contradict self-critical training are an error of one sentence."""
    config = continued(trained, tmp_path)
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    assert main(command_line(config)) == 1
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
