"""A pretended GPU: everything is computed on the CPU, but mixing of devices is an error.

    with pretend_cuda():
        model.to("cuda")                   # model.device is cuda:0
        model(images, captions)            # RuntimeError: the images are on the CPU

A tensor is on the GPU if its memory is marked so: by a function with `device="cuda"`, by `to` and
`cuda`, which copy, and by any function with an argument on the GPU. As with a real GPU, arguments
on both devices raise RuntimeError, a generator of random numbers included. Exceptions are CPU
tensors without dimensions, unless in `cat` and `stack`; CPU indices in brackets; and `copy_`.

Limits: only functions of torch that are called from Python are seen. One that is written in Python,
such as `F.cross_entropy`, is checked at its arguments; the backward pass is not checked.
`x[..] = values` is stricter than with a GPU, which can copy them into a slice. Precision "auto" is
float32. `torch.cuda.is_available()` does not change, and `torch.load` has no GPU to load to. After
the context all tensors are ordinary CPU tensors.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


@contextlib.contextmanager
def pretend_cuda():
    """Within this context the device "cuda" exists."""
    cuda = {
        "set_device": lambda device: None,
        "is_bf16_supported": lambda including_emulation=True: False,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
    }
    with (
        _PretendedDevices(),
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch("torch.Generator", _Generator),
        torch.backends.cudnn.flags(enabled=False),  # nn.LSTM would call it
    ):
        yield


def device_of(tensor) -> torch.device:
    return getattr(tensor.untyped_storage(), "pretended_device", CPU)


def _mark(tensor, device):
    if tensor is not None:
        tensor.untyped_storage().pretended_device = device
    return tensor


def _device(name) -> torch.device:
    device = torch.device(name)
    return torch.device(device.type, device.index or 0) if device.type != "cpu" else CPU


def _tensors(nested) -> list:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(nested, dict):
        nested = tuple(nested.values())
    if isinstance(nested, (tuple, list)):
        return [x for item in nested for x in _tensors(item)]
    return [nested] if isinstance(nested, Tensor) else []


def _check(function, devices):
    if len(devices) > 1:
        found, name = " and ".join(sorted(map(str, devices))), getattr(function, "__name__", "")
        raise RuntimeError(f"{name} expects all tensors to be on the same device, not {found}")


class _Generator(torch.Generator):
    device = CPU

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.device = _device(device)
        return generator


class _PretendedDevices(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return SPECIAL.get(func, _call)(func, *args, **(kwargs or {}))


def _call(func, *args, **kwargs):
    """Call a function whose result is on the device of its arguments, or on `device=`."""
    inputs = _tensors((args, kwargs))
    numbers = [] if func in (torch.cat, torch.stack) else [CPU]  # tensors without dimensions
    devices = {device_of(x) for x in inputs if x.dim() or device_of(x) not in numbers}
    if kwargs.get("generator"):
        devices.add(kwargs["generator"].device)
    if kwargs.get("device"):  # of the result
        devices, kwargs["device"] = {_device(kwargs["device"])}, CPU
    _check(func, devices)
    result = func(*args, **kwargs)
    for output in _tensors(result):
        if all(output.untyped_storage() is not x.untyped_storage() for x in inputs):
            _mark(output, *(devices or {CPU}))
        elif kwargs.get("device"):  # as_tensor
            return _to(func, output, *devices)
        else:  # it may be a CPU tensor without dimensions that was changed in place
            _check(func, devices | {device_of(output)})
    return result


def _to(func, tensor, *args, copy=False, **kwargs):
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    old = new = device_of(tensor)
    if device:  # for `to(other)`, it is that of the memory
        new = next(map(device_of, _tensors((args, kwargs))), _device(device))
    options = {"memory_format": memory_format} if memory_format else {}
    return _mark(tensor.to(dtype or tensor.dtype, copy=copy or new != old, **options), new)


def _to_numpy(func, tensor, *args, **kwargs):
    if device_of(tensor) != CPU:
        raise TypeError(f"a tensor on {device_of(tensor)} has no numpy array: use .cpu() first")
    return func(tensor, *args, **kwargs)


def _index(func, tensor, index, value=None):
    others = {device_of(x) for x in _tensors((index,))} - {CPU}
    others |= {device_of(x) for x in _tensors((value,)) if x.dim() or device_of(x) != CPU}
    _check(func, others | {device_of(tensor)})
    values = () if func is Tensor.__getitem__ else (value,)
    return _mark(func(tensor, index, *values), device_of(tensor))


SPECIAL = {
    Tensor.device.__get__: lambda func, tensor: device_of(tensor),
    Tensor.is_cuda.__get__: lambda func, tensor: device_of(tensor).type == "cuda",
    Tensor.grad.__get__: lambda func, tensor: _mark(func(tensor), device_of(tensor)),
    # Its memo contains everything that has been copied.
    Tensor.__deepcopy__: lambda func, tensor, memo: _mark(func(tensor, memo), device_of(tensor)),
    Tensor.to: _to,
    Tensor.cpu: lambda func, tensor, **kwargs: _to(func, tensor, "cpu"),
    Tensor.cuda: lambda func, tensor, device="cuda", **kwargs: _to(func, tensor, device),
    Tensor.numpy: _to_numpy,
    Tensor.__array__: _to_numpy,
    Tensor.__getitem__: _index,
    Tensor.__setitem__: _index,
    Tensor.copy_: lambda func, *args, **kwargs: func(*args, **kwargs),
    # What nn.Module.to calls:
    Tensor.data.__set__: lambda func, *args: func(*args),
    torch._has_compatible_shallow_copy_type: lambda func, *args: func(*args),
}
