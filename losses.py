"""The training loss: teacher-forced cross-entropy.

nll, tokens = TeacherForcing(model)(images, captions, lengths)
"""

import torch.nn.functional as F
from torch import nn

from vocabulary import PAD

CHUNK_SIZE = 64  # captions per call of the decoder, in batches that are grouped by image


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
        row. With it, a batch contains captions of all lengths: after the images have been encoded,
        each once, it is processed in chunks of captions of similar length.
        lengths: (B,) of the captions; None: counted.
        """
        device = self.model.device
        chunks = [slice(None)]
        if lengths is None:
            lengths = captions.ne(PAD).sum(1)
        if image_index is not None:
            chunks = lengths.argsort().split(CHUNK_SIZE)
            image_index = image_index.to(device, non_blocking=True)
        with self.model.autocast():
            memory = self.model.encode(images.to(device, non_blocking=True), self.precomputed)
            results = [
                self.nll(memory, captions[rows, : lengths[rows].max()],
                         None if image_index is None else image_index[rows.to(device)])
                for rows in chunks
            ]  # fmt: skip
        nll, tokens = map(sum, zip(*results, strict=True))
        return nll, nll.new_tensor(tokens)

    def nll(self, memory, captions, image_index):
        """(negative log-likelihood, number of targets) of captions (B, T)."""
        device = memory.device
        positions, targets = real_targets(captions)  # on the CPU: nonzero() would synchronize a GPU
        positions, targets, captions = (
            x.to(device, non_blocking=True) for x in (positions, targets, captions)
        )
        logits = self.model.decoder(memory, captions, positions, image_index)  # (N, vocab_size)
        return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


def real_targets(captions):
    """(B, T) -> (positions (N,) among the B * (T-1) predictions, the targets (N,) there).

    `<start>` is never a target and `<pad>` is left out.
    """
    targets = captions[:, 1:].flatten()
    positions = targets.ne(PAD).nonzero().squeeze(1)
    return positions, targets[positions]
