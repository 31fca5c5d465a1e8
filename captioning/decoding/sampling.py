"""Captions whose words are drawn at random from the model's distribution."""

import torch

from captioning.base.modules import first_tensor
from captioning.base.tokens import END, PAD, START
from captioning.decoding.decoded import Decoded, word_log_probs


@torch.no_grad()
def sample(decoder, memory, max_len=20, temperature=1.0, generator=None, min_len=0) -> Decoded:
    """One sampled caption per image: each word is drawn from softmax(log-probability /
    temperature).

    decoder, memory: see `networks.decoder.Decoder`. generator: a torch.Generator, for the same
    captions again.

    The returned `log_probs` are those of the model (temperature 1), and `scores` are their sums.
    Raises ValueError if the model computes NaN.
    """
    batch, device = len(first_tensor(memory)), first_tensor(memory).device
    state = decoder.init_state(memory)
    last = torch.full((batch,), START, device=device)  # (B,)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    tokens, log_probs, attentions = [], [], []
    for t in range(max_len):
        logits, state, attention = decoder.step(last, state, memory)
        distribution = word_log_probs(logits, t >= min_len)  # (B, V)
        # Relative to the maximum, so that a temperature close to 0 does not overflow.
        relative = (distribution - distribution.amax(1, keepdim=True)) / temperature
        last = torch.multinomial(relative.softmax(-1), 1, generator=generator).squeeze(1)
        last = last.masked_fill(ended, PAD)
        chosen = distribution.gather(1, last.unsqueeze(1)).squeeze(1)
        tokens.append(last)
        log_probs.append(chosen.masked_fill(ended, 0.0))
        if attention is not None:
            attentions.append(attention.masked_fill(ended.unsqueeze(1), 0.0))
        ended = ended | (last == END)
        if ended.all():
            break
    log_probs = torch.stack(log_probs, 1)  # (B, L)
    attention = torch.stack(attentions, 1) if attentions else None  # (B, L, P)
    fields = torch.stack(tokens, 1), log_probs, ended, log_probs.sum(1), attention
    return Decoded(*(None if x is None else x.unsqueeze(1) for x in fields))
