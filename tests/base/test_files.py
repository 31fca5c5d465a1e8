"""Atomic file writes and file locks."""

import errno
import os
import re
import resource
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from captioning.base import files
from captioning.base.checkpoints import save
from captioning.base.files import acquire_lock, atomic_write, file_lock, write_text
from vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    """A file with content, alone in its folder."""
    (tmp_path / "file").write_bytes(b"previous")
    yield tmp_path / "file"
    assert os.listdir(tmp_path) == ["file"]  # nothing is left beside it


def test_atomic_write(path):
    """The file has its previous content until the new one is complete."""
    with atomic_write(path) as file:
        file.write(b"new" * 10_000)
        file.flush()
        assert path.read_bytes() == b"previous"
    assert path.read_bytes() == b"new" * 10_000


def test_write_text(path):
    """A text is written in UTF-8, whatever the locale."""
    write_text(path, "a caf\u00e9 \u72ac")
    assert path.read_bytes() == b"a caf\xc3\xa9 \xe7\x8a\xac"


@pytest.mark.parametrize("error", [KeyError("no such word"), KeyboardInterrupt()], ids=repr)
def test_exception_while_writing(path, error):
    """An exception in the block is passed on, and the previous content stays."""
    with pytest.raises(type(error)) as caught, atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert caught.value is error
    assert path.read_bytes() == b"previous"


@pytest.mark.parametrize(
    "write",
    [
        Vocabulary(["<pad>", "<start>", "<end>", "<unk>", "a" * 9999]).save,
        partial(save, torch.rand(10_000)),
    ],
    ids=["Vocabulary.save", "torch.save"],
)
def test_full_disk(path, write):
    """If the disk is full, the error is one sentence with the reason, and the file is intact."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # writing more fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"^cannot write .*file \(File too large\); .* again$", str(caught.value))
    assert path.read_bytes() == b"previous"


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.ENOSPC, "No space left"), "No space left"),
        (RuntimeError("first\nsecond"), "first"),
        (RuntimeError(), r"RuntimeError\(\)"),
    ],
    ids=repr,
)
def test_reason(path, monkeypatch, error, reason):
    """The message contains the first line of the reason, whatever is raised while writing."""
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=error))
    with pytest.raises(OSError, match=rf"^cannot write .*file \({reason}\);"), atomic_write(path):
        pass
    assert path.read_bytes() == b"previous"


@pytest.mark.parametrize("parent", ["file", "missing"])
def test_impossible_path(path, parent):
    """A path below a file or a missing folder is an error that names it."""
    with (
        pytest.raises(OSError, match=f"cannot write .*{parent}/x"),
        atomic_write(path.parent / parent / "x"),
    ):
        pass


def is_locked(path):
    try:
        acquire_lock(path, wait=False).release()
    except TimeoutError:
        return True
    return False


def test_lock_is_exclusive(path):
    """A lock is held until the end of the block, also if that raises."""
    with pytest.raises(KeyError), file_lock(path):
        assert is_locked(path)
        raise KeyError
    assert not is_locked(path)


def test_waiting_for_a_lock(path, monkeypatch):
    """With `wait`, the second holder starts after the first has ended, and says that it waits."""
    order, held, waits = [], threading.Event(), threading.Event()

    def report(text, **options):
        order.append(text)
        waits.set()

    def hold():
        with file_lock(path):
            held.set()
            waits.wait()
            order.append("first")

    monkeypatch.setattr(files, "print", report, raising=False)
    first = threading.Thread(target=hold)
    first.start()
    held.wait()
    with file_lock(path):
        order.append("second")
    first.join()
    assert order == [f"Waiting for another process that holds {path}", "first", "second"]


def test_lock_of_a_killed_process(path):
    """The lock of a process that is killed is released."""
    code = f"""if True:
        from captioning.base.files import file_lock
        with file_lock({str(path)!r}):
            print(1, flush=True)
            input()"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    process.stdout.readline()
    assert is_locked(path)
    process.kill()
    process.communicate()
    assert not is_locked(path)


def test_systems_without_locks(path, monkeypatch):
    """Where the file system has no locks, nothing is locked; other errors are passed on."""

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    number = errno.ENOLCK
    with file_lock(path):
        assert not is_locked(path)
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"), file_lock(path):
        pass
