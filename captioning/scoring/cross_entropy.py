"""Teacher forcing: the model's predictions of actual captions, and their cross-entropy."""

import torch
import torch.nn.functional as F

from captioning.base.tokens import PAD

CHUNK_SIZE = 64  # captions per call of the decoder, in batches of captions of different lengths
MAX_PADDING = 0.1  # of a batch that is not divided into chunks
# The number of predictions is rounded up to a multiple of this, because matrix products of a new
# shape are slow the first time: oneDNN and cuBLAS prepare a kernel for each.
MULTIPLE = 64


def batch_cross_entropy(model, batch, smoothing=0.0):
    """`cross_entropy` of a `data_loader.Batch`, in the model's precision."""
    with model.autocast():
        memory = model.decoder.memory(model.encode(batch.images, batch.features))
        return cross_entropy(model, memory, batch.captions, batch.image_index, smoothing)


def cross_entropy(model, memory, captions, image_index=None, smoothing=0.0):
    """{"loss": negative log-likelihood in nats, summed over the targets; "targets": their number}.

    memory: of the decoder. captions: (B, T) on the CPU. image_index: (B,), the row of `memory` that
    belongs to each caption; None: the same row. smoothing: label smoothing, of the gradient alone.
    The targets are all words and `<end>`, without `<pad>` and `<start>`.
    """
    total = count = 0
    for logits, targets, rows in predictions(model, memory, captions, image_index):
        logits = logits.float()
        options = {"reduction": "sum", "ignore_index": PAD}
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing, **options)
        if smoothing:  # the value without smoothing, the gradient with it
            loss = loss + (F.cross_entropy(logits, targets, **options) - loss).detach()
        total, count = total + loss, count + len(rows)
    return {"loss": total, "targets": total.new_tensor(count)}


def predictions(model, memory, captions, image_index=None):
    """Teacher forcing: yields logits (N', vocab_size), targets (N',), and the caption of each (N,).

    The first N of the N' predictions are those of the targets; for the others, which round N up to
    a multiple of MULTIPLE, the target is `<pad>`. Captions of different lengths are processed in
    chunks of similar length. `captions` and the last result are on the CPU, because nonzero() would
    synchronize a GPU.
    """
    lengths = captions.ne(PAD).sum(1)
    chunks = [torch.arange(len(captions))]
    if lengths.sum() < (1 - MAX_PADDING) * captions.numel():
        chunks = lengths.argsort().tensor_split(max(round(len(captions) / CHUNK_SIZE), 1))
    for rows in chunks:
        chunk = captions[rows, : lengths[rows].max()]
        targets = chunk[:, 1:].flatten()
        real = targets.ne(PAD).nonzero().squeeze(1)  # `<start>` is never a target
        index = rows if image_index is None else image_index[rows]
        more = 0, -len(real) % MULTIPLE
        parts = chunk, index, F.pad(real, more), F.pad(targets[real], more, value=PAD)
        chunk, index, kept, targets = (x.to(model.device, non_blocking=True) for x in parts)
        yield (
            model.decoder.predict(memory, chunk, index, kept),
            targets,
            rows[real // (chunk.size(1) - 1)],
        )
