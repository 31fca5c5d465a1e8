"""Building blocks of the models."""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """Dropout with a mask of 8 random bits per element on the CPU.

    nn.Dropout generates a full-width random number per element there, which takes a sixth of the
    time of a bfloat16 training step. The probability is rounded to a multiple of 1/256, and the
    outputs are scaled by 1 / (1 - rounded probability).
    """

    def forward(self, x):
        threshold = round(256 * self.p)
        if x.device.type != "cpu" or not self.training or threshold in (0, 256):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        mask = bits.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold
        return x * mask.to(x.dtype).mul_(256 / (256 - threshold))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization over all dimensions but the last: (..., num_features), same shape.

    A single vector has no variance; it is normalized with the running statistics, also in training.
    """

    def forward(self, x):
        vectors = x.flatten(0, -2)  # (N, num_features)
        if self.training and len(vectors) == 1:
            mean, var = self.running_mean, self.running_var
            vectors = F.batch_norm(vectors, mean, var, self.weight, self.bias, eps=self.eps)
            return vectors.view_as(x)
        return super().forward(vectors).view_as(x)


@contextlib.contextmanager
def eval_mode(module):
    """Put `module` in evaluation mode without gradients; afterwards restore its mode."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
