"""One process or many, the device, and the precision: the same calls with and without torchrun.

with process_group(device):                # no effect unless torchrun started this process
    rank, world_size = rank_and_world_size()    # 0, 1 without torchrun
    total = all_reduce_sum(total)
with autocast(device, "auto"):             # bfloat16 where the hardware accelerates it
    ...
"""

import contextlib
import functools
import os
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

START_TIMEOUT = timedelta(minutes=2)  # between the start of the first and of the last process
TIMEOUT = timedelta(minutes=10)  # a process that waits longer for another ends with an error
PRECISIONS = ("auto", "float32", "bfloat16")


# ---------------------------------------------------------------------------- processes


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
    new prefix at each start. The other ranks request it with a unique token, so that they
    cannot read the answer of an earlier start.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    token = uuid.uuid4().hex
    if rank > 0:
        store.set(f"request/{rank}", token)
        prefix = store.get(f"answer/{token}").decode()  # waits for it
        store.set(f"{prefix}/{rank}", "ready")
    else:
        prefix, missing = token, set(range(1, world_size))
        deadline = time.monotonic() + START_TIMEOUT.total_seconds()
        while missing:
            if time.monotonic() > deadline:
                raise RuntimeError(f"ranks {sorted(missing)} did not start within {START_TIMEOUT}")
            for other in missing:
                if store.check([f"request/{other}"]):
                    store.set(f"answer/{store.get(f'request/{other}').decode()}", prefix)
            time.sleep(0.02)
            missing = {other for other in missing if not store.check([f"{prefix}/{other}"])}
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
    _, world_size = rank_and_world_size()
    items = [item] * world_size
    if world_size > 1:
        dist.all_gather_object(items, item)
    return items


def interleave(parts) -> list:
    """The inverse of slicing a list with `[rank::world_size]` for each rank."""
    merged = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        merged[rank :: len(parts)] = part
    return merged


def wrap_ddp(module):
    """The module in DistributedDataParallel, or unchanged if there is a single process."""
    if not dist.is_initialized():
        return module
    return torch.nn.parallel.DistributedDataParallel(module)


def print0(text):
    """Print on rank 0."""
    if rank_and_world_size()[0] == 0:
        print(text, flush=True)


def show_progress() -> bool:
    """Whether to show progress bars: on rank 0, in a terminal or a notebook, not in a log file."""
    return rank_and_world_size()[0] == 0 and (sys.stdout.isatty() or "ipykernel" in sys.modules)


# ---------------------------------------------------------------------------- device


def pick_device(name) -> torch.device:
    """The device called `name`; "auto" prefers CUDA, then MPS, then the CPU.

    Under torchrun "auto" and "cuda" select the GPU of the local rank. Raises ValueError if the
    device is not available.
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
        raise ValueError(f"device {name!r} is not available ({reason})") from None


def use_deterministic_algorithms():
    """Make CUDA kernels deterministic; on a CPU runs are reproducible without it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is initialized
    torch.use_deterministic_algorithms(True)


def get_rng_state(device) -> dict:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


# ---------------------------------------------------------------------------- precision


def autocast(device, precision="auto"):
    """torch.autocast in the precision selected by `resolve_precision`; no effect for float32."""
    enabled = resolve_precision(device, precision) == "bfloat16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def resolve_precision(device, precision="auto") -> str:
    """The one precision policy: "float32" or "bfloat16" for a device and a setting.

    "auto" selects bfloat16 autocast where the hardware multiplies bfloat16 faster than float32 and
    PyTorch's LSTM supports it. Feature extraction, training, validation and captioning all use it.
    Raises ValueError for an unknown setting, or for bfloat16 on a device without support.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    device = torch.device(device)
    if precision == "bfloat16" and not _lstm_supports_bfloat16(device.type):
        raise ValueError(
            f"PyTorch's LSTM does not support bfloat16 on this {device.type} device; "
            "use --precision float32 (or auto)"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        supports = torch.cpu.get_capabilities()
        fast = bool(supports.get("avx512_bf16") or supports.get("amx_bf16"))
    else:
        fast = False
    return "bfloat16" if fast and _lstm_supports_bfloat16(device.type) else "float32"


@functools.cache
def _lstm_supports_bfloat16(device_type) -> bool:
    """Whether a tiny LSTM runs: some CPUs have bfloat16 matrix products but no bfloat16 LSTM."""
    try:
        # The first call may be in a context without gradients, and the result is kept.
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
            inputs = torch.zeros(1, 1, 8, device=device_type, requires_grad=True)
            lstm = torch.nn.LSTM(8, 8, device=device_type)
            with torch.autocast(device_type, torch.bfloat16):
                lstm(inputs)[0].sum().backward()
    except RuntimeError:
        return False
    return True


def to_float64(tensor):
    """In float64, so that long sums are accurate; on the CPU if the device (MPS) has no float64."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()
