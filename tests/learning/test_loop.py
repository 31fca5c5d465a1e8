"""The training loop: its history, the best epoch, and runs on datasets of one's own."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import CAPTIONS, tiny_config
from torch.utils.data import Dataset
from training_runs import tiny_model

from captioning.base.checkpoints import load_safely
from captioning.learning import loop
from captioning.learning.loop import fit
from captioning.learning.losses import TeacherForcing
from captioning.learning.optimizer import build_optimizer
from captioning.learning.run import Run
from captioning.learning.train_config import TrainConfig
from captioning.scoring.evaluation import evaluate_loss
from data_loader import get_loader
from model import CaptionModel
from train import build_run


def nll_by_hand(model, pairs):
    """(negative log-likelihood, targets), caption by caption with `CaptionModel.forward`."""
    total, count = 0.0, 0
    with torch.no_grad():
        for image, caption in pairs:
            ids = torch.tensor([model.vocab.encode(caption)])
            log_probs = model.eval()(image[None], ids).log_softmax(-1)
            total -= log_probs[0].gather(1, ids[0, 1:, None]).sum().item()
            count += ids.shape[1] - 1
    return total, count


@pytest.fixture(params=["loss", "cider"])
def fit_with(request, dataset, monkeypatch):
    """Train with given validation results, better the lower, in place of those of the model."""

    def run(results, **options):
        left = iter(results)
        if request.param == "cider":
            scores = {"distinct": 1.0, "bad endings": 0.0}
            monkeypatch.setattr(loop, "score", lambda *_: {"CIDEr-D": -next(left), **scores})
        else:
            monkeypatch.setattr(loop, "evaluate_loss", lambda *_: (next(left) * 10, 10))
        history = fit(build_run(tiny_config(dataset, best_by=request.param, **options)))
        return [-line["val_cider"] if "val_cider" in line else line["val_loss"] for line in history]

    return run


def test_early_stopping(dataset, fit_with):
    """After `patience` epochs without improvement, in loss or CIDEr-D, the run stops; best.pt is
    the best epoch, and of equal ones the first."""
    assert fit_with([3.0, 2.0, 2.0, 2.4, 1.0], epochs=9, patience=2) == [3.0, 2.0, 2.0, 2.4]
    assert len(load_safely(dataset / "out" / "best.pt")["history"]) == 2
    results = [3.0, 2.0, 2.5, 1.9, 2.5, 1.8]  # after each improvement, it starts to count again
    assert fit_with(results, epochs=6, patience=2, overwrite=True) == results


class Pairs(Dataset):
    """Captions with images, or with the features that `cnn` computes: nothing but the items."""

    def __init__(self, vocab, cnn=None):
        generator = torch.Generator().manual_seed(0)
        blocks = 4 * torch.rand(len(CAPTIONS), 3, 4, 4, generator=generator) - 2
        self.images = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)
        self.texts = [(n, text) for n, captions in enumerate(CAPTIONS) for text in captions]
        with torch.no_grad():
            self.features = cnn.eval()(self.images) if cnn else None
        self.encode = vocab.encode

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        number, text = self.texts[index]
        if self.features is None:
            return self.images[number], torch.tensor(self.encode(text))
        return None, self.encode(text), self.features[number]


@pytest.mark.parametrize(
    "kind, options",
    [
        ("images", {}),
        ("images", {"fine_tune": "all"}),
        ("features", {}),
        ("features", {"inject": "attend"}),
    ],
    ids=str,
)
def test_own_dataset(tmp_path, kind, options):
    """Any Dataset of (image, caption), or of (None, caption, features), trains with `fit`, which
    writes the history and the best epoch; the config needs no files of captions."""
    config = TrainConfig(
        out=str(tmp_path), epochs=3, learning_rate=0.02, batch_size=8, device="cpu", **options
    )
    model = tiny_model(sum(CAPTIONS, []), **options)
    dataset = Pairs(model.vocab, model.encoder.cnn if kind == "features" else None)

    def new_run(config):
        return Run(
            config,
            model,
            TeacherForcing(model),
            build_optimizer(model, config),
            get_loader(dataset, "train", config.batch_size),
            get_loader(dataset, "val", config.batch_size),
        )

    run = new_run(config)
    history = fit(run)
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history[2]["train_loss"] < history[0]["train_loss"]
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").open()] == history
    best = CaptionModel.from_checkpoint(tmp_path / "best.pt")
    loss, targets = evaluate_loss(best, run.val_loader)
    assert loss / targets == pytest.approx(min(line["val_loss"] for line in history), rel=1e-5)
    pairs = [(dataset.images[number], text) for number, text in dataset.texts]
    assert nll_by_hand(best, pairs) == (pytest.approx(loss, rel=1e-3), targets)
    with pytest.raises(ValueError, match="contains an earlier run"):
        fit(new_run(config))
    assert fit(new_run(replace(config, resume=True, epochs=4)))[:3] == history
