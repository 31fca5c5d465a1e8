"""Runs that start from a checkpoint: new words, self-critical training, options."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, command_line, flag, tiny_config
from training_runs import contents, history_of

from captioning.base.checkpoints import load_safely, save
from captioning.base.options import names_with
from captioning.decoding.confidence import Confidence
from captioning.learning.loop import fit
from captioning.learning.train_config import CONTINUE, SCENES, SELF_CRITICAL, config_for, parse_args
from captioning.networks.model_config import INJECT
from captioning.networks.word_detector import WordDetector
from model import CaptionModel, ModelConfig
from train import NEW_WORDS_LOG_ODDS, build_run, main
from vocabulary import UNK, tokenize

ROWS = ("decoder.embedding.weight", "decoder.linear.weight", "decoder.linear.bias")


@pytest.fixture(scope="module")
def trained(shared_dataset):
    """The config of a finished run, with the words that occur at least three times."""
    options = {"epochs": 6, "learning_rate": 0.03, "out": f"{shared_dataset}/trained"}
    options |= {"inject": "attend", "num_heads": 2, "dropout": 0.0, "min_word_freq": 3}
    config = tiny_config(shared_dataset, **options)
    fit(build_run(config))
    return config


@pytest.fixture
def continued(trained, tmp_path):
    """A config that continues `trained` for two epochs, with new words or self-critically."""

    def new_config(loss, **changes):
        options = SELF_CRITICAL if loss == "self-critical" else {}
        options = options | {"loss": loss, "learning_rate": 2e-3, "best_by": "cider", "epochs": 2}
        options |= {"min_word_freq": 2, "init_from": f"{trained.out}/best.pt"}
        return replace(trained, out=str(tmp_path / "out"), **options | changes)

    return new_config


@pytest.fixture
def required(continued):
    """The command line with the required options alone, and without a download or a GPU."""
    config = continued("cross-entropy")
    names = [*names_with(config, "required"), "out", "init_from", "cache_dir", "device"]
    return [word for name in names for word in flag(name, getattr(config, name))]


def words_of(minimum):
    """The words that occur at least `minimum` times in CAPTIONS."""
    words = [word for captions in CAPTIONS for text in captions for word in tokenize(text)]
    return {word for word in words if words.count(word) >= minimum}


@pytest.mark.parametrize("inject", [*INJECT, "attend"])
def test_old_words_are_unchanged(shared_dataset, tmp_path, inject):
    """All weights are those of the checkpoint, bit for bit; new words have rows behind the old.

    Old words lose only the probability that the new words have: a fixed part of that of <unk>.
    Their log-probability falls by log(1 + r p), where p is the probability of `<unk>` before.
    """
    path, options = str(tmp_path / "source.pt"), {"inject": inject, "out": str(tmp_path)}
    source = build_run(tiny_config(shared_dataset, min_word_freq=3, **options)).model
    save(source.checkpoint(), path)
    after = build_run(tiny_config(shared_dataset, init_from=path, **options)).model.eval()
    before = CaptionModel.from_checkpoint(path)
    old, words = len(before.vocab), after.vocab.words
    assert words[:old] == before.vocab.words
    assert set(words[old:]) == words_of(1) - words_of(3) != set()
    for name, weight in after.state_dict().items():
        if name in ROWS:
            assert len(weight) == len(words) and weight.isfinite().all()
            weight = weight[:old]
        assert torch.equal(weight, before.state_dict()[name]), name
    images = before.preprocess(sorted((shared_dataset / "images").iterdir())[:3])
    captions = torch.randint(3, old, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = (m(images, captions).log_softmax(-1) for m in (before, after))
    mass = math.exp(NEW_WORDS_LOG_ODDS) * expected[..., UNK].exp()
    assert mass.max() > 1e-3
    loss = torch.log1p(mass).unsqueeze(-1)
    torch.testing.assert_close(found[..., :old], expected - loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[..., old:].exp().sum(-1), mass / (1 + mass))


def test_new_words_are_learned(continued, capsys):
    """Training makes the new words of the captions more probable, and the card has its origin."""
    config = continued("cross-entropy", epochs=4, learning_rate=0.01, best_by="loss")
    run = build_run(config)
    assert f"{len(words_of(2) - words_of(3))} new words: " in capsys.readouterr().out
    start = run.model.decoder.linear.bias.detach().clone()
    history = fit(run)
    assert history[-1]["val_loss"] < 0.95 * history[0]["val_loss"]
    model = CaptionModel.from_checkpoint(Path(config.out) / "last.pt")
    new = slice(len(load_safely(config.init_from)["words"]), None)
    assert (model.decoder.linear.bias[new] > start[new]).all()
    assert "initialized from" in model.card


@pytest.mark.parametrize("loss", ["cross-entropy", "self-critical"])
def test_history_begins_with_epoch_0(continued, loss, capsys):
    """Epoch 0 is the model that the run starts from, and best.pt unless an epoch is better;
    self-critical training adds no words, which its samples would not contain."""
    config = continued(loss, learning_rate=1e-30)  # changes nothing
    assert main(command_line(config)) == 0
    history, before = history_of(config.out), load_safely(config.init_from)
    assert [line["epoch"] for line in history] == [0, 1, 2]
    assert {"val_cider", "val_perplexity", "val_distinct", "val_bad_endings"} < history[0].keys()
    best, old = load_safely(f"{config.out}/best.pt"), len(before["words"])
    assert [line["epoch"] for line in best["history"]] == [0]
    assert best["words"][:old] == before["words"]
    for name, weight in before["model"].items():
        row = slice(old) if name in ROWS else ...
        assert torch.equal(best["model"][name][row], weight), name
    if loss == "self-critical":
        assert best["words"] == before["words"]
        expected = min(line["val_loss"] for line in before["history"])
        assert history[0]["val_loss"] == pytest.approx(expected)
        assert "train_reward" not in history[0] and history[1]["train_reward"] > 0
    metrics = json.loads((Path(config.out) / "metrics.json").read_text())
    assert metrics["CIDEr-D"] == pytest.approx(history[0]["val_cider"])
    assert "epoch   0  val loss" in capsys.readouterr().out


def test_defaults(continued, required):
    """The architecture and the defaults are those of the checkpoint and of the loss, on the command
    line and off; options override them, but a preset of a dataset does not."""
    found = parse_args([*required, "--dropout", "0.1", "--image-size", "96"])
    saved = load_safely(found.init_from)["config"]
    for name in names_with(ModelConfig, "fits"):
        assert getattr(found, name) == saved[name], name
    assert vars(found).items() >= (CONTINUE | {"dropout": 0.1, "image_size": 96}).items()
    critical = parse_args([*required, "--loss", "self-critical"])
    assert SELF_CRITICAL.items() <= vars(critical).items() and critical.num_heads == 2
    assert (
        parse_args([*required, "--loss", "self-critical", "--learning-rate", "1"]).learning_rate
        == 1
    )
    splits = {"train": ("a", "b"), "val": ("c", "d")}
    preset = config_for("synthetic", splits, "out", init_from=found.init_from, epochs=3)
    assert (preset.hidden_size, preset.epochs, preset.image_size) == (16, 3, 64)
    assert preset.learning_rate == CONTINUE["learning_rate"]
    changes = {"loss": "self-critical", "init_from": found.init_from, "weight_decay": 0.5}
    expected = SELF_CRITICAL | changes | {"batch_size": SCENES["batch_size"], "hidden_size": 16}
    assert expected.items() <= vars(config_for("synthetic", splits, "out", **changes)).items()
    assert parse_args([*required, "--init-from", "none"]).inject == "par"


def test_required_options_alone(required, capsys):
    """The required options are enough; a sentence says if --weights are not used."""
    assert main([*required, "--epochs", "1", "--weights", "other.pth"]) == 0
    assert "not other.pth" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, text",
    [
        ("--inject par", "inject attend, not par"),
        ("--num-heads 4", "num_heads 2, not 4"),
        ("--hidden-size 24", "hidden_size 16, not 24"),
        ("--backbone resnet18", "backbone mobilenet_v3_small, not resnet18"),
        ("--loss self-critical --init-from none", "give --init-from"),
        ("--loss self-critical --dropout 0.1", "--dropout 0"),
        ("--loss self-critical --best-by loss", "--best-by cider"),
        ("--loss self-critical --samples 1", "samples is 1"),
    ],
)
def test_wrong_options(continued, required, capsys, option, text):
    """An option that contradicts the checkpoint or the loss is an error of one sentence."""
    assert main([*required, *option.split()]) == 1
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert contents(continued("cross-entropy").out) == {}


def test_the_detector_is_kept(trained, continued, tmp_path):
    """A continued model has the detector and the confidence of its source, although the detector
    does not know the new words; with a CNN that is trained, it has none."""
    model = CaptionModel.from_checkpoint(f"{trained.out}/best.pt")
    features = torch.randn(9, 4, model.encoder.cnn.feature_size)
    model.detector = WordDetector.fit(features, torch.rand(9, len(model.vocab)))
    model.confidence = Confidence(torch.ones(5), torch.ones(()))
    save(model.checkpoint(), tmp_path / "calibrated.pt")
    config = continued("cross-entropy", init_from=str(tmp_path / "calibrated.pt"), flip=False)
    run = build_run(config)
    assert len(run.model.vocab) > len(model.vocab)
    decoded = run.model.eval().generate(features=run.train_loader.dataset.features[[3]])
    assert decoded.confidence > -1
    run.lock.close()
    changed = build_run(replace(config, fine_tune="all", out=str(tmp_path / "other")))
    assert changed.model.confidence is changed.model.detector is None
    changed.lock.close()
