"""Building blocks of the decoders."""

import torch
from torch import nn


class Dropout(nn.Dropout):
    """Dropout with a mask of 8 random bits per element on the CPU.

    nn.Dropout draws a full random number per element there, a sixth of a bfloat16 training step.
    The probability is rounded to a multiple of 1/256, and the scale is that of the rounded one.
    """

    def forward(self, x):
        threshold = round(256 * self.p)
        if x.device.type != "cpu" or not self.training or threshold in (0, 256):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        mask = bits.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold
        return x * mask.to(x.dtype).mul_(256 / (256 - threshold))
