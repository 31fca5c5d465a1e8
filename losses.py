"""The training loss: teacher-forced cross-entropy.

nll, tokens = TeacherForcing(model)(images, captions, lengths)
"""

import torch.nn.functional as F
from torch import nn

from vocabulary import PAD


class TeacherForcing(nn.Module):
    """Negative log-likelihood of a batch of captions, given images and the preceding words.

    A module, so that DistributedDataParallel can wrap it. Computes in the model's precision.
    """

    def __init__(self, model, precomputed=False):
        """precomputed: batches contain features (B, P, C) instead of images (B, 3, H, W)."""
        super().__init__()
        self.model, self.precomputed = model, precomputed

    def forward(self, images, captions, lengths=None, image_index=None):
        """The negative log-likelihood in nats, summed over the batch, and the number of targets.

        captions: (B, T) on the CPU, as a loader returns them. The targets are all words and
        `<end>`; the vocabulary projection and the loss are computed for these alone, not for
        padding. image_index: (B,), the row of `images` that belongs to each caption; None: the same
        row. `lengths` is accepted so that a batch of a loader can be passed as it is, and not used.
        """
        device = self.model.device
        positions, targets = real_targets(captions)  # on the CPU: nonzero() would synchronize a GPU
        positions, targets = (x.to(device, non_blocking=True) for x in (positions, targets))
        images, captions = (x.to(device, non_blocking=True) for x in (images, captions))
        with self.model.autocast():
            features = self.model.encode(images, self.precomputed)
            if image_index is not None:
                features = features.index_select(0, image_index.to(device, non_blocking=True))
            logits = self.model.decoder(features, captions, positions).float()  # (N, vocab_size)
            nll = F.cross_entropy(logits, targets, reduction="sum")
        return nll, nll.new_tensor(len(targets))


def real_targets(captions):
    """(B, T) -> (positions (N,) among the B * (T-1) predictions, the targets (N,) there).

    `<start>` is never a target and `<pad>` is left out.
    """
    targets = captions[:, 1:].flatten()
    positions = targets.ne(PAD).nonzero().squeeze(1)
    return positions, targets[positions]
