"""What lets a run be interrupted anywhere: files that are whole or not there, and a lock."""

import contextlib
import errno
import os
import signal
import threading
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextlib.contextmanager
def replacing(path: Path):
    """A file to write into; it takes the place of `path` once it is whole and on the disk.

    A full disk, a kill or a power cut leaves the earlier file as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        raise OSError(
            f"cannot write {path} ({str(error).splitlines()[0]}); what was saved before is intact: "
            "free some space if the disk is full, and go on with --resume"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def write_atomically(text: str, path: Path):
    with replacing(path) as file:
        file.write(text.encode())


def save_atomically(checkpoint, path: Path):
    with replacing(path) as file:
        torch.save(checkpoint, file)


def get_rng(device) -> dict:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng(states, device):
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def forget_earlier_run(out: Path):
    for name in ("last.pt", "best.pt", "history.jsonl", "history.csv", "metrics.json"):
        (out / name).unlink(missing_ok=True)


@contextlib.contextmanager
def only_run_in(out: Path, rank=0):
    """Make the folder and hold it for one run. Raises OSError if another run has it.

    The system lets go of the lock when the process ends, however it ends.
    """
    if rank > 0:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise OSError(f"cannot write into {out} ({error.strerror}); choose another --out") from None
    with lock:
        if not try_lock(lock):
            raise OSError(f"another run is writing into {out}; choose another --out")
        yield


def try_lock(file) -> bool:
    """Lock an open file until it is closed; False if another process has it locked.

    Some file systems of clusters have no locks, as Windows has none: there, nothing is locked.
    """
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return True


@contextlib.contextmanager
def one_after_the_other(lock_file: Path):
    """Wait until no other process is between these two lines, with the same file."""
    with open(lock_file, "w") as lock:
        if not try_lock(lock):
            print(f"Waiting for another run, which has {lock_file}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def stop_on_sigterm():
    """An event that SIGTERM sets, instead of ending the process at once."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    earlier = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, earlier)
