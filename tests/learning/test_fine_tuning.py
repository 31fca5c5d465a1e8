"""Runs that train the CNN, or its last stage."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config

from captioning.learning.loop import fit
from captioning.networks.backbones import last_stage
from captioning.scoring.evaluation import evaluate_loss
from train import build_run


def fine_tuned(dataset, fine_tune, **changes):
    """A run after one epoch, and the state of its model before."""
    options = {"epochs": 1, "backbone_learning_rate": 1e-3, "flip": True, **changes}
    run = build_run(tiny_config(dataset, fine_tune=fine_tune, **options))
    before = deepcopy(run.model.state_dict())
    fit(run)
    return run, before


@pytest.mark.parametrize("fine_tune", ["none", "last", "all"])
@pytest.mark.parametrize("inject", ["par", "attend"])
def test_what_changes(dataset, fine_tune, inject):
    """A run trains no part of the CNN, exactly the last stage without BatchNorms, or the whole CNN
    with its BatchNorm statistics; features that change are not cached."""
    run, before = fine_tuned(dataset, fine_tune, inject=inject)
    network, state = run.model.encoder.cnn.network, run.model.state_dict()
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    changed = {name.removeprefix("encoder.cnn.network.") for name in changed if ".cnn." in name}
    stage = {id(weight) for weight in last_stage(network, run.config.backbone)}
    names = {name for name, weight in network.named_parameters() if id(weight) in stage}
    if fine_tune == "all":
        assert any("running_mean" in name for name in changed) and names < changed
        assert {name for name, _ in network.named_parameters()} <= changed
    else:
        assert changed == (names if fine_tune == "last" else set())
    assert 0 < len(names) < len(list(network.parameters())) / 3
    assert len(list((dataset / "cache").glob("features*"))) == (fine_tune == "none")


@pytest.mark.parametrize("first, second", [("none", "last"), ("last", "none"), ("last", "all")])
def test_init_from(dataset, tmp_path, first, second):
    """A run starts from one with another `fine_tune`, with the same weights and loss."""
    run, _ = fine_tuned(dataset, first)
    best, out = str(dataset / "out" / "best.pt"), str(tmp_path / "second")
    other = build_run(replace(run.config, fine_tune=second, out=out, init_from=best))
    expected, found = run.model.state_dict(), other.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    (loss, count), (same, targets) = (evaluate_loss(r.model, r.val_loader) for r in (other, run))
    assert count == targets and loss == pytest.approx(same, rel=1e-3)
