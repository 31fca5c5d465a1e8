"""The training command: its files and its report, and what decides the result."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import command_line, tiny_config
from training_runs import contents

from captioning.learning.loop import fit
from captioning.learning.losses import TeacherForcing
from captioning.scoring.evaluation import caption_split
from data_loader import ImageDataset
from model import CaptionModel
from train import build_run, main, report

FILES = {"best.pt", "history.jsonl", "last.pt", "vocabulary.json"}


@pytest.fixture(scope="module")
def finished(shared_dataset):
    """A run, not to be modified."""
    run = build_run(tiny_config(shared_dataset, learning_rate=0.02))
    fit(run)
    return run


def val_loss(config):
    return fit(build_run(config))[0]["val_loss"]


def test_main(dataset, capsys):
    """The command trains, prints the metrics, leaves six files and a lock, and exits with 0."""
    assert main(command_line(tiny_config(dataset, epochs=1))) == 0
    assert set(contents(dataset / "out")) == {*FILES, "metrics.json"}
    printed = capsys.readouterr()
    assert "12 training and 12 validation images" in printed.out and "float32" in printed.out
    assert "CIDEr-D" in printed.out and printed.err == ""


def test_report(finished):
    """The report evaluates best.pt on the validation images and is written to metrics.json.

    Before it, a run has left its checkpoints, history and vocabulary, and no partial file.
    """
    out = Path(finished.config.out)
    assert set(contents(out)) == FILES
    words = json.loads((out / "vocabulary.json").read_text())["words"]
    assert words == finished.model.vocab.words
    metrics = report(finished)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    best = min(finished.progress.history, key=lambda line: line["val_loss"])
    assert metrics["perplexity"] == pytest.approx(best["val_perplexity"])
    assert metrics["images"] == 12 and metrics["unk_rate"] == 0
    assert metrics["precision"] == "float32"
    assert all(metrics[name] >= 0 for name in ("BLEU-4", "ROUGE-L", "CIDEr-D", "distinct"))


def test_the_seed_decides(finished, tmp_path):
    """Equal seeds give equal runs, whatever random numbers were used before; others differ.

    Of the equal ones, one computes its features, and one loads them from the cache.
    """
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        folders = {"out": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}
        losses.append(val_loss(replace(finished.config, **folders, seed=seed, epochs=1)))
    assert losses[0] == losses[1] != losses[2]


def test_deterministic(finished, tmp_path):
    """`deterministic` selects PyTorch's deterministic algorithms; on a CPU nothing changes."""
    try:
        loss = val_loss(replace(finished.config, out=str(tmp_path), deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss == finished.progress.history[0]["val_loss"]


def test_no_image_baseline(dataset):
    """Neither the loss nor the captions of the no-image baseline depend on the image."""
    run = build_run(tiny_config(dataset, no_image=True, epochs=1, learning_rate=0.02))
    fit(run)
    model = CaptionModel.from_checkpoint(dataset / "out" / "best.pt")
    loss, batch = TeacherForcing(model), next(iter(run.val_loader))
    other = batch._replace(features=torch.randn_like(batch.features))
    assert torch.equal(loss(batch)["loss"], loss(other)["loss"])
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight)  # after one epoch, all captions would be equal anyway
    features = torch.randn(12, *batch.features.shape[1:])
    images = ImageDataset(run.val_images.data, features=features)
    captions = caption_split(model, images)
    assert len(captions) == 12 and len(set(captions)) == 1
    model.encoder.no_image = False  # the check itself: these features make a difference
    assert len(set(caption_split(model, images))) > 3
