"""Interruption, resumption, and what protects the files of a run."""

import math
import multiprocessing
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import calibrated_weights, command_line, supported, tiny_config
from training_runs import assert_same_result, contents, ctrl_c, history_of, interrupt_at

from captioning.base.checkpoints import load_safely
from captioning.learning.loop import fit
from captioning.learning.train_config import SELF_CRITICAL
from model import CaptionModel
from train import build_run, main


@pytest.fixture(scope="module")
def run_once(shared_dataset):
    """A complete run of three epochs with some options, the same one for the same options;
    init_from: the options of the run from which it starts."""
    configs = {}

    def run(**options):
        name = str(sorted(options.items()))
        if name not in configs:
            options = {"epochs": 3, "learning_rate": 0.02} | options
            if "init_from" in options:
                options["init_from"] = f"{run(**options['init_from']).out}/best.pt"
            out = f"{shared_dataset}/run-{len(configs)}"
            configs[name] = tiny_config(shared_dataset, out=out, **options)
            assert main(command_line(configs[name])) == 0
        return configs[name]

    return run


@pytest.fixture(scope="module")
def finished(run_once):
    """The config of a run that is complete, not to be modified."""
    return run_once()


# ---------------------------------------------------------------------------- interruptions

FINE_TUNED = {"fine_tune": "last", "flip": True, "backbone_learning_rate": 1e-3, "epochs": 2}
ATTEND = {"inject": "attend", "dropout": 0.0, "epochs": 2}
NEW_WORDS = ATTEND | {"init_from": ATTEND | {"min_word_freq": 3}, "best_by": "cider"}
CRITICAL = SELF_CRITICAL | ATTEND | {"init_from": ATTEND, "loss": "self-critical"}
CRITICAL["learning_rate"] = 2e-3


INTERRUPTIONS = {  # options, epoch, save_every, step of the last save
    "nothing saved in the epoch": ({}, 1.4, 0, 0),
    "after a save": ({}, 1.9, 3, 3),
    "at the start of an epoch": ({}, 2.01, 1, 0),
    "bfloat16": ({"precision": "bfloat16"}, 1.9, 3, 3),
    "the last step of an epoch has one batch": ({"grad_accum_steps": 3}, 1.99, 1, 3),
    "random views": ({"flip": True, "crops": 1}, 1.6, 2, 2),
    "random crops": (FINE_TUNED, 1.9, 2, 2),
    "new words, at the start": (NEW_WORDS, 0.0, 0, 0),
    "new words": (NEW_WORDS, 0.7, 1, 2),
    "self-critical, at the start": (CRITICAL, 0.0, 0, 0),
    "self-critical": (CRITICAL, 1.9, 2, 2),
}


@pytest.mark.parametrize(
    "options, epoch, save_every, step", INTERRUPTIONS.values(), ids=INTERRUPTIONS
)
def test_resumed_equals_uninterrupted(
    run_once, tmp_path, monkeypatch, options, epoch, save_every, step
):
    """A run that is stopped by Ctrl-C and resumed ends, bit for bit, as one that never stopped."""
    supported(options.get("precision", "float32"))
    whole = run_once(**options)
    config = replace(whole, out=str(tmp_path), save_every=save_every)
    with monkeypatch.context() as patch:
        interrupt_at(patch, config, epoch)
        assert main(command_line(config)) == 130
    assert len(history_of(tmp_path)) == int(epoch) + ("init_from" in options)  # with epoch 0
    assert load_safely(tmp_path / "last.pt")["step"] == step
    assert main([*command_line(config), "--resume"]) == 0
    assert_same_result(tmp_path, whole.out)


def test_sigterm(finished, tmp_path, monkeypatch):
    """SIGTERM within an epoch saves after the current batch, and resuming loses no step."""
    config = replace(finished, out=str(tmp_path))
    with monkeypatch.context() as patch:
        interrupt_at(patch, config, 1.4, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as caught:
            main(command_line(config))
    assert caught.value.code == 128 + signal.SIGTERM
    assert load_safely(tmp_path / "last.pt")["step"] > 0
    assert main([*command_line(config), "--resume"]) == 0
    assert_same_result(tmp_path, finished.out)


@pytest.mark.parametrize("save_every", [0, 1])
def test_nan_is_never_saved(finished, tmp_path, monkeypatch, save_every):
    """A run whose gradient becomes NaN ends with an error, and its checkpoints stay finite."""
    run = build_run(replace(finished, out=str(tmp_path), save_every=save_every))
    weight = run.model.decoder.linear.weight
    interrupt_at(monkeypatch, run.config, 1.4, lambda: weight.grad.fill_(math.nan))
    with pytest.raises(ValueError, match="not finite"):
        fit(run)
    for name in ("last.pt", "best.pt"):
        checkpoint = load_safely(tmp_path / name)
        assert len(checkpoint["history"]) == 1
        assert all(weight.isfinite().all() for weight in checkpoint["model"].values())
    assert (load_safely(tmp_path / "last.pt")["step"] > 0) == (save_every > 0)


# ---------------------------------------------------------------------------- resuming


def test_resume_without_a_checkpoint(finished, tmp_path, capsys):
    """`--resume` without a last.pt says so and starts the run; with one, it says what changes."""
    config = replace(finished, out=str(tmp_path), resume=True)
    for number, epochs in enumerate((1, 1, 2)):
        assert main(command_line(replace(config, epochs=epochs))) == 0
        printed = capsys.readouterr().out
        assert ("no last.pt in" in printed and str(tmp_path) in printed) == (number == 0)
        assert ("schedule now has 2 epochs instead of 1" in printed) == (number == 2)
    assert [line["epoch"] for line in history_of(tmp_path)] == [1, 2]


def test_resume_a_finished_run(finished, dataset, tmp_path):
    """Resuming a run that has all its epochs, also with its data in other folders, trains nothing
    and leaves last.pt as it is."""
    before = (Path(finished.out) / "last.pt").read_bytes()
    moved = tiny_config(dataset, cache_dir=str(tmp_path))
    names = ("train_images", "train_captions", "val_images", "val_captions", "cache_dir")
    paths = {name: getattr(moved, name) for name in names}
    assert len(fit(build_run(replace(finished, resume=True, **paths)))) == 3
    assert (Path(finished.out) / "last.pt").read_bytes() == before


@pytest.fixture
def refused(capsys):
    """Resume with a config, which has to fail and to change no file; the error message."""

    def resume(config):
        before = contents(config.out)
        assert main([*command_line(config), "--resume"]) == 1
        assert contents(config.out) == before
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1
        return error

    return resume


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("hidden_size", 24, "hidden_size was 16, is 24"),
        ("inject", "init", "inject was par, is init"),
        ("backbone", "shufflenet_v2_x0_5", "backbone was mobilenet_v3_small, is shufflenet"),
        ("learning_rate", 0.5, "learning_rate was 0.02, is 0.5"),
        ("no_image", True, "no_image was False, is True"),
        ("min_word_freq", 2, "min_word_freq was 1, is 2"),
    ],
)
def test_resume_refuses_another_config(finished, refused, name, value, message):
    """Resuming with another model or other training options names what differs."""
    weights = {"weights": None} if name == "backbone" else {}
    assert message in refused(replace(finished, **{name: value}, **weights))


def test_resume_refuses_other_captions(finished, dataset, refused):
    """Resuming with other captions is refused, even if they consist of the same words."""
    path = dataset / "captions.json"
    path.write_text(path.read_text().replace('"a cat"', '"cat a"'))
    assert "captions or their images" in refused(replace(finished, train_captions=str(path)))


@pytest.mark.parametrize("fine_tune", ["none", "last"])
def test_resume_refuses_another_cnn(shared_dataset, tmp_path, refused, fine_tune):
    """Resuming with other weights of the frozen CNN is refused, even from a file of that name."""
    weights = tmp_path / "weights.pt"
    shutil.copy(calibrated_weights(), weights)
    options = {"weights": str(weights), "fine_tune": fine_tune, "epochs": 1}
    config = tiny_config(shared_dataset, out=str(tmp_path / "out"), **options)
    fit(build_run(config))
    torch.save({name: value * 1.5 for name, value in torch.load(weights).items()}, weights)
    assert "weights of the CNN have changed" in refused(config)


def test_resume_refuses_another_vocabulary(finished, tmp_path, refused):
    """Resuming with the words of another order, of an --init-from checkpoint, is refused."""
    config = replace(finished, out=str(tmp_path / "out"))
    shutil.copytree(finished.out, config.out)
    checkpoint = load_safely(tmp_path / "out" / "best.pt")
    checkpoint["words"][4:] = reversed(checkpoint["words"][4:])
    torch.save(checkpoint, tmp_path / "other.pt")
    assert "vocabulary" in refused(replace(config, init_from=str(tmp_path / "other.pt")))


@pytest.mark.parametrize("missing", ["format", "threshold", "train_config", "optimizer"])
def test_resume_refuses_another_format(finished, tmp_path, refused, missing):
    """A last.pt of an earlier version, or without a training state, is refused and named."""
    content = load_safely(Path(finished.out) / "last.pt")
    del content[missing]
    torch.save(content, tmp_path / "last.pt")
    assert str(tmp_path / "last.pt") in refused(replace(finished, out=str(tmp_path)))


# ---------------------------------------------------------------------------- earlier runs


def test_an_earlier_run_is_kept(finished, capsys):
    """A folder with an earlier run is refused unless `--resume` or `--overwrite` is given."""
    before = contents(finished.out)
    assert main(command_line(finished)) == 1
    error = capsys.readouterr().err
    assert "earlier run" in error and "--resume" in error and "--overwrite" in error
    assert contents(finished.out) == before


def test_best_epoch_without_last(finished, tmp_path, refused):
    """The best epoch of a run whose last.pt is lost is not deleted by a resumption."""
    shutil.copytree(finished.out, tmp_path / "out")
    (tmp_path / "out" / "last.pt").unlink()
    assert "no last.pt" in refused(replace(finished, out=str(tmp_path / "out")))


def test_overwrite(finished, tmp_path):
    """`overwrite` starts the run again: the same seed gives the same first epoch."""
    config, histories = replace(finished, out=str(tmp_path), epochs=1), []
    for overwrite in (False, True):
        fit(build_run(replace(config, overwrite=overwrite)))
        histories.append(history_of(tmp_path))
    assert histories[0] == histories[1] and len(histories[0]) == 1


def test_one_run_at_a_time(shared_dataset, tmp_path, capsys):
    """From build_run to the end of fit, no other process can use the folder; this one can build the
    run again, as a repeated cell of a notebook does."""
    config = tiny_config(shared_dataset, out=str(tmp_path), epochs=1, overwrite=True)
    code = "from captioning.learning.run_files import lock_run_dir; lock_run_dir(out).close()"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other_process:

        def error_of_another():
            error = other_process.submit(exec, code, {"out": tmp_path}).exception()
            return error and str(error).split(";")[0]

        build_run(config)
        run, errors = build_run(config), []
        errors.append(error_of_another())
        fit(run, after_epoch=lambda run: errors.append(error_of_another()))
        assert errors == [f"another run is writing to {tmp_path}"] * 2
        assert error_of_another() is None
    assert main(command_line(config)) == 0


@pytest.mark.parametrize("stage", ["build_run", "fit"])
def test_a_failed_run_releases_its_folder(shared_dataset, tmp_path, monkeypatch, stage):
    """After an error the folder can be used again: nothing but the lock file was written."""
    config = tiny_config(shared_dataset, out=str(tmp_path), epochs=1)
    with monkeypatch.context() as patch:
        name = (
            "train.build_loss"
            if stage == "build_run"
            else "captioning.learning.loop.optimizer_step"
        )
        patch.setattr(name, lambda *_: ctrl_c())
        with pytest.raises(KeyboardInterrupt):
            fit(build_run(config))
    assert (contents(tmp_path) == {}) == (stage == "build_run")
    fit(build_run(config))


def test_bugs_are_not_renamed(finished, tmp_path, monkeypatch):
    """An error in the constructor of a model is not reported as a bad checkpoint or bad input."""

    def broken(*args, **kwargs):
        raise TypeError("a bug in the decoder")

    monkeypatch.setattr("model.DecoderRNN", broken)
    for call in (
        lambda: CaptionModel.from_checkpoint(Path(finished.out) / "best.pt"),
        lambda: build_run(replace(finished, out=str(tmp_path))),
        lambda: main(command_line(replace(finished, out=str(tmp_path)))),
    ):
        with pytest.raises(TypeError, match="^a bug in the decoder$"):
            call()
