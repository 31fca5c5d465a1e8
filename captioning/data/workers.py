"""A DataLoader whose workers hand over every batch, or end with one sentence.

A worker of PyTorch's DataLoader puts its batches in shared memory from a thread, whose errors are
lost: where shared memory is small, as in a container, the training process waits forever.
"""

import os
import re
import sys

import torch
from torch.utils.data import DataLoader, get_worker_info

from captioning.base.device import usual_defaults

SPARE_FILES = 16  # open files that a worker needs to hand over a batch in shared memory


class WorkerError(OSError):
    """Workers could not be started, or ended; the message says what to do."""


class WorkerLoader(DataLoader):
    """torch.utils.data.DataLoader, but

    - a batch for which there is no shared memory, or no free file descriptor, goes through a pipe;
      the worker prints so once;
    - a WorkerError says why workers cannot be started, or that one was killed.
    """

    def __init__(self, dataset, *args, collate_fn, generator=None, **options):
        generator = generator or torch.Generator()  # not the global one, which others share
        options |= {"collate_fn": HandOver(collate_fn), "generator": generator}
        super().__init__(dataset, *args, **options)

    def __iter__(self):
        try:
            with usual_defaults():  # DataLoader fails with another default device
                batches = super().__iter__()
        except OSError as error:
            raise self.error("cannot be started", error) from error
        while True:
            try:
                with usual_defaults():
                    batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, MemoryError, EOFError, OSError) as error:
                if self.num_workers:
                    # The traceback and the iterator form a cycle. If the garbage collector frees
                    # them, it waits five seconds for each worker.
                    error.with_traceback(None)
                lines = str(error).splitlines() or [repr(error)]
                of_dataset = lines[0].startswith("Caught ")  # an exception in a worker
                out_of_memory = re.search("memory", lines[-1], re.IGNORECASE)
                if not self.num_workers or of_dataset and not out_of_memory:
                    raise
                raise self.error("ended unexpectedly", lines[-1 if of_dataset else 0]) from error
            yield batch

    def error(self, problem, reason):
        return WorkerError(
            f"the {self.num_workers} data-loading workers {problem} ({str(reason).rstrip('. ')}), "
            "perhaps for lack of memory, shared memory or open files: use fewer --num-workers, or "
            "none"
        )


class HandOver:
    """A collate function whose result, in a worker, is already in shared memory or in a pipe."""

    def __init__(self, collate):
        self.collate, self.warned = collate, False

    def __call__(self, items):
        batch = self.collate(items)
        if get_worker_info() is None:
            return batch
        try:
            apply(lambda tensor: tensor.share_memory_(), batch)
            for file in [os.open(os.devnull, os.O_RDONLY) for _ in range(SPARE_FILES)]:
                os.close(file)
        except (RuntimeError, OSError) as error:
            if not self.warned:
                reason = str(error).splitlines()[0]
                text = f"warning: batches go through a pipe, not shared memory: {reason}"
                print(text, file=sys.stderr)
                self.warned = True
            return apply(Piped, self.collate(items))
        return batch


class Piped:
    """A tensor that is pickled with its content, and unpickled as a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce__(self):
        content = self.tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return unpickle_tensor, (content, self.tensor.dtype, self.tensor.shape)


def unpickle_tensor(content, dtype, shape):
    return torch.from_numpy(content).view(dtype).reshape(shape)


def apply(function, batch):
    """`function` of each tensor in a batch of (named) tuples and lists; other values remain."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, (tuple, list)):
        values = [apply(function, value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
