"""Runs that start from a checkpoint: its words and new ones, its architecture, its defaults."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, command_line, tiny_config
from two_processes import train, train_in_two_processes

from captioning.base.checkpoints import load_safely, save
from captioning.base.options import names_with
from captioning.learning.loop import fit
from captioning.learning.new_words import LOG_ODDS
from captioning.learning.options import CONTINUE, SELF_CRITICAL, config_for, parse_args
from captioning.networks.config import INJECT
from model import CaptionModel, ModelConfig
from runs import assert_same_result, contents, history_of, interrupt_at
from train import build_run, main
from vocabulary import UNK, tokenize

ROWS = ("decoder.embedding.weight", "decoder.linear.weight", "decoder.linear.bias")
ATTEND = {"inject": "attend", "num_heads": 2}


def words_of(minimum):
    """The words that occur at least `minimum` times in CAPTIONS."""
    words = [word for captions in CAPTIONS for text in captions for word in tokenize(text)]
    return {word for word in words if words.count(word) >= minimum}


@pytest.fixture(scope="module")
def source_of(shared_dataset):
    """A checkpoint with random weights, of the words that occur at least three times."""

    def write(**options):
        path = f"{shared_dataset}/{options}.pt"
        if not Path(path).exists():
            out = f"{shared_dataset}/source"
            model = build_run(
                tiny_config(shared_dataset, min_word_freq=3, out=out, **options)
            ).model
            save(model.checkpoint(), path)
        return path

    return write


@pytest.fixture
def config(shared_dataset, source_of, tmp_path):
    """A run from an attention model, with new words."""
    return tiny_config(
        shared_dataset,
        init_from=source_of(**ATTEND),
        min_word_freq=2,
        learning_rate=0.01,
        out=str(tmp_path / "out"),
        **ATTEND,
    )


@pytest.fixture
def required(config):
    """The command line with the required options alone, and without a download or a GPU."""
    names = [*names_with(config, "required"), "out", "init_from", "cache_dir", "device"]
    return [w for n in names for w in (f"--{n.replace('_', '-')}", str(getattr(config, n)))]


# ---------------------------------------------------------------------------- new words


@pytest.mark.parametrize("inject", [*INJECT, "attend"])
def test_old_words_are_unchanged(shared_dataset, source_of, tmp_path, inject):
    """All weights are those of the checkpoint, bit for bit; new words have rows behind the old.

    Old words lose only the probability that the new words have: a fixed part of that of <unk>.
    Their log-probability falls by log(1 + r p), where p is the probability of `<unk>` before.
    """
    path = source_of(inject=inject)
    config = tiny_config(shared_dataset, inject=inject, init_from=path, out=str(tmp_path))
    before, after = CaptionModel.from_checkpoint(path), build_run(config).model.eval()
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
    mass = math.exp(LOG_ODDS) * expected[..., UNK].exp()
    assert mass.max() > 1e-3
    loss = torch.log1p(mass).unsqueeze(-1)
    torch.testing.assert_close(found[..., :old], expected - loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[..., old:].exp().sum(-1), mass / (1 + mass))


def test_new_words_are_learned(config, capsys):
    """Training makes the new words of the captions more probable, and the card has its origin."""
    run = build_run(replace(config, epochs=4))
    assert f"{len(words_of(2) - words_of(3))} new words: " in capsys.readouterr().out
    start = run.model.decoder.linear.bias.detach().clone()
    history = fit(run)
    assert history[-1]["val_loss"] < 0.95 * history[0]["val_loss"]
    model = CaptionModel.from_checkpoint(Path(config.out) / "last.pt")
    new = slice(len(load_safely(config.init_from)["words"]), None)
    assert (model.decoder.linear.bias[new] > start[new]).all()
    assert "initialized from" in model.card


def test_self_critical_adds_no_words(config):
    """Self-critical training keeps the words of the checkpoint: its samples have no others."""
    run = build_run(replace(config, loss="self-critical", **SELF_CRITICAL))
    assert run.model.vocab.words == load_safely(config.init_from)["words"]


# ---------------------------------------------------------------------------- runs


def test_resumed_equals_uninterrupted(config, tmp_path, monkeypatch):
    """A run with new words that is interrupted and resumed is the same, bit for bit."""
    other = replace(config, out=str(tmp_path / "other"), save_every=1)
    assert main(command_line(replace(config, save_every=1))) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, other, 0.6)
        assert main(command_line(other)) == 130
    assert main([*command_line(other), "--resume"]) == 0
    assert_same_result(other.out, config.out)


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are started by a fork server")
def test_two_processes(config, tmp_path):
    """Two processes have the gradient and the results of a single one, with new words too."""
    one, two = (replace(config, dropout=0.0, out=str(tmp_path / name)) for name in "ab")
    train(one)
    train_in_two_processes(two)
    gradients = (load_safely(f"{config.out}-gradient.pt") for config in (one, two))
    for expected, found in zip(*gradients, strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7
    words, losses = [], []
    for run in (one, two):
        words.append(load_safely(f"{run.out}/last.pt")["words"])
        losses.append([line["val_loss"] for line in history_of(run.out)])
    assert words[0] == words[1] and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_epoch_0(config):
    """The history begins with the model before training, which is best.pt unless one is better."""
    fit(build_run(replace(config, learning_rate=1e-9, epochs=1, best_by="cider")))
    best = load_safely(Path(config.out) / "best.pt")
    assert [line["epoch"] for line in best["history"]] == [0]
    old = len(load_safely(config.init_from)["words"])
    expected = load_safely(config.init_from)["model"]["decoder.embedding.weight"]
    assert torch.equal(best["model"]["decoder.embedding.weight"][:old], expected)


# ---------------------------------------------------------------------------- options


def test_required_options_alone(config, required):
    """The required options are enough: the architecture and the weights are the checkpoint's."""
    assert main([*required, "--epochs", "1"]) == 0
    before, after = load_safely(config.init_from), load_safely(Path(config.out) / "last.pt")
    for name in names_with(ModelConfig, "fits") + names_with(ModelConfig, "sees"):
        assert after["config"][name] == before["config"][name], name
    assert CONTINUE.items() <= after["train_config"].items()


def test_defaults(config, required):
    """Options override the defaults of the checkpoint and of the loss, on the command line and off.

    The checkpoint's architecture overrides the preset of a dataset.
    """
    found = parse_args([*required, "--dropout", "0.1", "--image-size", "96"])
    assert (found.dropout, found.image_size, found.inject) == (0.1, 96, "attend")
    critical = parse_args([*required, "--loss", "self-critical"])
    assert SELF_CRITICAL.items() <= vars(critical).items() and critical.num_heads == 2
    splits = {"train": ("a", "b"), "val": ("c", "d")}
    preset = config_for("synthetic", splits, "out", init_from=config.init_from, epochs=3)
    assert (preset.hidden_size, preset.epochs, preset.image_size) == (16, 3, 64)
    assert preset.learning_rate == CONTINUE["learning_rate"]
    assert parse_args([*required, "--init-from", "none"]).inject == "par"


@pytest.mark.parametrize(
    "option, text",
    [
        ("--inject par", "inject attend, not par"),
        ("--num-heads 4", "num_heads 2, not 4"),
        ("--hidden-size 24", "hidden_size 16, not 24"),
        ("--backbone resnet18", "backbone mobilenet_v3_small, not resnet18"),
    ],
)
def test_another_architecture(config, required, capsys, option, text):
    """An option that contradicts the checkpoint is an error of one sentence, before training."""
    assert main([*required, *option.split()]) == 1
    error = capsys.readouterr().err
    assert text in error and config.init_from in error and error.count("\n") == 1
    assert contents(config.out) == {}


def test_unused_weights(required, capsys):
    """A sentence says that the weights of the CNN are not those of --weights."""
    build_run(parse_args([*required, "--weights", "other.pth"]))
    assert "not other.pth" in capsys.readouterr().out
