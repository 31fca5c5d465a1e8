"""Decoding strategies: beam search (greedy is a beam of one) and sampling.

    decoded = beam_search(decoder, memory, beam_size=3)
    decoded.tokens         # (B, L) word indices up to and including <end>, then <pad>

Both work with any decoder that has two methods:

    init_state(memory)                   -> state, a tuple of tensors (num_layers, B, ...)
    step(tokens, state, memory)          -> logits (B, vocab_size), new state

`memory` represents the images, for example as (B, embed_size); its first dimension is the batch.
`<pad>`, `<start>` and `<unk>` are never generated: the probabilities of all other tokens are
normalized without them.
"""

from typing import NamedTuple

import torch

from vocabulary import END, PAD, START, UNK

LENGTH_PENALTY = 0.7  # between the sum (0) and the mean (1) of the log-probabilities


class Decoded(NamedTuple):
    """Generated captions; with `n_best`, each field has a dimension of that size after B."""

    tokens: torch.Tensor  # (B, L) int64, including <end>, padded with <pad>
    log_probs: torch.Tensor  # (B, L) log-probability of each token in nats, 0 for <pad>
    ended: torch.Tensor  # (B,) bool, False if <end> was not reached within max_len tokens
    scores: torch.Tensor  # (B,) sum of log_probs / length ** length_penalty


def generate(decoder, memory, beam_size=1, max_len=20, temperature=0.0, top_k=None,
             length_penalty=LENGTH_PENALTY, n_best=None, generator=None) -> Decoded:  # fmt: skip
    """Captions by `beam_search` (a beam of 1 is greedy decoding), or by `sample` if a temperature
    above 0 is given.

    Raises ValueError for options that contradict each other, or if the model computes NaN.
    """
    if not temperature >= 0:
        raise ValueError("temperature must be at least 0")
    if temperature and (beam_size > 1 or n_best):
        raise ValueError("a temperature samples words: it cannot be combined with a beam")
    if top_k is not None and not temperature:
        raise ValueError("top_k restricts sampling: it requires a temperature above 0")
    if temperature:
        return sample(decoder, memory, max_len, temperature, top_k, generator)
    return beam_search(decoder, memory, beam_size, max_len, length_penalty, n_best)


@torch.no_grad()
def beam_search(
    decoder, memory, beam_size=1, max_len=20, length_penalty=LENGTH_PENALTY, n_best=None
):
    """The most probable captions found by a beam search over all images at once.

    A beam holds the `beam_size` most probable prefixes of an image. A caption that ends leaves the
    beam; the ended captions are ranked by log-probability / length ** length_penalty (Wu et al.,
    2016, without their constants), where the length includes `<end>`. Prefixes that have not ended
    after `max_len` tokens rank below all captions that have.

    n_best: the number of captions per image (at most beam_size), best first; None: one, without
        the extra dimension. If fewer exist, the last ones are all `<pad>` with a score of -inf.

    Raises ValueError for invalid arguments, or if the model computes NaN.
    """
    if min(beam_size, max_len, n_best or 1) < 1 or (n_best or 1) > beam_size:
        raise ValueError("beam_size, max_len and n_best must be at least 1, n_best <= beam_size")
    if not length_penalty >= 0:
        raise ValueError("length_penalty must be at least 0 (0: plain log-probability)")
    n, device = n_best or 1, memory.device
    batch = len(memory)
    finished = _Beam.empty(batch, n, max_len, device)  # the best captions that have ended
    beam = _Beam.empty(batch, 1, max_len, device)
    beam.scores.zero_()
    image = torch.arange(batch, device=device)  # (A,) the images still being searched
    state = decoder.init_state(memory)
    tokens = image.new_full((batch, 1), START)  # (A, K) the last token of each prefix

    for length in range(1, max_len + 1):
        k = tokens.size(1)
        rows = image.repeat_interleave(k)  # (A*K,)
        logits, state, _ = decoder.step(tokens.flatten(), state, memory[rows])
        log_probs = mask_and_normalize(logits).view(-1, k, logits.size(1))  # (A, K, V)
        beam, tokens, parent = beam.extend(log_probs, beam_size, length)

        ended = tokens == END
        penalized = beam.scores / length**length_penalty
        finished.update(image, beam, penalized.masked_fill(~ended, -torch.inf))
        beam.scores.masked_fill_(ended, -torch.inf)

        # Scores only decrease, so that a prefix can reach at most this. When it cannot enter the
        # n best, the search for its image is over.
        upper_bound = beam.scores.max(1).values / max_len**length_penalty
        active = upper_bound > finished.scores[image, -1]
        if not active.any():
            break
        rows = torch.arange(len(image), device=device).unsqueeze(1) * k + parent  # (A, K)
        state = tuple(s.index_select(1, rows[active].flatten()) for s in state)
        image, tokens, beam = image[active], tokens[active], beam.select(active)
    return finished.fill(image, beam, length_penalty).result(squeeze=n_best is None)


@torch.no_grad()
def sample(decoder, memory, max_len=20, temperature=1.0, top_k=None, generator=None):
    """Sampled captions: each word is sampled from softmax(log-probability / temperature).

    top_k: sample from the `top_k` most probable words only.

    The returned `log_probs` are those of the model (temperature 1), and `scores` are their sums.

    Raises ValueError for invalid arguments, or if the model computes NaN.
    """
    if max_len < 1 or not temperature > 0 or (top_k is not None and top_k < 1):
        raise ValueError("max_len and top_k must be at least 1, temperature greater than 0")
    batch, device = len(memory), memory.device
    state = decoder.init_state(memory)
    last = torch.full((batch,), START, device=device)  # (B,)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    tokens, log_probs = [], []
    for _ in range(max_len):
        logits, state, _ = decoder.step(last, state, memory)
        distribution = mask_and_normalize(logits)  # (B, V)
        last = _sample_words(distribution, temperature, top_k, generator).masked_fill(ended, PAD)
        chosen = distribution.gather(1, last.unsqueeze(1)).squeeze(1)
        tokens.append(last)
        log_probs.append(chosen.masked_fill(ended, 0.0))
        ended = ended | (last == END)
        if ended.all():
            break
    log_probs = torch.stack(log_probs, 1)  # (B, L)
    return Decoded(torch.stack(tokens, 1), log_probs, ended, log_probs.sum(1))


def mask_and_normalize(logits):
    """Log-probabilities of the words that may be generated: (B, V) -> (B, V), float32."""
    logits = logits.float()
    logits[:, [PAD, START, UNK]] = -torch.inf
    log_probs = logits.log_softmax(-1)
    if log_probs[:, END].isnan().any():  # softmax propagates a NaN to all words
        raise ValueError("the model computes NaN: its weights or the features are damaged")
    return log_probs


def _sample_words(log_probs, temperature, top_k, generator):
    """Sample one word index per row of log-probabilities: (B, V) -> (B,)."""
    # Relative to the maximum, so that a temperature close to 0 does not overflow.
    logits = (log_probs - log_probs.max(1, keepdim=True).values) / temperature
    if top_k is not None and top_k < logits.size(1):
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


class _Beam(NamedTuple):
    """K token sequences for each of B images."""

    tokens: torch.Tensor  # (B, K, max_len)
    log_probs: torch.Tensor  # (B, K, max_len)
    scores: torch.Tensor  # (B, K), -inf for an unused entry
    ended: torch.Tensor  # (B, K)

    @classmethod
    def empty(cls, batch, k, max_len, device):
        return cls(
            torch.full((batch, k, max_len), PAD, device=device),
            torch.zeros(batch, k, max_len, device=device),
            torch.full((batch, k), -torch.inf, device=device),
            torch.zeros(batch, k, dtype=torch.bool, device=device),
        )

    def select(self, rows):
        return _Beam(*(field[rows] for field in self))

    def extend(self, log_probs, beam_size, length):
        """The beam_size best continuations: new beam, last tokens (B, K), parents (B, K)."""
        k, vocab_size = log_probs.shape[1:]
        total = (self.scores.unsqueeze(2) + log_probs).flatten(1)  # (B, K*V)
        scores, index = total.topk(min(beam_size, k * vocab_size))
        parent, last = index // vocab_size, index % vocab_size
        rows = parent.unsqueeze(2)
        tokens = self.tokens.take_along_dim(rows, 1)
        history = self.log_probs.take_along_dim(rows, 1)
        tokens[:, :, length - 1] = last
        history[:, :, length - 1] = log_probs.flatten(1).gather(1, index)
        return _Beam(tokens, history, scores, last == END), last, parent

    def update(self, image, beam, scores):
        """Merge with the sequences of `beam`, scored by `scores`, and keep the N best, in order."""
        both = [torch.cat([a[image], b], 1) for a, b in zip(self, beam, strict=True)]
        both[2] = torch.cat([self.scores[image], scores], 1)
        best = both[2].topk(self.scores.size(1)).indices  # (A, N)
        for field, candidates in zip(self, both, strict=True):
            shape = best.shape + (1,) * (candidates.dim() - 2)
            field[image] = candidates.take_along_dim(best.view(shape), 1)

    def fill(self, image, beam, length_penalty):
        """Fill unused entries with the best prefixes that have not ended."""
        max_len = self.tokens.size(2)
        missing = self.scores[image] == -torch.inf  # (A, N)
        order = beam.scores.argsort(1, descending=True)[:, : missing.size(1)]
        rank = (missing.cumsum(1) - 1).clamp(0, order.size(1) - 1)  # i-th best for the i-th entry
        choice = order.gather(1, rank)
        usable = missing & (beam.scores.gather(1, choice) > -torch.inf)
        a, slot = usable.nonzero(as_tuple=True)
        source = choice[a, slot]
        for field, candidates in zip(self, beam, strict=True):
            field[image[a], slot] = candidates[a, source]
        self.scores[image[a], slot] /= max_len**length_penalty
        return self

    def result(self, squeeze):
        """Convert to `Decoded`, truncated to the longest caption; squeeze: without dimension K."""
        unused = self.scores == -torch.inf
        tokens = self.tokens.masked_fill(unused.unsqueeze(2), PAD)
        longest = int((tokens != PAD).sum(2).max()) if tokens.numel() else 0
        tokens, log_probs = tokens[:, :, :longest], self.log_probs[:, :, :longest]
        log_probs = log_probs.masked_fill(tokens == PAD, 0.0)
        fields = tokens, log_probs, self.ended & ~unused, self.scores
        return Decoded(*(field[:, 0] if squeeze else field for field in fields))
