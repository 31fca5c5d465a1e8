"""Interruption, resumption, and what protects the files of a run."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import calibrated_weights, command_line, supported, tiny_config

import train
from captioning.learning.checkpoint import load_safely, lock_run_dir
from captioning.learning.run import build_run
from model import CaptionModel
from train import fit, main, schedule

TIMING = {"seconds", "captions_per_second", "date"}


def trained(folder, name, **changes):
    """A complete run of three epochs."""
    run = build_run(
        tiny_config(folder, out=str(folder / name), epochs=3, learning_rate=0.02, **changes)
    )
    fit(run)
    return run


@pytest.fixture(scope="module")
def finished(shared_dataset):
    """A run in float32, not to be modified."""
    return trained(shared_dataset, "finished")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def uninterrupted(shared_dataset, request):
    """A run in each precision that this CPU supports."""
    return trained(shared_dataset, request.param, precision=supported(request.param))


def history_of(folder):
    lines = [json.loads(line) for line in (Path(folder) / "history.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def ctrl_c():
    raise KeyboardInterrupt


def interrupt_at(monkeypatch, config, epoch, interrupt=ctrl_c):
    """Call `interrupt` in an optimizer step after `epoch` epochs."""

    def interrupting(progress, shape):
        if progress * config.epochs >= epoch:
            interrupt()
        return schedule(progress, shape)

    monkeypatch.setattr(train, "schedule", interrupting)


def assert_equal(one, other, name="checkpoint"):
    """Two checkpoints are equal bit for bit, except for durations and the date."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one.keys() - TIMING:
            assert_equal(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{name}[{index}]")
    else:
        assert one == other, name


def assert_same_result(out, uninterrupted):
    """Two runs ended with the same history and checkpoints."""
    assert history_of(out) == history_of(uninterrupted)
    for name in ("last.pt", "best.pt"):
        one, other = load_safely(Path(out) / name), load_safely(Path(uninterrupted) / name)
        del one["train_config"], other["train_config"]  # which differ in `out` and `resume`
        assert_equal(one, other)


# ---------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("epoch, save_every", [(1.4, 0), (1.7, 3), (2.01, 1)])
def test_resumed_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch, epoch, save_every):
    """A run that is stopped by Ctrl-C and resumed ends, bit for bit, as one that never stopped."""
    config = replace(uninterrupted.config, out=str(tmp_path), save_every=save_every)
    with monkeypatch.context() as patch:
        interrupt_at(patch, config, epoch)
        assert main(command_line(config)) == 130
    assert len(history_of(tmp_path)) == int(epoch)
    assert main([*command_line(config), "--resume"]) == 0
    assert_same_result(tmp_path, uninterrupted.config.out)


def test_resumed_fine_tuning(shared_dataset, tmp_path, monkeypatch):
    """A resumed run is equal too if the last stage of the CNN is trained, on views of crops."""
    options = {"fine_tune": "last", "flip": True, "crops": 1, "save_every": 2}
    config = tiny_config(shared_dataset, out=str(tmp_path / "whole"), **options)
    fit(build_run(config))
    config = replace(config, out=str(tmp_path / "resumed"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, config, 1.6)
        assert main(command_line(config)) == 130
    assert main([*command_line(config), "--resume"]) == 0
    assert_same_result(config.out, tmp_path / "whole")


def test_resumed_with_accumulated_gradients(shared_dataset, tmp_path, monkeypatch):
    """A resumed run is equal too if an optimizer step takes several batches, the last one fewer."""
    config = tiny_config(shared_dataset, grad_accum_steps=3, save_every=1, learning_rate=0.02)
    config, other = (replace(config, out=str(tmp_path / name)) for name in ("out", "other"))
    assert main(command_line(other)) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, config, 1.99)
        assert main(command_line(config)) == 130
    assert load_safely(tmp_path / "out" / "last.pt")["step"] == 3
    assert main([*command_line(config), "--resume"]) == 0
    assert_same_result(config.out, other.out)


def test_sigterm(uninterrupted, tmp_path, monkeypatch):
    """SIGTERM within an epoch saves after the current batch, and resuming loses no step."""
    config = replace(uninterrupted.config, out=str(tmp_path))
    with monkeypatch.context() as patch:
        interrupt_at(patch, config, 1.4, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as caught:
            main(command_line(config))
    assert caught.value.code == 128 + signal.SIGTERM
    assert load_safely(tmp_path / "last.pt")["step"] > 0
    assert main([*command_line(config), "--resume"]) == 0
    assert_same_result(tmp_path, uninterrupted.config.out)


@pytest.mark.parametrize("save_every", [0, 1])
def test_nan_is_never_saved(uninterrupted, tmp_path, monkeypatch, save_every):
    """A run whose gradient becomes NaN ends with an error, and its checkpoints stay finite."""
    run = build_run(replace(uninterrupted.config, out=str(tmp_path), save_every=save_every))
    weight = run.model.decoder.linear.weight
    interrupt_at(monkeypatch, run.config, 1.4, lambda: weight.grad.fill_(math.nan))
    with pytest.raises(ValueError, match="not finite"):
        fit(run)
    for name in ("last.pt", "best.pt"):
        checkpoint = load_safely(tmp_path / name)
        assert len(checkpoint["history"]) == 1
        assert all(weight.isfinite().all() for weight in checkpoint["model"].values())
    assert (load_safely(tmp_path / "last.pt")["step"] > 0) == (save_every > 0)


def test_ctrl_c_in_the_first_epoch(shared_dataset, tmp_path, monkeypatch):
    """A run that is stopped in its first epoch can be started again without an option."""
    config = tiny_config(shared_dataset, out=str(tmp_path), epochs=1)
    with monkeypatch.context() as patch:
        interrupt_at(patch, config, 0.4)
        assert main(command_line(config)) == 130
    assert not (tmp_path / "last.pt").exists()
    assert main(command_line(config)) == 0


# ---------------------------------------------------------------------------- resuming


def test_resume_without_a_checkpoint(finished, tmp_path, capsys):
    """`--resume` without a last.pt says so and starts the run."""
    config = replace(finished.config, out=str(tmp_path), resume=True)
    for epochs in (1, 3):
        assert main(command_line(replace(config, epochs=epochs))) == 0
        assert (str(tmp_path / "last.pt") in capsys.readouterr().out) == (epochs == 1)
    assert [line["epoch"] for line in history_of(tmp_path)] == [1, 2, 3]


def test_resume_with_more_epochs(finished, tmp_path, capsys):
    """Resuming with another number of epochs prints that the learning rates change."""
    config = replace(finished.config, out=str(tmp_path), resume=True)
    for epochs, changes in ((1, False), (1, False), (2, True)):
        assert main(command_line(replace(config, epochs=epochs))) == 0
        assert ("schedule now has 2 epochs instead of 1" in capsys.readouterr().out) == changes


def test_resume_with_the_default_image_size(shared_dataset, tmp_path):
    """224 pixels, which earlier versions wrote as the default, are the network's own: no change."""
    config = tiny_config(shared_dataset, out=str(tmp_path / "out"), image_size=224, epochs=1)
    fit(build_run(config))
    assert build_run(replace(config, image_size=None, resume=True)).progress.history


def test_resume_a_finished_run(finished):
    """Resuming a run that has all its epochs trains nothing and leaves last.pt as it is."""
    before = (Path(finished.config.out) / "last.pt").read_bytes()
    assert len(fit(build_run(replace(finished.config, resume=True)))) == 3
    assert (Path(finished.config.out) / "last.pt").read_bytes() == before


def test_resume_from_moved_data(finished, dataset, tmp_path):
    """A run can be resumed with the same data in other folders."""
    moved = tiny_config(dataset, cache_dir=str(tmp_path))
    names = ("train_images", "train_captions", "val_images", "val_captions", "cache_dir")
    paths = {name: getattr(moved, name) for name in names}
    run = build_run(replace(finished.config, resume=True, **paths))
    assert len(run.progress.history) == 3


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
        ("learning_rate", 0.5, "learning_rate was 0.02, is 0.5"),
        ("no_image", True, "no_image was False, is True"),
        ("min_word_freq", 2, "min_word_freq was 1, is 2"),
    ],
)
def test_resume_refuses_another_config(finished, refused, name, value, message):
    """Resuming with another model or other training options names what differs."""
    assert message in refused(replace(finished.config, **{name: value}))


def test_resume_refuses_other_captions(finished, dataset, refused):
    """Resuming with other captions is refused, even if they consist of the same words."""
    path = dataset / "captions.json"
    path.write_text(path.read_text().replace('"a cat"', '"cat a"'))
    assert "captions or their images" in refused(replace(finished.config, train_captions=str(path)))


def test_resume_refuses_another_cnn(shared_dataset, tmp_path, refused):
    """Resuming with other weights of the frozen CNN is refused, even from a file of that name."""
    weights = tmp_path / "weights.pt"
    shutil.copy(calibrated_weights(), weights)
    config = tiny_config(shared_dataset, out=str(tmp_path / "out"), weights=str(weights), epochs=1)
    fit(build_run(config))
    torch.save({name: value * 1.5 for name, value in torch.load(weights).items()}, weights)
    assert "weights of the CNN have changed" in refused(config)


def test_resume_refuses_another_vocabulary(finished, tmp_path, refused):
    """Resuming with the words of another order, of an --init-from checkpoint, is refused."""
    config = replace(finished.config, out=str(tmp_path / "out"))
    shutil.copytree(finished.config.out, config.out)
    checkpoint = load_safely(tmp_path / "out" / "best.pt")
    checkpoint["words"][4:] = reversed(checkpoint["words"][4:])
    torch.save(checkpoint, tmp_path / "other.pt")
    assert "vocabulary" in refused(replace(config, init_from=str(tmp_path / "other.pt")))


def test_checkpoint_of_an_earlier_version(finished, tmp_path):
    """A checkpoint in which `fine_tune` is a bool is loaded, and its run is resumed."""
    last = load_safely(Path(finished.config.out) / "last.pt")
    for config in (last["config"], last["train_config"]):
        config["fine_tune"] = False
    torch.save(last, tmp_path / "last.pt")
    assert CaptionModel.from_checkpoint(tmp_path / "last.pt").config.fine_tune == "none"
    assert build_run(replace(finished.config, out=str(tmp_path), resume=True)).progress.history
    last["config"]["fine_tune"] = True
    torch.save(last, tmp_path / "last.pt")
    assert CaptionModel.from_checkpoint(tmp_path / "last.pt").config.fine_tune == "all"


def test_resume_refuses_an_old_format(finished, tmp_path, refused):
    """A last.pt in the format of an earlier version is refused, and the message names it."""
    last = tmp_path / "last.pt"
    content = load_safely(Path(finished.config.out) / "last.pt")
    old = {key: content[key] for key in ("model", "history", "optimizer", "step")}
    old |= {"config": content["config"] | {"words": content["words"]}, "options": {}}
    torch.save(old, last)
    assert str(last) in refused(replace(finished.config, out=str(tmp_path)))


# ---------------------------------------------------------------------------- earlier runs


def test_an_earlier_run_is_kept(finished, capsys):
    """A folder with an earlier run is refused unless `--resume` or `--overwrite` is given."""
    before = contents(finished.config.out)
    assert main(command_line(finished.config)) == 1
    error = capsys.readouterr().err
    assert "earlier run" in error and "--resume" in error and "--overwrite" in error
    assert contents(finished.config.out) == before


def test_best_epoch_without_last(finished, tmp_path, refused):
    """The best epoch of a run whose last.pt is lost is not deleted by a resumption."""
    shutil.copytree(finished.config.out, tmp_path / "out")
    (tmp_path / "out" / "last.pt").unlink()
    assert "no last.pt" in refused(replace(finished.config, out=str(tmp_path / "out")))


def test_overwrite(finished, tmp_path):
    """`overwrite` starts the run again: the same seed gives the same first epoch."""
    config = replace(finished.config, out=str(tmp_path), epochs=1)
    for overwrite in (False, True):
        fit(build_run(replace(config, overwrite=overwrite)))
        assert [line["epoch"] for line in history_of(tmp_path)] == [1]


def test_a_run_that_was_faster(shared_dataset, tmp_path):
    """Of two runs that were built for the same folder, the second does not undo the first."""
    config = tiny_config(shared_dataset, out=str(tmp_path), epochs=1)
    one, other = build_run(config), build_run(config)
    fit(one)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="another run"):
        fit(other)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_one_run_at_a_time(shared_dataset, tmp_path, capsys):
    """A second run into a folder is refused while the first holds its lock, and not afterwards."""
    config = tiny_config(shared_dataset, out=str(tmp_path), epochs=1)
    with lock_run_dir(tmp_path):
        assert main(command_line(config)) == 1
        assert "another run is writing" in capsys.readouterr().err
    assert main(command_line(config)) == 0
