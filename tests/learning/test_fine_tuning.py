"""Runs that train the CNN, or its last stage."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config

from captioning.learning.loop import fit
from captioning.networks.backbones import last_stage
from captioning.scoring.evaluation import evaluate_loss
from model import CaptionModel
from train import build_run


def fine_tuned(dataset, fine_tune, **changes):
    """A run after one epoch, and the state of its model before."""
    options = {"epochs": 1, "backbone_learning_rate": 1e-3, "flip": True, **changes}
    run = build_run(tiny_config(dataset, fine_tune=fine_tune, **options))
    before = deepcopy(run.model.state_dict())
    fit(run)
    return run, before


@pytest.mark.parametrize("inject", ["par", "attend"])
def test_last_stage(dataset, inject):
    """A run trains the last stage without its BatchNorms; no other bit of the CNN changes."""
    run, before = fine_tuned(dataset, "last", inject=inject)
    backbone, state = run.model.encoder.cnn.network, run.model.state_dict()
    stage = {id(weight) for weight in last_stage(backbone, run.config.backbone)}
    names = {name for name, weight in backbone.named_parameters() if id(weight) in stage}
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    prefix = "encoder.cnn.network."
    assert {name.removeprefix(prefix) for name in changed if name.startswith(prefix)} == names


@pytest.mark.parametrize("fine_tune", ["last", "all"])
def test_learning_rates(dataset, fine_tune):
    """The trained part of the CNN has its own learning rate, and every parameter has one group."""
    run = build_run(tiny_config(dataset, fine_tune=fine_tune, backbone_learning_rate=1e-5))
    groups = run.optimizer.param_groups
    rates = {id(weight): group["max_lr"] for group in groups for weight in group["params"]}
    trained = {name: w for name, w in run.model.named_parameters() if w.requires_grad}
    assert len(rates) == len(trained) == sum(len(group["params"]) for group in groups)
    for name, weight in trained.items():
        expected = 1e-5 if name.startswith("encoder.cnn.") else run.config.learning_rate
        assert rates[id(weight)] == expected


@pytest.mark.parametrize("first, second", [("none", "last"), ("last", "none"), ("last", "all")])
def test_init_from(dataset, tmp_path, first, second):
    """A run starts from one with another `fine_tune`: the parameters, their names and the loss are
    the same, and so are the captions of the checkpoint.
    """
    run, _ = fine_tuned(dataset, first)
    best, out = str(dataset / "out" / "best.pt"), str(tmp_path / "second")
    other = build_run(replace(run.config, fine_tune=second, out=out, init_from=best))
    expected = run.model.state_dict()
    assert other.model.state_dict().keys() == expected.keys()
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, expected[name])
    (nll, count), (same, tokens) = (evaluate_loss(r.model, r.val_loader) for r in (other, run))
    assert count == tokens and nll == pytest.approx(same, rel=1e-3)
    images = sorted((dataset / "images").iterdir())[:3]
    assert CaptionModel.from_checkpoint(best).caption(images) == run.model.caption(images)
