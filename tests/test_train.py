"""The training command: its files and its report, and what decides the result."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import command_line, tiny_config
from torch import nn
from training_runs import contents

from captioning.base.checkpoints import load_checkpoint
from captioning.learning.loop import fit
from captioning.learning.losses import TeacherForcing
from model import CaptionModel
from train import build_run, main, report

FILES = {"best.pt", "history.jsonl", "last.pt", "vocabulary.json", "metrics.json"}


def test_main(dataset, capsys):
    """The command trains, evaluates best.pt, prints its metrics, and leaves these files."""
    assert main(command_line(tiny_config(dataset, learning_rate=0.02))) == 0
    out = dataset / "out"
    assert set(contents(out)) == FILES
    printed = capsys.readouterr()
    assert "12 training and 12 validation images" in printed.out and printed.err == ""
    metrics = json.loads((out / "metrics.json").read_text())
    assert json.dumps(metrics, indent=2) in printed.out
    history = map(json.loads, (out / "history.jsonl").open())
    best = min(line["val_perplexity"] for line in history)
    assert metrics["perplexity"] == pytest.approx(best)
    assert metrics["images"] == 12 and metrics["unk_rate"] == 0
    assert metrics["precision"] == "float32"
    assert all(metrics[name] >= 0 for name in ("BLEU-4", "ROUGE-L", "CIDEr-D", "distinct"))
    words = json.loads((out / "vocabulary.json").read_text())["words"]
    assert words == CaptionModel.from_checkpoint(out / "best.pt").vocab.words


def test_the_seed_decides(shared_dataset, tmp_path):
    """Equal seeds give equal runs, whatever random numbers were used before; others differ.

    Of the equal runs, one computes its features, and the other loads them from the cache.
    """
    losses, options = [], {"epochs": 1, "cache_dir": str(tmp_path / "cache")}
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        config = tiny_config(shared_dataset, out=f"{tmp_path}/{number}", seed=seed, **options)
        losses.append(fit(build_run(config))[0]["val_loss"])
    assert losses[0] == losses[1] != losses[2]


class OwnNetwork(nn.Sequential):
    """Images -> (B, 8)."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_run_with_own_network(dataset):
    """A run with a module as backbone trains, resumes and reports, and its card does not claim
    weights of a library; another run can start from its checkpoint.
    """
    torch.manual_seed(0)
    network, config = OwnNetwork(), tiny_config(dataset, epochs=1)
    fit(build_run(config, network))
    longer = replace(config, epochs=2, resume=True)
    run = build_run(longer, network)
    assert len(fit(run)) == 2 and report(run)["images"] == 12
    encoder = {"network": "OwnNetwork", "weights": "own", "licence": "not recorded"}
    assert load_checkpoint(dataset / "out" / "best.pt")["card"]["encoder"] == encoder
    with pytest.raises(ValueError, match="the weights of the CNN have changed"):
        build_run(longer, OwnNetwork())
    options = {"init_from": str(dataset / "out" / "last.pt"), "out": str(dataset / "next")}
    started = build_run(replace(config, **options), OwnNetwork()).model
    assert torch.equal(started.encoder.cnn.network[0].weight, network[0].weight)


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
    paths = run.val_images.data.paths
    assert len(set(model.caption(paths))) == 1
    model.encoder.no_image = False  # the check itself: the images make a difference
    assert len(set(model.caption(paths))) > 3
