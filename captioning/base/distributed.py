"""The same calls with one process and with many, which torchrun starts.

with process_group(device):                # no effect unless torchrun started this process
    rank, world_size = rank_and_world_size()    # 0, 1 without torchrun
    total = all_reduce_sum(total)
"""

import builtins
import contextlib
import os
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

START_TIMEOUT = timedelta(minutes=2)  # between the start of the first and of the last process
TIMEOUT = timedelta(minutes=10)  # a process that waits longer for another ends with an error


@contextlib.contextmanager
def process_group(device):
    """Initialize the process group if torchrun started this process, and destroy it at the end.

    If the body succeeds, the process exits within this context, see `_exit_together`.
    """
    if "RANK" not in os.environ or not dist.is_torchelastic_launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, world_size = _fresh_store()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        yield
        _exit_together(store, world_size)
    finally:
        dist.destroy_process_group()


def _fresh_store():
    """(store, rank, world_size), where the store has no keys of an earlier start of this job.

    torchrun's store outlives the worker processes. After a restart, workers would read there the
    addresses of killed ones, and fail or wait (pytorch/pytorch#135712). Therefore rank 0 chooses a
    new prefix at each start. The other ranks request it with a unique token, so that they cannot
    read the answer of an earlier start, and confirm it.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    prefix = uuid.uuid4().hex
    if rank > 0:
        store.set(f"request/{rank}", prefix)  # the token
        prefix = store.get(f"answer/{prefix}").decode()  # waits for it
        store.set(f"{prefix}/{rank}", "confirmed")
    missing = range(1, world_size) if rank == 0 else []
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    while missing := [other for other in missing if not store.check([f"{prefix}/{other}"])]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {missing} did not start within {START_TIMEOUT}")
        for request in (f"request/{other}" for other in missing):
            if store.check([request]):
                store.set(f"answer/{store.get(request).decode()}", prefix)
        time.sleep(0.02)
    store.set_timeout(TIMEOUT)
    return dist.PrefixStore(prefix, store), rank, world_size


def _exit_together(store, world_size):
    """Exit with status 0 at the same moment as the other ranks.

    torchrun cannot restart a job of which one node has already succeeded: a process killed during
    Python's shutdown would leave that node waiting for 5 minutes. Hence os._exit, after a barrier.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    dist.all_reduce(torch.zeros(()))  # raises if a rank is missing
    if store.add("exiting", 1) == world_size:
        store.set("exit", "now")
    store.wait(["exit"], START_TIMEOUT)
    os._exit(0)


def rank_and_world_size() -> tuple[int, int]:
    """(rank, world_size); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor):
    """The sum of a tensor over all ranks, as a new tensor."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(module):
    """Copy rank 0's buffers, such as BatchNorm's running statistics, to all ranks."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather(item) -> list:
    """The `item` of every rank, in rank order, on all ranks."""
    items = [item] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(items, item)
    return items


def interleave(parts) -> list:
    """The inverse of slicing a list with `[rank::world_size]` for each rank."""
    merged = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        merged[rank :: len(parts)] = part
    return merged


def wrap_ddp(module, **options):
    """The module in DistributedDataParallel, or unchanged if there is a single process."""
    if not dist.is_initialized():
        return module
    return torch.nn.parallel.DistributedDataParallel(module, **options)


def print0(text):
    """Print on rank 0."""
    if rank_and_world_size()[0] == 0:
        print(text, flush=True)


def show_progress() -> bool:
    """Whether to show progress bars: on rank 0, in a terminal or a notebook, not in a log file."""
    in_notebook = hasattr(builtins, "__IPYTHON__")
    return rank_and_world_size()[0] == 0 and (sys.stdout.isatty() or in_notebook)
