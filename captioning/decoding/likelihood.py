"""The probability that a decoder gives to captions that it has not generated."""

import torch
from torch.nn.utils.rnn import pad_sequence

from captioning.base.modules import first_tensor
from captioning.base.tokens import PAD

PAIRS = 256  # of an image and a caption, computed at once


@torch.no_grad()
def log_probabilities(decoder, features, captions):
    """log p(caption | image) in nats, summed over the words and `<end>`: (N, M).

    features: of N images, as `decoder.memory` takes them. captions: M lists of word indices with
    `<start>` and `<end>`. The result is on the CPU.
    """
    memory = decoder.memory(features)
    images, device = len(first_tensor(memory)), first_tensor(memory).device
    result = torch.zeros(images, len(captions))
    # Pairs of captions of similar length, so that they need little padding.
    order = sorted(range(len(captions)), key=lambda column: len(captions[column]))
    pairs = torch.cartesian_prod(torch.tensor(order), torch.arange(images))
    for columns, rows in (part.T for part in pairs.split(PAIRS)):
        ids = [torch.tensor(captions[column]) for column in columns.tolist()]
        ids = pad_sequence(ids, batch_first=True, padding_value=PAD).to(device)  # (B, T)
        logits = decoder.predict(memory, ids, rows.to(device))  # (B, T-1, vocab_size)
        targets = ids[:, 1:].unsqueeze(2)
        chosen = logits.float().log_softmax(-1).gather(2, targets).masked_fill(targets == PAD, 0.0)
        result[rows, columns] = chosen.sum((1, 2)).cpu()
    return result
