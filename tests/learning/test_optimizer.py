"""Optimizer steps: their gradient, the learning rate, and the groups of parameters."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from captioning.learning.loop import fit, train_one_epoch
from captioning.learning.optimizer import schedule
from train import build_run


@pytest.mark.parametrize("grad_accum_steps", [1, 2, 100])
def test_gradient_of_a_step(dataset, grad_accum_steps):
    """The gradient of an optimizer step is that of the mean over all targets of its batches."""
    run = build_run(
        tiny_config(dataset, grad_accum_steps=grad_accum_steps, dropout=0.0, grad_clip=1e9)
    )
    model, weight = run.model, run.model.decoder.embedding.weight
    batches, expected, found = list(run.train_loader), [], []
    for start in range(0, len(batches), grad_accum_steps):
        nll = targets = 0
        for batch in batches[start : start + grad_accum_steps]:
            embedded = model.encoder.project(batch.features)[batch.image_index]
            log_probs = model.decoder(embedded, batch.captions).log_softmax(2)
            words = batch.captions[:, 1:]
            nll += F.nll_loss(log_probs.mT, words, ignore_index=0, reduction="sum")
            targets += int((words != 0).sum())
        expected += torch.autograd.grad(nll / targets, weight)
    run.optimizer.step = lambda: found.append(weight.grad.clone())  # and change no weight
    train_one_epoch(run, run.loss, lambda norm: None)
    assert len(batches) > 2 and len(found) == -(-len(batches) // grad_accum_steps)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_schedule():
    """The learning rate rises linearly over a tenth of the run and falls along a cosine to 0."""
    points = (0, 0.05, 0.1, 0.325, 0.55, 1, 1.1)
    expected = [0, 0.5, 1, 0.5 + 0.5**1.5, 0.5, 0, 0]
    assert list(map(schedule, points)) == pytest.approx(expected)
    assert schedule(0.3, "constant") == 1


@pytest.mark.parametrize("shape", ["one-cycle", "constant"])
def test_every_group_follows_the_schedule(dataset, shape):
    """In each step, the learning rate of a group is its own maximum times the schedule's factor."""
    options = {"epochs": 2, "learning_rate": 0.1, "grad_accum_steps": 2, "schedule": shape}
    run = build_run(tiny_config(dataset, **options))
    run.optimizer.param_groups[1]["max_lr"] = 0.01
    rates, steps = [], len(run.train_loader)
    for _ in range(2):
        train_one_epoch(
            run, run.loss, lambda _: rates.append([g["lr"] for g in run.optimizer.param_groups])
        )
        run.progress.history.append({"epoch": run.progress.epoch + 1})
        run.progress.step = 0
    ends = [epoch + min(step + 2, steps) / steps for epoch in (0, 1) for step in range(0, steps, 2)]
    factors = [schedule(end / 2, shape) for end in ends]
    assert np.array(rates) == pytest.approx(np.outer(factors, [0.1, 0.01]))
    assert len(factors) > 3 and len(set(factors)) == (1 if shape == "constant" else len(factors))


def test_weight_decay(dataset):
    """Weight matrices decay by learning rate times weight decay; biases and embeddings do not.

    The gradient is clipped to nearly nothing, so that the decay is all that changes the weights.
    """
    options = {"grad_clip": 1e-20, "weight_decay": 0.5, "learning_rate": 0.1, "inject": "init"}
    run = build_run(tiny_config(dataset, **options))
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    steps = len(run.train_loader)
    fit(run)
    left = math.prod(1 - 0.5 * 0.1 * schedule((i + 1) / (2 * steps)) for i in range(2 * steps))
    assert left < 0.9
    kept = {
        name
        for name in trained
        if "bias" in name or "norm" in name or name == "decoder.embedding.weight"
    }
    assert {"decoder.lstm.bias_hh_l0", "decoder.linear.bias", "encoder.linear.bias"} <= kept
    for name, parameter in trained.items():
        expected = before[name] * (1 if name in kept else left)
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("fine_tune", ["none", "last", "all"])
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
