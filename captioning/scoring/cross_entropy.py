"""Teacher forcing: the model's predictions of actual captions, and their cross-entropy."""

import torch
import torch.nn.functional as F

from captioning.base.tokens import PAD

CHUNK_SIZE = 64  # captions per call of the decoder, in batches of captions of different lengths
MAX_PADDING = 0.1  # of a batch that is not divided into chunks


def cross_entropy(model, memory, captions, image_index=None, smoothing=0.0):
    """{"loss": negative log-likelihood in nats, summed over the targets; "targets": their number}.

    memory: of the decoder. captions: (B, T) on the CPU. image_index: (B,), the row of `memory` that
    belongs to each caption; None: the same row. smoothing: label smoothing, of the gradient alone.
    The targets are all words and `<end>`, without `<pad>` and `<start>`.
    """
    total = count = 0
    for logits, targets, _ in predictions(model, memory, captions, image_index):
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        if smoothing:  # the value without smoothing, the gradient with it
            loss = loss + (F.cross_entropy(logits, targets, reduction="sum") - loss).detach()
        total, count = total + loss, count + len(targets)
    return {"loss": total, "targets": total.new_tensor(count)}


def predictions(model, memory, captions, image_index=None):
    """Teacher forcing: yields (logits (N, vocab_size), targets (N,), the caption (N,) of each).

    Captions of different lengths are processed in chunks of similar length. `captions` and the last
    result are on the CPU, because nonzero() would synchronize a GPU.
    """
    lengths = captions.ne(PAD).sum(1)
    chunks = [torch.arange(len(captions))]
    if lengths.sum() < (1 - MAX_PADDING) * captions.numel():
        chunks = lengths.argsort().split(CHUNK_SIZE)
    for rows in chunks:
        chunk = captions[rows, : lengths[rows].max()]
        targets = chunk[:, 1:].flatten()
        real = targets.ne(PAD).nonzero().squeeze(1)  # `<start>` is never a target
        index = rows if image_index is None else image_index[rows]
        parts = chunk, index, real, targets[real]
        chunk, index, kept, targets = (x.to(model.device, non_blocking=True) for x in parts)
        yield (
            model.decoder.predict(memory, chunk, index, kept),
            targets,
            rows[real // (chunk.size(1) - 1)],
        )
