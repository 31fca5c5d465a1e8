"""Batches from worker processes that lack shared memory, open files, or that are killed."""

import contextlib
import gc
import multiprocessing.synchronize
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from captioning.data.workers import WorkerError, WorkerLoader
from data_loader import collate, get_loader

ROOT = Path(__file__).resolve().parent.parent.parent
FORK = {"multiprocessing_context": "fork", "num_workers": 2}


class Images(Dataset):
    """(image, caption) pairs; `hook` is called with the index of each."""

    def __init__(self, hook=lambda index: None, size=4):
        self.hook, self.size = hook, size

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.hook(index)
        return torch.full((3, self.size, self.size), float(index)), [1, 4 + index, 2]


def assert_complete(loader):
    """The batches contain every image and caption once, in order."""
    batches = list(loader)
    images = torch.cat([batch.images for batch in batches])
    assert images[:, 0, 0, 0].tolist() == [float(index) for index in range(12)]
    captions = torch.cat([batch.captions for batch in batches])
    assert captions.tolist() == [[1, 4 + index, 2] for index in range(12)]


def test_no_shared_memory(monkeypatch, capfd):
    """Without shared memory, batches arrive through a pipe, and each worker says so once."""

    def fails(tensor):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fails)
    assert_complete(WorkerLoader(Images(), 2, collate_fn=collate, **FORK))
    assert capfd.readouterr().err.count("pipe, not shared memory") == 2


def use_up_files(worker):
    """Leave a process with two file descriptors that it can open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    free = []
    with contextlib.suppress(OSError):
        while True:
            free.append(os.open(os.devnull, os.O_RDONLY))
    for file in free[:2]:
        os.close(file)


def test_too_many_open_files_in_a_worker(capfd):
    """Workers that cannot open further files hand over their batches through a pipe."""
    loader = WorkerLoader(Images(), 2, collate_fn=collate, worker_init_fn=use_up_files, **FORK)
    assert_complete(loader)
    assert "Too many open files" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_pipe_keeps_tensors(dtype, monkeypatch):
    """Tensors of every type and shape, also nested and not contiguous, are the same behind it."""
    values = [torch.arange(6).to(dtype).view(2, 3).T, torch.tensor(1).to(dtype), None]

    def nested(items):
        return [tuple(values), "text"]

    def unavailable(tensor):
        raise RuntimeError("no shared memory")

    monkeypatch.setattr(torch.Tensor, "share_memory_", unavailable)
    ((got, text), *_) = WorkerLoader(Images(), 12, collate_fn=nested, **FORK)
    assert text == "text" and got[2] is None
    for expected, tensor in zip(values[:2], got[:2], strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_killed_worker():
    """The death of a worker is an error that says what to do."""
    dataset = Images(lambda index: index == 5 and os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(WorkerError, match="ended unexpectedly.*fewer --num-workers"):
        list(get_loader(dataset, "val", 2, num_workers=2))


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset by peer")])
def test_worker_killed_during_a_transfer(monkeypatch, error):
    """So is the end of the connection on which a worker was handing over a batch."""

    def ended(iterator):
        raise error

    iterator = torch.utils.data.dataloader._BaseDataLoaderIter
    monkeypatch.setattr(iterator, "__next__", ended)
    with pytest.raises(WorkerError, match="ended unexpectedly.*fewer --num-workers"):
        list(get_loader(Images(), "val", 2, num_workers=2))
    with pytest.raises(type(error)):
        list(get_loader(Images(), "val", 2))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # DataLoader's
def test_workers_that_cannot_start(monkeypatch):
    """If the machine refuses the workers, the error says why and what to do."""

    def refused(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", refused)
    with pytest.raises(WorkerError, match="cannot be started.*No space left.*--num-workers"):
        list(get_loader(Images(), "val", 2, num_workers=2))


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), RuntimeError("alloc_cpu: can't allocate memory: 9 bytes")]
)
def test_worker_without_memory(error):
    """A worker that cannot allocate memory is an error that says what to do."""

    def allocate(index):
        raise error

    with pytest.raises(WorkerError, match="ended unexpectedly .*memory.*fewer --num-workers"):
        list(get_loader(Images(allocate), "val", 2, num_workers=2))


def test_error_of_the_dataset_in_a_worker():
    """An error of the dataset itself remains what it is, and no worker outlives it."""

    def broken(index):
        raise RuntimeError("my own mistake")

    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="my own mistake"):
            list(get_loader(Images(broken), "val", 2, num_workers=2))
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


IN_A_CONTAINER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_workers import Images, assert_complete, get_loader
assert_complete(get_loader(Images(size=1200), "val", 4, num_workers=4))
"""


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"]).returncode != 0,
    reason="needs a mount namespace",
)
def test_small_shared_memory():
    """With the 64 MB of a container, large batches arrive; before, the loader waited forever."""
    code = IN_A_CONTAINER.format(root=str(ROOT), tests=str(Path(__file__).parent))
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "-m", "sh", "-c", mount, sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
