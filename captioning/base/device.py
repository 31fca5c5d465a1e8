"""The device, the precision and the state of the random numbers.

device = pick_device("auto")               # CUDA, MPS or the CPU
with autocast(device, "auto"):             # bfloat16 where the hardware accelerates it
    ...
"""

import contextlib
import functools
import os

import torch

PRECISIONS = ("auto", "float32", "bfloat16")


def pick_device(name) -> torch.device:
    """The device called `name`; "auto" prefers CUDA, then MPS, then the CPU.

    Under torchrun "auto" and "cuda" select the GPU of the local rank. Raises ValueError if the
    device is not available.
    """
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not available ({reason})") from error


@contextlib.contextmanager
def usual_defaults():
    """Within it, torch.zeros and the like create float32 tensors on the CPU, as the code expects,
    whatever default device and dtype the caller has set. Also a decorator.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


def get_rng_state(device) -> dict:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


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
    device = torch.device(device).type
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    if precision == "float32" or (precision == "auto" and not _accelerates_bfloat16(device)):
        return "float32"
    if _lstm_supports_bfloat16(device):
        return "bfloat16"
    if precision == "auto":
        return "float32"
    raise ValueError(
        f"PyTorch's LSTM does not support bfloat16 on this {device} device; "
        "use --precision float32 (or auto)"
    )


def _accelerates_bfloat16(device) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    supports = torch.cpu.get_capabilities()
    return bool(supports.get("avx512_bf16") or supports.get("amx_bf16"))


@functools.cache
def _lstm_supports_bfloat16(device) -> bool:
    """Whether a tiny LSTM runs: some CPUs have bfloat16 matrix products but no bfloat16 LSTM."""
    try:
        # The first call may be in a context without gradients, and the result is kept.
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
            inputs = torch.zeros(1, 1, 8, device=device, requires_grad=True)
            lstm = torch.nn.LSTM(8, 8, device=device)
            with torch.autocast(device, torch.bfloat16):
                lstm(inputs)[0].sum().backward()
    except RuntimeError:
        return False
    return True


def to_float64(tensor):
    """In float64, so that long sums are accurate; on the CPU if the device (MPS) has no float64."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()
