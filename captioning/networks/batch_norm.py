"""Batch normalization that a batch of one vector does not break."""

from torch import nn
from torch.nn import functional as F


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
