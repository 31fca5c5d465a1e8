"""What training, validation and captioning do with one batch or one split.

    nll, tokens = caption_nll(model, images, captions)      # teacher forcing
    nll, tokens = evaluate(model, val_loader)               # the same, summed over a split
    captions = caption_split(model, test_loader)            # free-running
    metrics = score(model, val_loader, training_captions)   # all there is to report

Wherever `images` are asked for, pooled CNN features (B, feature_size) do as well.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from data_loader import get_loader
from distributed import all_sum, exact, gather, interleave, rank_and_world
from metrics import caption_scores, diagnostics, perplexity, unk_rate
from vocabulary import PAD, TOKENIZER, tokenize


def caption_nll(model, images, captions):
    """Teacher forcing: the negative log-likelihood of a batch, summed, and its number of targets.

    images: (B, 3, H, W), or pooled features (B, feature_size). captions: (B, T), on the CPU.
    The last layer and the loss see real targets only, every word and `<end>`, no padding.
    """
    device = model.decoder.linear.weight.device
    real = captions[:, 1:].flatten().ne(PAD).nonzero().squeeze(1)  # found on the CPU: no GPU wait
    targets = captions[:, 1:].flatten()[real].to(device, non_blocking=True)
    images, captions = (x.to(device, non_blocking=True) for x in (images, captions))
    hidden = model.decoder.hidden(model.encoder(images), captions)  # (B, T-1, hidden_size)
    hidden = hidden.flatten(0, 1).index_select(0, real.to(device, non_blocking=True))
    logits = model.decoder.linear(hidden).float()  # (targets, vocab_size)
    return F.cross_entropy(logits, targets, reduction="sum"), len(real)


class TeacherForcing(nn.Module):
    """`caption_nll` as a module, since that is what DistributedDataParallel can wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, captions):
        nll, tokens = caption_nll(self.model, images, captions)
        return nll, nll.new_tensor(tokens)


@torch.no_grad()
def evaluate(model, loader) -> tuple[float, int]:
    """(total negative log-likelihood in nats, number of real targets) over a whole split.

    Of several processes, each looks at the batches of its own loader, and all get the sums.
    """
    total, count = 0.0, 0
    with in_eval_mode(model):
        for images, captions, _ in loader:
            nll, tokens = caption_nll(model, images, captions)
            total, count = total + exact(nll), count + tokens
    total, count = all_sum(torch.as_tensor([total, count], dtype=torch.float64)).tolist()
    return total, int(count)


def caption_split(model, loader, beam_size=3, max_len=20, **sampling) -> list[str]:
    """A free-running caption for every image of a `get_loader(..., mode="test")`, in order."""
    device = model.decoder.linear.weight.device
    captions = []
    with in_eval_mode(model), torch.no_grad():
        for images, _ in loader:
            features = model.encoder(images.to(device))
            ids = model.decoder.sample(features, beam_size, max_len, **sampling)
            captions += map(model.text, ids)
    return captions


@contextlib.contextmanager
def in_eval_mode(model):
    """Without dropout, and with BatchNorm as it was trained; afterwards the mode is as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def score(model, val_loader, training_captions, beam_size=3) -> dict:
    """All there is to report of a split: perplexity, scores of free-running captions, diagnostics.

    `val_loader` is a `get_loader(..., mode="val")`, whose images are captioned too. Of several
    processes, each captions its share, and all get the scores.
    """
    dataset, (rank, world) = val_loader.dataset, rank_and_world()
    data = dataset.data
    loader = get_loader(data, transform=dataset.transform, features=dataset.features, mode="test",
                        rank=rank, world=world)  # fmt: skip
    candidates = interleave(gather(caption_split(model, loader, beam_size)))
    nll, tokens = evaluate(model, val_loader)
    references = [text for texts in data.captions for text in texts]
    scores, _ = caption_scores(candidates, data.captions, tokenize, TOKENIZER)
    return {
        "images": len(data), "beam_size": beam_size, "perplexity": perplexity(nll, tokens),
        "unk_rate": unk_rate(references, set(model.words), tokenize), **scores,
        **diagnostics(candidates, training_captions, model.words, tokenize),
    }  # fmt: skip
