"""Atomic file writes and file locks.

write_text("metrics.json", "{}")               # the file appears complete, or not at all
with atomic_write("features.npy") as file:     # the same for binary content
    np.save(file, features)
with file_lock("cache/.lock"):                 # one process at a time
    ...
"""

import contextlib
import errno
import os
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to, which replaces `path` once it is complete and on the disk.

    A full disk, a kill or a power cut leaves the previous version of `path` as it was. Raises
    OSError if the file cannot be written.
    """
    name, path = path, Path(os.path.realpath(path))  # of a link, the file that it leads to
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {name}: it is not a regular file; choose another path")
    # The process id is part of the name, because several ranks may write this file.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).split("\n")[0] or repr(cause)
        raise OSError(
            f"cannot write {name} ({reason}); the previous version, if there was one, is intact: "
            "free some disk space or check the permissions, then run the same command again"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # there is none if it could not be opened
            part.unlink()


def write_text(path, text):
    """`atomic_write` of a text, encoded as UTF-8."""
    with atomic_write(path) as file:
        file.write(text.encode())


def acquire_lock(path, wait=True, **options) -> FileLock:
    """An exclusive lock on `path`, held until its `release()` or the end of the process.

    With `wait=False`, raises TimeoutError if another process holds it. options: of `FileLock`.
    """
    lock = FileLock(path, **options)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise
        print(f"Waiting for another process that holds {path}", flush=True)
        lock.acquire()
    except OSError as error:  # some cluster file systems have no locks: there, nothing is locked
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return lock


@contextlib.contextmanager
def file_lock(path):
    """Hold `acquire_lock(path)` during a `with` block."""
    lock = acquire_lock(path)
    try:
        yield
    finally:
        lock.release()
