"""A run: evaluation, checkpoints, resumption, early stopping, the baseline, the command line."""

import csv
import json
import math
import shutil
import signal
import threading
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command_line, seeing_weights, tiny_options

import distributed
import engine
import train
from checkpoint import only_run_in, save_atomically
from data_loader import CaptionData, get_loader
from engine import caption_nll, caption_split, evaluate
from model import CaptionModel, DecoderRNN, load_safely
from train import Options, Trainer, learning_rate, main, parse
from vocabulary import Vocabulary

FILES = [".lock", "best.pt", "history.csv", "history.jsonl", "last.pt", "vocabulary.json"]
TIMING = {"seconds", "captions_per_second"}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def history_of(folder):
    lines = [json.loads(line) for line in (Path(folder) / "history.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


@pytest.fixture(scope="module")
def finished(shared_dataset):
    """A run of three epochs, only to be looked at."""
    trainer = Trainer(tiny_options(shared_dataset, epochs=3, learning_rate=0.02))
    trainer.fit()
    return trainer


# ---------------------------------------------------------------------------- what a run leaves


def test_files_of_a_run(finished):
    """A run leaves its checkpoints, history and vocabulary, and nothing half-written."""
    assert names_in(finished.out) == FILES
    assert Vocabulary.load(finished.out / "vocabulary.json").words == finished.model.words


def test_history(finished):
    """The history has one line per epoch, in order, and training made progress."""
    history = history_of(finished.out)
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert [{k: v for k, v in line.items() if k not in TIMING} for line in finished.history] == (
        history
    )


def test_history_as_a_table(finished):
    """history.csv holds the same numbers as history.jsonl, under the same names."""
    with open(finished.out / "history.csv") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == finished.history


def test_best_checkpoint(finished):
    """best.pt holds the weights of the epoch with the lowest validation loss.

    The oracle goes through the captions one by one, by `CaptionModel.forward` and log_softmax.
    """
    model = CaptionModel.from_checkpoint(finished.out / "best.pt")
    total, count = 0.0, 0
    for path, captions in zip(finished.val_data.paths, finished.val_data.captions, strict=True):
        for caption in captions:
            ids = torch.tensor([finished.vocab.encode(caption)])
            log_p = model(model.transform(path)[None], ids).log_softmax(-1)
            total -= log_p[0].gather(1, ids[0, 1:, None]).sum().item()
            count += ids.shape[1] - 1
    best = min(line["val_loss"] for line in finished.history)
    # The cache holds features in half precision.
    assert total / count == pytest.approx(best, rel=1e-3)


def test_evaluate(finished, shared_dataset):
    """The validation loss is the same for any batch size, a single caption at a time included."""
    data = CaptionData(shared_dataset / "images", shared_dataset / "captions.json")
    features = finished.val_loader.dataset.features
    results = [
        evaluate(
            finished.model,
            get_loader(data, finished.vocab, features=features, mode="val", batch_size=size),
        )
        for size in (1, 5, 100)
    ]
    assert len({tokens for _, tokens in results}) == 1
    assert results[0][1] == sum(
        len(finished.vocab.encode(c)) - 1 for captions in data.captions for c in captions
    )
    for nll, _ in results:
        assert nll == pytest.approx(results[0][0], rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_keeps_the_mode(finished, training):
    """Evaluation is without dropout, and leaves the model in the mode it was in."""
    finished.model.train(training)
    assert evaluate(finished.model, finished.val_loader) == evaluate(
        finished.model, finished.val_loader
    )
    assert finished.model.training == training


def test_captioning_changes_nothing(dataset):
    """Captioning a split with a model in training neither moves BatchNorm nor ends training."""
    trainer = Trainer(tiny_options(dataset, fine_tune=True))
    model = trainer.model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loader = get_loader(trainer.val_data, transform=model.transform, mode="test")
    assert len(caption_split(model, loader)) == len(trainer.val_data) and model.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_captions_of_a_split(finished):
    """A split's captions are, image by image, those of `CaptionModel.caption`."""
    model = CaptionModel.from_checkpoint(finished.out / "best.pt")
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight)  # after three epochs all captions are still the same
    loader = get_loader(finished.val_data, transform=model.transform, mode="test", batch_size=5)
    captions = caption_split(model, loader, beam_size=2)
    assert captions == model.caption(finished.val_data.paths, beam_size=2)
    assert len(set(captions)) >= 3  # what each image says depends on it


def test_report(finished):
    """The report scores best.pt on the validation images, and is kept as metrics.json."""
    metrics = finished.report()
    kept = json.loads((finished.out / "metrics.json").read_text())
    (finished.out / "metrics.json").unlink()
    assert kept == metrics
    best = min(finished.history, key=lambda line: line["val_loss"])
    assert metrics["perplexity"] == pytest.approx(best["val_perplexity"])
    assert metrics["images"] == 12 and metrics["unk_rate"] == 0
    for name in ("BLEU-4", "ROUGE-L", "CIDEr-D", "distinct", "seen in training"):
        assert metrics[name] >= 0


def test_fine_tuning(dataset):
    """With `fine_tune` the CNN is trained too, from the images themselves: no features are kept."""
    trainer = Trainer(tiny_options(dataset, fine_tune=True, epochs=1))
    before = {k: w.clone() for k, w in trainer.model.encoder.backbone.named_parameters()}
    trainer.fit()
    after = dict(trainer.model.encoder.backbone.named_parameters())
    assert not torch.equal(after["features.0.0.weight"], before["features.0.0.weight"])
    assert not list((dataset / "cache").glob("features*"))


def test_the_seed_decides(finished, tmp_path):
    """Equal seeds give equal runs, whatever was drawn before them; other seeds give others."""
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        options = replace(finished.options, out=str(tmp_path / name), seed=seed, epochs=1)
        losses.append(Trainer(options).fit()[0]["val_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_the_cache_changes_nothing(finished, tmp_path):
    """A run is the same whether its features are computed or found in the cache."""
    losses = []
    for name in ("computed", "found"):
        options = replace(
            finished.options, out=str(tmp_path / name), cache=str(tmp_path / "cache"), epochs=1
        )
        losses.append(Trainer(options).fit()[0]["val_loss"])
    assert losses[0] == losses[1]


def test_deterministic(finished, tmp_path):
    """`deterministic` forbids PyTorch's shortcuts, and on a CPU changes no bit of the result."""
    options = replace(finished.options, out=str(tmp_path / "out"), deterministic=True)
    try:
        Trainer(options).fit()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert history_of(options.out) == history_of(finished.out)


# ---------------------------------------------------------------------------- going on


def ctrl_c():
    raise KeyboardInterrupt


def interrupt_at(monkeypatch, epoch, interrupt=ctrl_c):
    """Interrupt the run in the middle of a step, `epoch` epochs after its beginning."""

    def learning_rate_until_then(options, now):
        if now >= epoch:
            interrupt()
        return learning_rate(options, now)

    monkeypatch.setattr(train, "learning_rate", learning_rate_until_then)


def assert_equal(one, other, name="checkpoint"):
    """Two checkpoints are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one.keys() - TIMING:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), name
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{name}[{place}]")
    else:
        assert one == other, name


def assert_same_end(out, straight):
    """Two runs ended with the same history and checkpoints."""
    assert history_of(out) == history_of(straight)
    for name in ("last.pt", "best.pt"):
        one, other = load_safely(Path(out) / name), load_safely(Path(straight) / name)
        del one["options"], other["options"]  # they differ in `out` and `resume`
        assert_equal(one, other)


@pytest.mark.parametrize("save_every", [0, 1, 3])
@pytest.mark.parametrize("epoch", [1.4, 2.01])
def test_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch, epoch, save_every):
    """A run stopped by Ctrl-C and gone on with ends, bit for bit, as one that never stopped."""
    options = replace(finished.options, out=str(tmp_path / "out"), save_every=save_every)
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch)
        assert main(command_line(options)) == 130
    assert len(history_of(options.out)) == int(epoch)
    assert main([*command_line(options), "--resume"]) == 0
    assert_same_end(options.out, finished.out)


def test_resumed_with_accumulated_gradients(shared_dataset, tmp_path, monkeypatch):
    """So does one whose steps of the optimizer take several batches, the last of them fewer."""
    options = tiny_options(shared_dataset, accumulate=3, save_every=1, learning_rate=0.02)
    straight, out = str(tmp_path / "straight"), str(tmp_path / "out")
    assert main(command_line(replace(options, out=straight))) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1.99)
        assert main(command_line(replace(options, out=out))) == 130
    assert load_safely(f"{out}/last.pt")["step"] == 3
    assert main([*command_line(replace(options, out=out)), "--resume"]) == 0
    assert_same_end(out, straight)


def test_nothing_good_is_lost_to_nan(dataset, monkeypatch):
    """A run that goes wrong within an epoch ends, and last.pt is still that of good steps."""
    trainer = Trainer(tiny_options(dataset, save_every=1))
    interrupt_at(monkeypatch, 1.4, lambda: trainer.weights[0].grad.fill_(math.nan))
    with pytest.raises(ValueError, match="no longer a number"):
        trainer.fit()
    checkpoint = load_safely(trainer.out / "last.pt")
    assert len(checkpoint["history"]) == 1 and checkpoint["step"] > 0
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())


def test_terminated(finished, tmp_path, monkeypatch):
    """SIGTERM in the middle of an epoch is answered by saving; the resumption loses no step."""
    options = replace(finished.options, out=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1.4, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as caught:
            main(command_line(options))
    assert caught.value.code == 128 + signal.SIGTERM
    assert load_safely(Path(options.out) / "last.pt")["step"] > 0
    assert main([*command_line(options), "--resume"]) == 0
    assert_same_end(options.out, finished.out)


def test_one_run_at_a_time(finished, tmp_path, capsys):
    """A second run into the same folder is refused while the first is under way, and not after."""
    options = replace(finished.options, out=str(tmp_path / "out"), epochs=1)
    with only_run_in(tmp_path / "out"):
        assert main(command_line(options)) == 1
        assert "another run is writing" in capsys.readouterr().err
    assert main(command_line(options)) == 0


def test_ctrl_c_before_the_first_epoch_ends(shared_dataset, tmp_path, monkeypatch, capsys):
    """Stopped in its first epoch, a run has nothing to go on from, and can be started again."""
    options = tiny_options(shared_dataset, out=str(tmp_path / "out"), epochs=1)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0.4)
        assert main(command_line(options)) == 130
    assert not (tmp_path / "out" / "last.pt").exists()
    assert main(command_line(options)) == 0


def test_resume_before_there_is_anything(finished, tmp_path, capsys):
    """`--resume` without a last.pt says so and begins: one command serves for every start."""
    options = replace(finished.options, out=str(tmp_path / "out"), resume=True)
    for epochs in (1, 3):
        assert main(command_line(replace(options, epochs=epochs))) == 0
        assert (str(tmp_path / "out" / "last.pt") in capsys.readouterr().out) == (epochs == 1)
    assert len(history_of(tmp_path / "out")) == 3


def test_resume_with_more_epochs_says_so(finished, tmp_path, capsys):
    """More epochs than planned are allowed; that the learning rate is another then is said."""
    options = replace(finished.options, out=str(tmp_path / "out"), resume=True)
    for epochs, told in ((1, False), (1, False), (2, True)):
        assert main(command_line(replace(options, epochs=epochs))) == 0
        assert ("learning rate now follows 2 epochs, not 1" in capsys.readouterr().out) == told


def test_an_earlier_run_is_not_lost(finished, capsys):
    """A folder with an earlier run is refused, unless told to resume or to overwrite."""
    before = {path.name: path.read_bytes() for path in finished.out.iterdir()}
    assert main(command_line(finished.options)) == 1
    error = capsys.readouterr().err
    assert "earlier run" in error and "--resume" in error and "--overwrite" in error
    assert {path.name: path.read_bytes() for path in finished.out.iterdir()} == before


def test_a_run_that_was_faster(shared_dataset, tmp_path):
    """Of two runs begun in the same folder, the later one to train does not undo the other."""
    options = tiny_options(shared_dataset, out=str(tmp_path / "out"), epochs=1)
    one, other = Trainer(options), Trainer(options)
    one.fit()
    before = (tmp_path / "out" / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="another run"):
        other.fit()
    assert (tmp_path / "out" / "last.pt").read_bytes() == before


def test_best_epoch_without_last(finished, tmp_path, capsys):
    """The best epoch of a run whose last.pt is lost is not deleted by a resumption."""
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    (out / "last.pt").unlink()
    assert main([*command_line(replace(finished.options, out=str(out))), "--resume"]) == 1
    assert "no last.pt" in capsys.readouterr().err
    assert (out / "best.pt").read_bytes() == (finished.out / "best.pt").read_bytes()


def test_overwrite(finished, tmp_path):
    """`overwrite` starts anew: the same seed gives the same first epoch once more."""
    options = replace(finished.options, out=str(tmp_path / "out"), epochs=1)
    for overwrite in (False, True):
        Trainer(replace(options, overwrite=overwrite)).fit()
        assert [line["epoch"] for line in history_of(options.out)] == [1]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_size": 24}, "hidden_size was 16, is 24"),
        ({"inject": "init"}, "inject was par, is init"),
        ({"learning_rate": 0.5}, "learning_rate was 0.02, is 0.5"),
        ({"blind": True}, "blind was False, is True"),
        ({"threshold": 2}, "threshold was 1, is 2"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_resume_refuses_another_recipe(finished, capsys, change, said):
    """A run goes on only with the model and recipe it began with; the error shows what differs."""
    last = (finished.out / "last.pt").read_bytes()
    assert main([*command_line(replace(finished.options, **change)), "--resume"]) == 1
    assert said in capsys.readouterr().err
    assert (finished.out / "last.pt").read_bytes() == last


def test_resume_refuses_other_captions(finished, dataset, capsys):
    """A run does not go on with other captions, even if their words are the same."""
    path = dataset / "captions.json"
    path.write_text(path.read_text().replace('"a cat"', '"cat a"'))
    options = replace(finished.options, train_captions=str(path))
    assert main([*command_line(options), "--resume"]) == 1
    assert "are others" in capsys.readouterr().err


def test_resume_refuses_another_cnn(shared_dataset, tmp_path, capsys):
    """A run does not go on with the features of other weights, even from a file of that name."""
    weights = tmp_path / "weights.pt"
    shutil.copy(seeing_weights(), weights)
    options = tiny_options(shared_dataset, out=str(tmp_path / "out"), weights=str(weights))
    Trainer(replace(options, epochs=1)).fit()
    state = {name: value * 1.5 for name, value in torch.load(weights).items()}
    torch.save(state, weights)
    assert main([*command_line(options), "--resume"]) == 1
    assert "the CNN's weights are others" in capsys.readouterr().err


def test_resume_a_finished_run(finished):
    """Going on with a run that has had all its epochs trains nothing and changes nothing."""
    last = (finished.out / "last.pt").read_bytes()
    assert len(Trainer(replace(finished.options, resume=True)).fit()) == 3
    assert (finished.out / "last.pt").read_bytes() == last


def test_data_may_move(finished, dataset, tmp_path):
    """A run goes on from the same data in another folder."""
    moved = tiny_options(dataset, out=str(finished.out), cache=str(tmp_path))
    paths = {
        name: getattr(moved, name)
        for name in ("train_images", "train_captions", "val_images", "val_captions", "cache")
    }
    trainer = Trainer(replace(finished.options, resume=True, **paths))
    assert len(trainer.history) == 3


# ---------------------------------------------------------------------------- when to stop


def scripted(monkeypatch, losses):
    """Validation losses per word, one for every epoch to come."""
    left = iter(losses)
    monkeypatch.setattr(train, "evaluate", lambda *args: (next(left) * 10, 10))


def test_early_stopping(dataset, monkeypatch):
    """After `patience` epochs without a better validation loss the run stops and keeps its best."""
    scripted(monkeypatch, [3.0, 2.0, 2.0, 2.4, 1.0])  # of equal ones the first is the best
    history = Trainer(tiny_options(dataset, epochs=9, patience=2)).fit()
    assert [line["val_loss"] for line in history] == [3.0, 2.0, 2.0, 2.4]
    best = load_safely(dataset / "out" / "best.pt")
    assert [line["val_loss"] for line in best["history"]] == [3.0, 2.0]


def test_patience_starts_again(dataset, monkeypatch):
    """A better validation loss in time gives the run its whole patience again."""
    losses = [3.0, 2.0, 2.5, 1.9, 2.5, 1.8]
    scripted(monkeypatch, losses)
    history = Trainer(tiny_options(dataset, epochs=6, patience=2)).fit()
    assert [line["val_loss"] for line in history] == losses


def test_learning_rate():
    """The rate rises in a line over a tenth of the run, and falls along a cosine to zero."""
    options = Options("", "", "", "", "", epochs=20, learning_rate=1.0)
    assert [learning_rate(options, epoch) for epoch in (0, 1, 2, 11, 20)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("lstm", [False, True])
def test_bfloat16_where_it_is_fast(monkeypatch, has, lstm):
    """A CPU that multiplies bfloat16, and runs an LSTM in it, gets autocast; another does not."""
    capabilities = {"amx_bf16": has}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(distributed, "lstm_runs_in_bfloat16", lambda: lstm)
    with distributed.fast_precision(torch.device("cpu")):
        product = torch.rand(4, 4) @ torch.rand(4, 4)
    assert product.dtype == (torch.bfloat16 if has and lstm else torch.float32)


def test_a_processor_that_promises_bfloat16(monkeypatch):
    """Whatever a CPU says of itself, a step of training runs, and trying it draws no number."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    distributed.lstm_runs_in_bfloat16.cache_clear()
    decoder, state = DecoderRNN(8, 8, vocab_size=9), torch.get_rng_state()
    with distributed.fast_precision(torch.device("cpu")):
        decoder(torch.rand(2, 8), torch.tensor([[1, 4, 2], [1, 5, 2]])).sum().backward()
    assert torch.isfinite(decoder.lstm.weight_hh_l0.grad).all()
    torch.set_rng_state(state)
    distributed.lstm_runs_in_bfloat16.cache_clear()
    distributed.lstm_runs_in_bfloat16()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("accumulate", [1, 2, 100])
def test_gradient_of_a_step(dataset, monkeypatch, accumulate):
    """Each step's gradient is that of the mean over all targets of its batches."""
    trainer = Trainer(tiny_options(dataset, accumulate=accumulate, dropout=0.0, clip=1e9))
    model, weight = trainer.model, trainer.model.decoder.embedding.weight
    trainer.train_loader.batch_sampler.set_epoch(0)
    batches = list(trainer.train_loader)
    expected = []
    for start in range(0, len(batches), accumulate):
        nll = targets = 0
        for images, captions, _ in batches[start : start + accumulate]:
            logits = model(images, captions).flatten(0, 1)
            nll = nll + F.nll_loss(
                logits.log_softmax(1), captions[:, 1:].flatten(), ignore_index=0, reduction="sum"
            )
            targets += int((captions[:, 1:] != 0).sum())
        expected += torch.autograd.grad(nll / targets, weight)
    found = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda: found.append(weight.grad.clone()))
    trainer.train_epoch(threading.Event())
    assert len(batches) > 2 and len(found) == -(-len(batches) // accumulate)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_what_a_step_does(dataset):
    """A gradient clipped to nothing moves no weight: what is left is the decay, step by step."""
    options = tiny_options(dataset, epochs=2, clip=1e-20, weight_decay=0.5, learning_rate=0.1)
    trainer = Trainer(options)
    weight, steps = trainer.model.decoder.linear.weight, len(trainer.train_loader)
    before = weight.detach().clone()
    trainer.fit()
    left = math.prod(
        1 - 0.5 * learning_rate(options, (step + 1) / steps) for step in range(2 * steps)
    )
    assert left < 0.9
    torch.testing.assert_close(weight.detach(), before * left)


# ---------------------------------------------------------------------------- the baseline


@pytest.fixture(scope="module")
def blind(shared_dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("blind")
    trainer = Trainer(tiny_options(shared_dataset, out=str(out), blind=True, learning_rate=0.02))
    trainer.fit()
    return trainer


def test_blind_loss_ignores_the_image(blind):
    """The loss of a blind model is the same whatever the images are."""
    images, captions, _ = next(iter(blind.val_loader))
    one, _ = caption_nll(blind.model.eval(), images, captions)
    other, _ = caption_nll(blind.model, torch.randn_like(images), captions)
    assert one.item() == other.item()


def test_blind_captions_ignore_the_image(blind, monkeypatch):
    """A blind model is scored as it was trained: it says the same of images however different."""
    spoken, score = [], engine.caption_scores

    def listen(candidates, *rest):
        spoken.extend(candidates)
        return score(candidates, *rest)

    monkeypatch.setattr(engine, "caption_scores", listen)
    different = np.random.default_rng(0).normal(size=(12, blind.model.encoder.feature_size))
    monkeypatch.setattr(blind.val_loader.dataset, "features", different)
    for weight in blind.model.decoder.parameters():
        torch.nn.init.normal_(weight)
    save_atomically({"config": blind.model.config, "model": blind.model.state_dict()},
                    blind.out / "best.pt")  # fmt: skip
    blind.report()
    assert len(spoken) == 12 and len(set(spoken)) == 1


# ---------------------------------------------------------------------------- the command line

REQUIRED = {f.name: f"{f.name}.x" for f in fields(Options) if f.default is MISSING}


def test_command_line_has_the_same_defaults():
    """The command with nothing but the required flags gives the options with their defaults."""
    words = [w for name, v in REQUIRED.items() for w in ("--" + name.replace("_", "-"), v)]
    assert parse(words) == Options(**REQUIRED)


@pytest.mark.parametrize("field", fields(Options), ids=lambda field: field.name)
def test_command_line_has_every_option(field):
    """Every option can be set by its flag."""
    options = Options(**REQUIRED)
    value = getattr(options, field.name)
    if isinstance(value, bool):
        other = not value
    elif isinstance(value, str):
        other = value + "x"
    else:
        other = value + (0.5 if isinstance(value, float) else 1)
    changed = replace(options, **{field.name: other})
    assert parse(command_line(changed)) == changed != options


def test_command_line_without_weights():
    """`--weights none` is no weights."""
    assert parse(command_line(Options(**REQUIRED, weights=None))).weights is None


def test_every_option_is_explained():
    """Every option says what it is."""
    assert all(f.metadata["help"] for f in fields(Options))


def test_main(dataset, capsys):
    """The command trains, reports, leaves its five files, and exits with 0."""
    options = tiny_options(dataset, epochs=1)
    assert main(command_line(options)) == 0
    assert names_in(dataset / "out") == sorted([*FILES, "metrics.json"])
    printed = capsys.readouterr()
    assert "12 images" in printed.out
    assert "CIDEr-D" in printed.out and printed.err == ""
