"""One process or many, on whatever device: the same calls work with and without torchrun.

with process_group(device):          # does nothing unless torchrun started this process
    rank, world = rank_and_world()   # 0, 1 without it
    total = all_sum(total)           # the sum over all processes, for each of them
"""

import contextlib
import functools
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)  # a process that waits longer for another ends with an error


@contextlib.contextmanager
def process_group(device):
    """Join the other processes that torchrun started, and leave them in the end."""
    if "RANK" not in os.environ or not dist.is_torchelastic_launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(tensor):
    """The sum of a tensor over all processes."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def same_buffers(module):
    """Give every process the first one's buffers, such as BatchNorm's running statistics."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather(thing) -> list:
    """Every process's `thing`, in the order of their numbers, for each of them."""
    rank, world = rank_and_world()
    things = [thing] * world
    if world > 1:
        dist.all_gather_object(things, thing)
    return things


def interleave(shares) -> list:
    """Put together what was dealt out by `[rank::world]`."""
    whole = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


def parallel(module):
    """The module with its gradients averaged over all processes; as it is if there is only one."""
    if not dist.is_initialized():
        return module
    return torch.nn.parallel.DistributedDataParallel(module)


def say(text):
    """Print, once."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


def is_watched() -> bool:
    """Does this process print to a terminal or into a notebook, where progress bars are welcome?

    Into a file they would only be noise, and so would those of several processes.
    """
    return rank_and_world()[0] == 0 and (sys.stdout.isatty() or "ipykernel" in sys.modules)


# ---------------------------------------------------------------------------- devices


def pick_device(name) -> torch.device:
    """The device of that name; "auto": a GPU (CUDA, then Apple's), or else the CPU.

    Under torchrun "auto" and "cuda" are this process's own GPU. Raises ValueError if there is none
    of that name, or none for this process.
    """
    if name == "auto" or (name == "cuda" and "LOCAL_RANK" in os.environ):
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason})") from None


def exact(tensor):
    """In float64, so that long sums lose nothing; on the CPU if the device (MPS) has none."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def only_deterministic_operations():
    """From here on PyTorch takes no shortcut whose result depends on the order of its threads.

    On a CPU a run is the same every time without it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    torch.use_deterministic_algorithms(True)


def fast_precision(device):
    """bfloat16 autocast where the hardware multiplies it faster than float32, else no change."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        fast = (has.get("avx512_bf16") or has.get("amx_bf16")) and lstm_runs_in_bfloat16()
    else:
        fast = False
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(fast))


@functools.cache
def lstm_runs_in_bfloat16() -> bool:
    """Tried on a tiny one: on some CPUs PyTorch has products in bfloat16, but no LSTM."""
    inputs = torch.zeros(1, 1, 8, requires_grad=True)
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(8, 8)(inputs)[0].sum().backward()
    except RuntimeError:
        return False
    return True
