"""Saving and loading checkpoints; interrupting and resuming runs.

save({"model": model.state_dict(), ...}, "runs/x/last.pt")     # atomic
checkpoint = load_safely("runs/x/last.pt")                     # runs no code from the file
export("runs/x/best.pt", "captioner.pt")                       # weights only, half precision
"""

import contextlib
import hashlib
import json
import pickle
import signal
import threading
import warnings
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from captioning.base.distributed import (
    all_reduce_sum,
    gather,
    get_rng_state,
    print0,
    rank_and_world_size,
    set_rng_state,
)
from captioning.base.files import atomic_write, file_lock, write_text
from captioning.learning.card import card_of, with_results

RUN_FILES = ("last.pt", "best.pt", "history.jsonl", "history.csv", "metrics.json")


def save(checkpoint: dict, path):
    """torch.save as an atomic write. Raises OSError if the file cannot be written."""
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load_safely(path, map_location="cpu"):
    """torch.load for untrusted files: tensors and plain values only, never code.

    Raises FileNotFoundError, or ValueError for a damaged file or one with other content.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not verify the checksums that it writes
            damaged = zipfile.ZipFile(path).testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        with warnings.catch_warnings():  # raised by torch.load itself for quantized tensors
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} contains more than tensors and plain values, or is not a PyTorch file; "
            "it was not loaded, and no code in it was run"
        ) from None
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise ValueError(f"{path} is damaged or not a PyTorch file ({error})") from None


def config_and_words(checkpoint) -> tuple[dict, list[str]]:
    """(config, words) of a checkpoint, in the current format or an earlier one.

    The first format has the words inside the config, and other names for two options.
    """
    config = with_current_values(checkpoint["config"])
    if "words" not in config:
        return config, checkpoint["words"]
    renamed = {"mirror": "flip", "blind": "no_image"}
    config = {renamed.get(name, name): value for name, value in config.items()}
    return config, config.pop("words")


def with_current_values(config) -> dict:
    """A config of a checkpoint, in which `fine_tune` may be a bool, as in earlier versions."""
    names, value = {True: "all", False: "none"}, config.get("fine_tune", "none")
    return {**config, "fine_tune": names.get(value, value)}


def export(source, target, card=None):
    """Write the weights of a checkpoint in half precision, without the optimizer state.

    card: entries to add to the model card, or to replace in it.

    The file is smaller, and `CaptionModel.from_checkpoint` loads it. Vectors, such as biases and
    BatchNorm statistics, stay in float32: they are small, and may exceed the range of half
    precision.

    Raises what `load_safely` raises, or ValueError if `source` is not a training checkpoint.
    """
    checkpoint = load_safely(source)
    try:
        config, words = config_and_words(checkpoint)
        card = card_of(checkpoint) | (card or {})
        state = {
            name: tensor.half() if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor
            for name, tensor in checkpoint["model"].items()
        }
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{source} is not a checkpoint of a captioning model") from None
    history = checkpoint.get("history", [])
    content = {"config": config, "words": words, "model": state, "history": history, "card": card}
    save(content, target)


# ---------------------------------------------------------------------------- interruptions


def delete_run_files(run_dir: Path):
    for name in RUN_FILES:
        (run_dir / name).unlink(missing_ok=True)


@contextlib.contextmanager
def lock_run_dir(run_dir: Path, rank=0):
    """Create the directory, and lock it on rank 0. Raises OSError if another run holds it."""
    if rank > 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(run_dir / ".lock", wait=False))
        except BlockingIOError:
            raise OSError(f"another run is writing to {run_dir}; choose another --out") from None
        except OSError as error:
            reason = error.strerror
            raise OSError(f"cannot write to {run_dir} ({reason}); choose another --out") from None
        for part in run_dir.glob("*.part"):  # left by a process that was killed
            part.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def stop_on_sigterm():
    """A threading.Event that SIGTERM sets, instead of ending the process at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)


# ---------------------------------------------------------------------------- training runs

# Options that may differ when a run is resumed; changing any other would make it another run.
MAY_CHANGE = {
    "epochs",
    "patience",
    "save_every",
    "device",
    "num_workers",
    "cache_dir",
    "out",
    "resume",
    "overwrite",
    "init_from",
    "train_images",
    "train_captions",
    "val_images",
    "val_captions",
}


def find_earlier_run(config):
    """The checkpoint to resume from, None for a new run.

    Raises ValueError if --out contains a run that would be lost.
    """
    out = Path(config.out)
    for folder in (out, Path(config.cache_dir)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, not a folder; choose another")
    last, best = out / "last.pt", out / "best.pt"
    if config.resume and last.exists():
        return load_safely(last)
    if not config.overwrite and (last.exists() or best.exists()):
        if not config.resume:
            raise ValueError(
                f"{out} contains an earlier run: continue with --resume, start again with "
                "--overwrite, or choose another folder with --out"
            )
        # A kill between the two files of the first epoch leaves best.pt alone.
        if len(load_safely(best).get("history", [])) != 1:
            raise ValueError(
                f"{out} contains the best epoch of an earlier run, but no last.pt to resume from: "
                "start again with --overwrite, or choose another folder with --out"
            )
    return None


def modification_times(out):
    """[last.pt, best.pt] in `out`, each in nanoseconds, or None if it does not exist."""
    files = (Path(out) / "last.pt", Path(out) / "best.pt")
    return [file.stat().st_mtime_ns if file.exists() else None for file in files]


def check_same_run(checkpoint, config, data_fingerprint, model):
    """Raise ValueError if a run cannot be resumed with another config, data, words or frozen CNN.

    Returns the config that the checkpoint was written with.
    """
    defaults = {f.name: f.default for f in fields(config)}  # for options added since the checkpoint
    saved = with_current_values(defaults | checkpoint["train_config"])
    # Earlier versions wrote the network's own size of images where the option was not given.
    if config.image_size is None and saved["image_size"] == model.encoder.image_size:
        saved["image_size"] = None
    changed = [
        f"{name} was {str(saved[name])[:60]}, is {str(value)[:60]}"
        for name, value in asdict(config).items()
        if name not in MAY_CHANGE and saved[name] != value
    ]
    if config.fine_tune != "all" and any(
        isinstance(tensor, torch.Tensor)
        and not torch.equal(tensor.cpu(), checkpoint["model"][f"encoder.backbone.{name}"].cpu())
        for name, tensor in model.encoder.trunk.state_dict().items()
    ):
        changed.append("the weights of the CNN have changed")
    if checkpoint["words"] != model.vocab.words:
        changed.append("the vocabulary has changed")
    if checkpoint["data"] != data_fingerprint:
        changed.append("the captions or their images have changed")
    if changed:
        raise ValueError(f"cannot resume {config.out}: {'; '.join(changed)}")
    return saved


def best_epoch(history, best_by="loss") -> int:
    """The index of the epoch with the lowest validation loss or the highest CIDEr-D."""
    scores = [line["val_cider"] if best_by == "cider" else -line["val_loss"] for line in history]
    return scores.index(max(scores))


def prepare_run_dir(run):
    """Delete the files of an earlier run if this run starts at its beginning.

    Raises ValueError if another run has written to the folder since `build_run`.
    """
    out, progress = Path(run.config.out), run.progress
    if rank_and_world_size()[0] > 0:
        return
    if run.checkpoint_times != modification_times(out):
        raise ValueError(
            f"another run has written to {out} in the meantime; start again, or choose another "
            "folder with --out"
        )
    if not progress.history and not progress.step:
        delete_run_files(out)
        run.model.vocab.save(out / "vocabulary.json")
    write_history(out, progress.history)  # written after last.pt: a kill may have prevented it


def save_run(run):
    """Write last.pt, with everything needed to resume; after an epoch, also best.pt and history.

    best.pt is written first, if the epoch is the best so far, and the history last: a kill at any
    moment leaves files from which `--resume` gets the same result.
    """
    config, progress, out = run.config, run.progress, Path(run.config.out)
    rng = gather(get_rng_state(run.model.device))
    totals = all_reduce_sum(progress.totals)
    if rank_and_world_size()[0] > 0:
        return
    epoch_done, history = progress.step == 0, progress.history
    content = run.model.checkpoint() | {"train_config": asdict(config), "history": history}
    content["card"] = with_results(run.model.card, history)
    if epoch_done and best_epoch(history, config.best_by) == len(history) - 1:
        save(content, out / "best.pt")
    content |= {
        "optimizer": run.optimizer.state_dict(),
        "rng": rng,
        "step": progress.step,
        "seconds": progress.seconds,
        "totals": totals,
        "data": data_fingerprint(run),
        "computed_in": run.precision,
    }
    save(content, out / "last.pt")
    run.checkpoint_times = modification_times(out)
    if epoch_done:
        write_history(out, history)


def restore(run, checkpoint):
    """Continue from what `save_run` wrote. Raises ValueError if that belongs to another run."""
    config, progress, model = run.config, run.progress, run.model
    rank, world_size = rank_and_world_size()
    try:
        saved = check_same_run(checkpoint, config, data_fingerprint(run), model)
        if saved["epochs"] != config.epochs and config.schedule != "constant":
            print0(
                f"The learning rate schedule now has {config.epochs} epochs instead of "
                f"{saved['epochs']}: the result differs from that of an uninterrupted run."
            )
        if checkpoint["computed_in"] != run.precision:
            print0(f"Continuing in {run.precision}, not in {checkpoint['computed_in']}.")
        model.load_state_dict(checkpoint["model"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        progress.history, progress.step = checkpoint["history"], checkpoint["step"]
        progress.seconds = checkpoint.get("seconds", 0.0)  # earlier versions did not save it
        if rank == 0:
            progress.totals += checkpoint["totals"].to(progress.totals)
        if len(checkpoint["rng"]) == world_size:
            set_rng_state(checkpoint["rng"][rank], model.device)
        else:
            print0("The number of processes has changed: dropout uses new random numbers.")
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{Path(config.out) / 'last.pt'} is not a run that this version can resume "
            f"({type(error).__name__}: {error}); start again with --overwrite"
        ) from None


def write_history(out, history):
    if not history:
        return
    write_text(out / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    columns = list(dict.fromkeys(name for line in history for name in line))
    table = [columns, *([line.get(name, "") for name in columns] for line in history)]
    write_text(out / "history.csv", "".join(",".join(map(str, row)) + "\n" for row in table))


def data_fingerprint(run) -> str:
    """A hash of the training and validation captions and their image ids."""
    splits = (loader.dataset.data for loader in (run.train_loader, run.val_loader))
    content = [(data.image_ids, data.captions) for data in splits]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
