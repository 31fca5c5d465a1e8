"""The files of a training run: best.pt, last.pt and the history; resuming from them."""

import contextlib
import hashlib
import json
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import torch

from captioning.base.checkpoints import load_checkpoint, save
from captioning.base.device import get_rng_state, set_rng_state
from captioning.base.distributed import all_reduce_sum, gather, print0, rank_and_world_size
from captioning.base.files import acquire_lock, write_text
from captioning.base.options import names_with
from captioning.learning.card import with_results

RUN_FILES = ("last.pt", "best.pt", "history.jsonl", "metrics.json")


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


# ---------------------------------------------------------------------------- starting a run


def lock_run_dir(out) -> contextlib.ExitStack:
    """Lock the folder `out`, which is created, until the result is closed. Rank 0 has the lock.

    The same process may lock it again: a cell of a notebook that builds a run can be repeated.
    Raises OSError if another run holds the lock, or if the folder cannot be written to.
    """
    out, lock = Path(out), contextlib.ExitStack()
    if rank_and_world_size()[0] > 0:
        return lock
    try:
        out.mkdir(parents=True, exist_ok=True)
        acquired = acquire_lock(out / ".lock", wait=False, is_singleton=True)
        lock.callback(acquired.release, force=True)
    except TimeoutError as error:
        raise OSError(
            f"another run is writing to {out}; wait for its end, or choose another --out"
        ) from error
    except OSError as error:
        reason = error.strerror
        raise OSError(f"cannot write to {out} ({reason}); choose another --out") from error
    for part in out.glob("*.part"):  # left by a process that was killed
        part.unlink(missing_ok=True)
    return lock


def find_earlier_run(config):
    """The checkpoint to resume from, None for a new run.

    Raises ValueError if --out contains a run that would be lost.
    """
    last, best = Path(config.out) / "last.pt", Path(config.out) / "best.pt"
    if config.resume and last.exists():
        return load_checkpoint(last)
    if not config.overwrite and (last.exists() or best.exists()):
        if not config.resume:
            raise ValueError(
                f"{config.out} contains an earlier run: continue with --resume, start again with "
                "--overwrite, or choose another folder with --out"
            )
        # A kill between the two files of the first epoch leaves best.pt alone.
        if len(load_checkpoint(best).get("history", [])) != 1:
            raise ValueError(
                f"{config.out} contains the best epoch of an earlier run, but no last.pt to resume "
                "from: start again with --overwrite, or choose another folder with --out"
            )
    return None


def prepare_run_dir(run):
    """Delete the files of an earlier run if this run starts at its beginning."""
    out, progress = Path(run.config.out), run.progress
    if rank_and_world_size()[0] > 0:
        return
    if not progress.history and not progress.step:
        for name in RUN_FILES:
            (out / name).unlink(missing_ok=True)
        run.model.vocab.save(out / "vocabulary.json")
    write_history(out, progress.history)  # written after last.pt: a kill may have prevented it


# ---------------------------------------------------------------------------- saving


def best_epoch(history, best_by="loss") -> int:
    """The index of the epoch with the lowest validation loss or the highest CIDEr-D."""
    scores = [line["val_cider"] if best_by == "cider" else -line["val_loss"] for line in history]
    return scores.index(max(scores))


def save_run(run):
    """Write last.pt, with everything needed to resume; after an epoch, also best.pt and history.

    best.pt is written first, if the epoch is the best so far, and the history last: a kill at any
    moment leaves files from which `--resume` gets the same result.
    """
    config, progress, out = run.config, run.progress, Path(run.config.out)
    rng = gather(get_rng_state(run.model.device))
    totals = {name: all_reduce_sum(value) for name, value in progress.totals.items()}
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
        "data": run.data_digest,
        "computed_in": run.precision,
    }
    save(content, out / "last.pt")
    if epoch_done:
        write_history(out, history)


def write_history(out, history):
    if not history:
        return
    write_text(out / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))


# ---------------------------------------------------------------------------- resuming


def restore(run, checkpoint):
    """Continue from what `save_run` wrote: weights, optimizer, history, the position in the epoch
    and its sums, random numbers. Not the card, the detector and the confidence, which the model
    has from `--init-from`. Raises ValueError if the checkpoint belongs to another run.
    """
    config, progress, model = run.config, run.progress, run.model
    rank, world_size = rank_and_world_size()
    saved = check_same_run(run, checkpoint)
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
    progress.seconds = checkpoint["seconds"]
    totals = checkpoint["totals"].items()  # the sums of all ranks
    progress.totals = {name: value * (rank == 0) for name, value in totals}
    if len(checkpoint["rng"]) == world_size:
        set_rng_state(checkpoint["rng"][rank], model.device)
    else:
        print0("The number of processes has changed: dropout uses new random numbers.")


def check_same_run(run, checkpoint) -> dict:
    """Raise ValueError if a run cannot be resumed with another config, data, words or frozen CNN.

    Returns the config that the checkpoint was written with.
    """
    config, model = run.config, run.model
    if "train_config" not in checkpoint or "optimizer" not in checkpoint:
        raise ValueError(f"{config.out}/last.pt holds no training state; start with --overwrite")
    saved, may_change = checkpoint["train_config"], names_with(config, "may_change")
    changed = [
        f"{name} was {str(saved.get(name))[:60]}, is {str(value)[:60]}"
        for name, value in asdict(config).items()
        if name not in may_change and saved.get(name) != value
    ]
    if not changed and not same_frozen_weights(model, checkpoint["model"]):
        changed.append("the weights of the CNN have changed")
    if checkpoint["words"] != model.vocab.words:
        changed.append("the vocabulary has changed")
    if checkpoint["data"] != run.data_digest:
        changed.append("the captions or their images have changed")
    if changed:
        raise ValueError(f"cannot resume {config.out}: {'; '.join(changed)}")
    return saved


def same_frozen_weights(model, state) -> bool:
    """Whether what is not trained of the CNN has the same weights in a state dict."""
    cnn, prefix = model.encoder.cnn, "encoder.cnn."
    trained = {name for name, parameter in cnn.named_parameters() if parameter.requires_grad}
    return cnn.fine_tune == "all" or all(
        torch.equal(tensor.cpu(), state[prefix + name])
        for name, tensor in cnn.state_dict().items()
        if name not in trained
    )


def digest_of(*splits) -> str:
    """A hash of the captions and the image ids of `CocoCaptions`."""
    content = [(data.image_ids, data.captions) for data in splits]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
