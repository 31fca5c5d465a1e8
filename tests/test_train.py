"""Training: gradients, schedule, parameter groups, the best epoch, and the files of a run."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command_line, tiny_config

import train
from captioning.learning.checkpoint import load_safely
from captioning.learning.losses import TeacherForcing
from captioning.learning.run import build_run
from evaluate import caption_dataset
from model import CaptionModel
from train import fit, main, report, schedule, train_one_epoch
from vocabulary import Vocabulary

FILES = [".lock", "best.pt", "history.csv", "history.jsonl", "last.pt", "vocabulary.json"]


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture(scope="module")
def finished(shared_dataset):
    """A run of three epochs, not to be modified."""
    run = build_run(tiny_config(shared_dataset, epochs=3, learning_rate=0.02))
    fit(run)
    return run


# ---------------------------------------------------------------------------- optimizer steps


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
        for features, captions, _ in batches[start : start + grad_accum_steps]:
            logits = model.decoder(model.encoder.project(features), captions).flatten(0, 1)
            wanted = captions[:, 1:].flatten()
            nll = nll + F.nll_loss(logits.log_softmax(1), wanted, ignore_index=0, reduction="sum")
            targets += int((wanted != 0).sum())
        expected += torch.autograd.grad(nll / targets, weight)
    run.optimizer.step = lambda: found.append(weight.grad.clone())  # and change no weight
    train_one_epoch(run, lambda norm: None)
    assert len(batches) > 2 and len(found) == -(-len(batches) // grad_accum_steps)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_schedule():
    """The learning rate rises linearly over a tenth of the run and falls along a cosine to 0."""
    points = (0, 0.05, 0.1, 0.325, 0.55, 1, 1.1)
    expected = [0, 0.5, 1, 0.5 + 0.5**1.5, 0.5, 0, 0]
    assert list(map(schedule, points)) == pytest.approx(expected)


def test_every_group_follows_the_schedule(dataset):
    """In each step, the learning rate of a group is its own maximum times the schedule's factor."""
    run = build_run(tiny_config(dataset, epochs=2, learning_rate=0.1, grad_accum_steps=2))
    run.optimizer.param_groups[1]["max_lr"] = 0.01
    rates, steps = [], len(run.train_loader)
    for _ in range(2):
        train_one_epoch(run, lambda _: rates.append([g["lr"] for g in run.optimizer.param_groups]))
        run.progress.history.append({"epoch": run.progress.epoch + 1})
        run.progress.step = 0
    ends = [epoch + min(step + 2, steps) / steps for epoch in (0, 1) for step in range(0, steps, 2)]
    factors = [schedule(end / 2) for end in ends]
    assert np.array(rates) == pytest.approx(np.outer(factors, [0.1, 0.01]))
    assert len(set(factors)) == len(factors) > 3


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


def test_fine_tuning(dataset):
    """With `fine_tune` "all" the CNN is trained, from the images: its features are not cached."""
    run = build_run(tiny_config(dataset, fine_tune="all", epochs=1))
    weight = run.model.encoder.backbone.get_parameter("features.0.0.weight")
    before = weight.detach().clone()
    fit(run)
    assert not torch.equal(weight, before)
    assert not list((dataset / "cache").glob("features*"))


# ---------------------------------------------------------------------------- reproducibility


def val_loss(config):
    return fit(build_run(config))[0]["val_loss"]


def test_the_seed_decides(finished, tmp_path):
    """Equal seeds give equal runs, whatever random numbers were used before; others differ."""
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        losses.append(
            val_loss(replace(finished.config, out=str(tmp_path / name), seed=seed, epochs=1))
        )
    assert losses[0] == losses[1] != losses[2]


def test_cached_features_change_nothing(finished, tmp_path):
    """A run is the same whether its features are computed or loaded from the cache."""
    config = replace(finished.config, cache_dir=str(tmp_path / "cache"), epochs=1)
    computed, loaded = (val_loss(replace(config, out=str(tmp_path / name))) for name in "ab")
    assert computed == loaded


def test_deterministic(finished, tmp_path):
    """`deterministic` selects PyTorch's deterministic algorithms; on a CPU nothing changes."""
    try:
        loss = val_loss(replace(finished.config, out=str(tmp_path), deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss == finished.progress.history[0]["val_loss"]


# ---------------------------------------------------------------------------- the files of a run


def test_main(dataset, capsys):
    """The command trains, prints the metrics, leaves six files and a lock, and exits with 0."""
    assert main(command_line(tiny_config(dataset, epochs=1))) == 0
    assert names_in(dataset / "out") == sorted([*FILES, "metrics.json"])
    printed = capsys.readouterr()
    assert "12 training and 12 validation images" in printed.out and "float32" in printed.out
    assert "CIDEr-D" in printed.out and printed.err == ""


def test_files_of_a_run(finished):
    """A run leaves its checkpoints, history and vocabulary, and no partially written file."""
    assert set(names_in(finished.config.out)) == {*FILES}
    words = Vocabulary.load(Path(finished.config.out) / "vocabulary.json").words
    assert words == finished.model.vocab.words


def test_history(finished):
    """history.jsonl and history.csv contain the history, in which the training loss falls."""
    history, out = finished.progress.history, Path(finished.config.out)
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert [json.loads(line) for line in (out / "history.jsonl").open()] == history
    with open(out / "history.csv") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == history


def test_best_checkpoint(finished):
    """best.pt has the weights of the epoch with the lowest validation loss.

    The oracle computes the loss caption by caption with `CaptionModel.forward` and log_softmax.
    """
    model = CaptionModel.from_checkpoint(Path(finished.config.out) / "best.pt")
    data, total, count = finished.val_loader.dataset.data, 0.0, 0
    with torch.no_grad():
        for path, captions in zip(data.paths, data.captions, strict=True):
            image = model.transform(path)[None]
            for caption in captions:
                ids = torch.tensor([model.vocab.encode(caption)])
                log_probs = model(image, ids).log_softmax(-1)
                total -= log_probs[0].gather(1, ids[0, 1:, None]).sum().item()
                count += ids.shape[1] - 1
    best = min(line["val_loss"] for line in finished.progress.history)
    assert total / count == pytest.approx(best, rel=1e-3)  # cached features are float16


def test_report(finished):
    """The report evaluates best.pt on the validation images and is written to metrics.json."""
    metrics = report(finished)
    file = Path(finished.config.out) / "metrics.json"
    assert json.loads(file.read_text()) == metrics
    file.unlink()
    best = min(finished.progress.history, key=lambda line: line["val_loss"])
    assert metrics["perplexity"] == pytest.approx(best["val_perplexity"])
    assert metrics["images"] == 12 and metrics["unk_rate"] == 0
    assert metrics["precision"] == "float32"
    assert all(metrics[name] >= 0 for name in ("BLEU-4", "ROUGE-L", "CIDEr-D", "distinct"))


# ---------------------------------------------------------------------------- the best epoch


def captions_with(cider):
    """What `score_captions` returns of this."""
    return {"CIDEr-D": cider, "distinct": 1.0, "bad endings": 0.0}


@pytest.fixture(params=["loss", "cider"])
def fit_with(request, dataset, monkeypatch):
    """Train with given validation results, better the lower, in place of those of the model."""

    def run(results, **options):
        left = iter(results)
        if request.param == "cider":
            monkeypatch.setattr(train, "score_captions", lambda *_: captions_with(-next(left)))
        else:
            monkeypatch.setattr(train, "evaluate_loss", lambda *_: (next(left) * 10, 10))
        history = fit(build_run(tiny_config(dataset, best_by=request.param, **options)))
        return [-line["val_cider"] if "val_cider" in line else line["val_loss"] for line in history]

    return run


def test_early_stopping(dataset, fit_with):
    """After `patience` epochs without improvement, in loss or CIDEr-D, the run stops.

    best.pt is the best epoch, and of equal ones the first.
    """
    assert fit_with([3.0, 2.0, 2.0, 2.4, 1.0], epochs=9, patience=2) == [3.0, 2.0, 2.0, 2.4]
    assert len(load_safely(dataset / "out" / "best.pt")["history"]) == 2


def test_patience_starts_again(fit_with):
    """After each improvement the run has `patience` epochs again."""
    results = [3.0, 2.0, 2.5, 1.9, 2.5, 1.8]
    assert fit_with(results, epochs=6, patience=2) == results


# ---------------------------------------------------------------------------- --init-from


def test_init_from(finished, tmp_path):
    """A run starts from the weights and the words of the checkpoint, whatever its captions."""
    best = Path(finished.config.out) / "best.pt"
    config = replace(finished.config, init_from=str(best), out=str(tmp_path), min_word_freq=3)
    run = build_run(config)
    checkpoint = load_safely(best)
    assert run.model.vocab.words == checkpoint["words"]
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, checkpoint["model"][name]), name
    history = fit(run)
    assert history[0]["val_loss"] < finished.progress.history[0]["val_loss"]


@pytest.mark.parametrize("content", ["another architecture", "no checkpoint", "nothing"])
def test_init_from_something_else(finished, tmp_path, capsys, content):
    """A checkpoint of another architecture, or no checkpoint, is an error that names the file."""
    path = Path(finished.config.out) / "best.pt"
    if content != "another architecture":
        path = tmp_path / "file.pt"
    if content == "no checkpoint":
        path.write_bytes(b"text")
    config = replace(finished.config, init_from=str(path), out=str(tmp_path), hidden_size=24)
    assert main(command_line(config)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(path) in error and len(error) < 600
    assert not (tmp_path / "last.pt").exists()


# ---------------------------------------------------------------------------- no-image baseline


def test_no_image_baseline(dataset):
    """Neither the loss nor the captions of the no-image baseline depend on the image."""
    run = build_run(tiny_config(dataset, no_image=True, epochs=1, learning_rate=0.02))
    fit(run)
    model = CaptionModel.from_checkpoint(dataset / "out" / "best.pt")
    loss = TeacherForcing(model, precomputed=True)
    features, captions, _ = next(iter(run.val_loader))
    other = torch.randn_like(features)
    assert loss(features, captions)[0].item() == loss(other, captions)[0].item()
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight)  # after one epoch, all captions would be equal anyway
    different = np.random.default_rng(0).normal(size=(12, 1, 1, model.encoder.feature_size))
    captions = caption_dataset(model, run.val_loader.dataset.data, features=different)
    assert len(captions) == 12 and len(set(captions)) == 1
    model.encoder.no_image = False  # the check itself: these features make a difference
    assert len(set(caption_dataset(model, run.val_loader.dataset.data, features=different))) > 3
