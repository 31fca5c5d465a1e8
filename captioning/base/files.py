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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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


@contextlib.contextmanager
def file_lock(path, wait=True):
    """Hold an exclusive lock on `path`, which is created if necessary.

    The operating system releases it when the process ends, however it ends. With `wait=False`,
    raises BlockingIOError if another process holds the lock.
    """
    with open(path, "w") as file:
        if not _try_lock(file):
            if not wait:
                raise BlockingIOError(f"{path} is locked by another process")
            print(f"Waiting for another process that holds {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(file) -> bool:
    """Lock an open file; False if another process holds the lock.

    Windows and some cluster file systems have no such locks: there, nothing is locked.
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


def run_lock(path):
    import filelock

    lock = filelock.FileLock(path)
    lock.acquire(timeout=0)
    return lock
