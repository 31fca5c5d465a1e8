"""Helpers for modules and nested tensors."""

import contextlib

import torch


@contextlib.contextmanager
def eval_mode(module):
    """Put `module` in evaluation mode without gradients; afterwards restore the mode of its parts.

    Part by part, because a frozen part may be in evaluation mode while the rest is trained.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def select(tensors, rows, dim=0):
    """`index_select` of a tensor, or of each tensor in a nested tuple. rows None: all of them."""
    if rows is None:
        return tensors
    if isinstance(tensors, tuple):
        return tuple(select(x, rows, dim) for x in tensors)
    return tensors.index_select(dim, rows)


def first_tensor(tensors):
    """The first tensor of a nested tuple."""
    return first_tensor(tensors[0]) if isinstance(tensors, tuple) else tensors
