"""Decoding strategies: beam search (greedy is a beam of one), diverse beam search, and sampling.

    decoded = beam_search(decoder, memory, beam_size=3)
    decoded.tokens         # (B, L) word indices up to and including <end>, then <pad>

All work with any decoder that has two methods:

    init_state(memory)             -> state, a (nested) tuple of tensors (num_layers, B, ...)
    step(tokens, state, memory)    -> logits (B, vocab_size), new state, attention (B, P) or None

`memory` represents the images, for example as (B, embed_size); its first dimension is the batch.
`<pad>`, `<start>` and `<unk>` are never generated: the probabilities of all other tokens are
normalized without them.
"""

from typing import NamedTuple

import torch

from captioning.base.tokens import END, PAD, START, UNK

LENGTH_PENALTY = 0.7  # between the sum (0) and the mean (1) of the log-probabilities


class Decoded(NamedTuple):
    """Generated captions; with `n_best`, each field has a dimension of that size after B."""

    tokens: torch.Tensor  # (B, L) int64, including <end>, padded with <pad>
    log_probs: torch.Tensor  # (B, L) log-probability of each token in nats, 0 for <pad>
    ended: torch.Tensor  # (B,) bool, False if <end> was not reached within max_len tokens
    scores: torch.Tensor  # (B,) sum of log_probs / length ** length_penalty
    attention: torch.Tensor | None  # (B, L, P) with which each token was predicted; None without


def generate(
    decoder,
    memory,
    beam_size=1,
    max_len=20,
    temperature=0.0,
    top_k=None,
    length_penalty=LENGTH_PENALTY,
    n_best=None,
    groups=1,
    diversity=0.5,
    constraint=None,
    generator=None,
) -> Decoded:
    """Captions by `beam_search` (a beam of 1 is greedy decoding), or by `sample` if a temperature
    above 0 is given.

    Raises ValueError for options that contradict each other, or if the model computes NaN.
    """
    if not (temperature == 0 or 1e-40 <= temperature <= 1e30):  # as a float32, finite and not 0
        raise ValueError("temperature must be 0 (no sampling), or between 1e-40 and 1e30")
    if temperature and (beam_size > 1 or n_best or groups > 1):
        raise ValueError("a temperature samples words: it cannot be combined with a beam")
    if top_k is not None and not temperature:
        raise ValueError("top_k restricts sampling: it requires a temperature above 0")
    if temperature:
        return sample(decoder, memory, max_len, temperature, top_k, constraint, generator)
    return beam_search(
        decoder, memory, beam_size, max_len, length_penalty, n_best, groups, diversity, constraint
    )


@torch.no_grad()
def beam_search(
    decoder,
    memory,
    beam_size=1,
    max_len=20,
    length_penalty=LENGTH_PENALTY,
    n_best=None,
    groups=1,
    diversity=0.5,
    constraint=None,
) -> Decoded:
    """The most probable captions found by a beam search over all images at once.

    A beam holds the `beam_size` most probable prefixes of an image. A caption that ends leaves the
    beam; the ended captions are ranked by log-probability / length ** length_penalty (Wu et al.,
    2016, without their constants), where the length includes `<end>`. Prefixes that have not ended
    after `max_len` tokens rank below all captions that have.

    n_best: the number of captions per image (at most beam_size), best first; None: one, without
        the extra dimension. If fewer exist, the last ones are all `<pad>` with a score of -inf.
    groups: divide the beam into so many groups, searched one after the other in each step (diverse
        beam search, Vijayakumar et al., 2016, arXiv:1610.02424): a word is chosen as if its
        log-probability were lower by `diversity` times the number of prefixes to which the earlier
        groups that are still searching have just added it. Scores stay those of the model. Each
        group contributes ceil(n_best / groups) captions; the n_best best that differ are returned.
    constraint: (N, t) tokens so far -> (N, vocab_size) bool, True for tokens that may not follow;
        see constraints.py. The probabilities of the other tokens stay as they are.

    Raises ValueError for invalid arguments, or if the model computes NaN.
    """
    if min(beam_size, max_len, n_best or 1) < 1 or (n_best or 1) > beam_size:
        raise ValueError("beam_size, max_len and n_best must be at least 1, n_best <= beam_size")
    if not length_penalty >= 0:
        raise ValueError("length_penalty must be at least 0 (0: plain log-probability)")
    if groups < 1 or beam_size % groups or not 0 <= diversity < torch.inf:
        raise ValueError("groups must divide beam_size, diversity be finite and at least 0")
    batch, device = _batch_size_and_device(memory)
    search = torch.arange(batch * groups, device=device)  # (A,) the searches in progress:
    # search s is that of group s % groups for image s // groups
    width, n = beam_size // groups, -(-(n_best or 1) // groups)
    beam = _Beam.empty(len(search), 1, max_len, device)
    beam.scores.zero_()
    finished = _Beam.empty(len(search), n, max_len, device)  # the best captions that have ended
    tokens = search.new_full((len(search), 1), START)  # (A, K) the last token of each prefix
    images = memory if groups == 1 else _select(memory, search // groups, 0)  # of each prefix
    state = decoder.init_state(images)
    for length in range(1, max_len + 1):
        k = tokens.size(1)
        logits, state, attention = decoder.step(tokens.flatten(), state, images)
        log_probs = mask_and_normalize(logits)  # (A*K, V)
        if constraint is not None:
            banned = constraint(beam.tokens[:, :, : length - 1].flatten(0, 1))
            log_probs = log_probs.masked_fill(banned, -torch.inf)
        log_probs = log_probs.view(-1, k, logits.size(1))  # (A, K, V)
        choice = _choose(beam.scores, log_probs, width, search, batch, groups, diversity)
        beam = beam.extend(log_probs, choice, length, attention)
        tokens, parent = beam.tokens[:, :, length - 1], choice // logits.size(1)
        if length == 1 and attention is not None:
            shape = (*finished.tokens.shape, attention.size(1))
            finished = finished._replace(attention=attention.new_zeros(shape))

        ended = tokens == END
        penalized = beam.scores / length**length_penalty
        finished.update(search, beam, penalized.masked_fill(~ended, -torch.inf))
        beam.scores.masked_fill_(ended, -torch.inf)

        # Scores only decrease, so that a prefix can reach at most this. When it cannot enter the
        # n best, the search is over.
        upper_bound = beam.scores.max(1).values / max_len**length_penalty
        active = upper_bound > finished.scores[search, -1]
        if not active.any():
            break
        rows = torch.arange(len(search), device=device).unsqueeze(1) * k + parent  # (A, K)
        state = _select(state, rows[active].flatten(), 1)
        if k != tokens.size(1) or not active.all():  # otherwise each prefix keeps its image
            images = _select(images, rows[active].flatten(), 0)
        search, tokens, beam = search[active], tokens[active], beam.select(active)
    finished = finished.fill(search, beam, length_penalty)
    return finished.result(groups, n_best)


@torch.no_grad()
def sample(
    decoder, memory, max_len=20, temperature=1.0, top_k=None, constraint=None, generator=None
) -> Decoded:
    """Sampled captions: each word is sampled from softmax(log-probability / temperature).

    top_k: sample from the `top_k` most probable words only. constraint: as in `beam_search`.

    The returned `log_probs` are those of the model (temperature 1), and `scores` are their sums.

    Raises ValueError for invalid arguments, if the model computes NaN, or if all tokens are banned.
    """
    if max_len < 1 or not temperature > 0 or (top_k is not None and top_k < 1):
        raise ValueError("max_len and top_k must be at least 1, temperature greater than 0")
    batch, device = _batch_size_and_device(memory)
    state = decoder.init_state(memory)
    last = torch.full((batch,), START, device=device)  # (B,)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    tokens, log_probs, attentions = [], [], []
    for _ in range(max_len):
        logits, state, attention = decoder.step(last, state, memory)
        distribution = allowed = mask_and_normalize(logits)  # (B, V)
        if constraint is not None:
            so_far = torch.stack(tokens, 1) if tokens else last.new_zeros(batch, 0)
            banned = constraint(so_far) & ~ended.unsqueeze(1)
            allowed = distribution.masked_fill(banned, -torch.inf)
            if (allowed.amax(1) == -torch.inf).any():
                raise ValueError("the constraint bans all tokens at once")
        last = _sample_words(allowed, temperature, top_k, generator).masked_fill(ended, PAD)
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
    return Decoded(torch.stack(tokens, 1), log_probs, ended, log_probs.sum(1), attention)


def _batch_size_and_device(memory):
    while isinstance(memory, tuple):
        memory = memory[0]
    return len(memory), memory.device


def _select(tensors, rows, dim):
    """`index_select` of a tensor, or of each tensor in a nested tuple."""
    if isinstance(tensors, tuple):
        return tuple(_select(x, rows, dim) for x in tensors)
    return tensors.index_select(dim, rows)


def _choose(scores, log_probs, width, search, batch, groups, diversity):
    """The best continuations of each search: indices (A, width) into the K * V candidates.

    scores: (A, K) of the prefixes; log_probs: (A, K, V) of their next words.
    """
    k, vocab_size = log_probs.shape[1:]
    total = scores.unsqueeze(2) + log_probs  # (A, K, V)
    width = min(width, k * vocab_size)
    if groups == 1:
        return total.flatten(1).topk(width).indices
    image, counts = search // groups, log_probs.new_zeros(batch, vocab_size)
    choice = search.new_zeros(len(search), width)
    for group in range(groups):
        rows = (search % groups == group).nonzero().squeeze(1)
        penalty = diversity * counts[image[rows]].unsqueeze(1)  # (rows, 1, V)
        best = (total[rows] - penalty).flatten(1).topk(width)
        choice[rows] = best.indices
        chosen = best.indices % vocab_size
        index = (image[rows].unsqueeze(1).expand_as(chosen), chosen)
        counts.index_put_(index, best.values.isfinite().float(), accumulate=True)
    return choice


def mask_and_normalize(logits):
    """Log-probabilities of the words that may be generated: (B, V) -> (B, V), float32."""
    logits = logits.to(torch.float32, copy=True)
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
    """K token sequences for each of A searches."""

    tokens: torch.Tensor  # (A, K, max_len)
    log_probs: torch.Tensor  # (A, K, max_len)
    scores: torch.Tensor  # (A, K), -inf for an unused entry
    ended: torch.Tensor  # (A, K)
    attention: torch.Tensor | None = None  # (A, K, max_len, P)

    @classmethod
    def empty(cls, searches, k, max_len, device):
        return cls(
            torch.full((searches, k, max_len), PAD, device=device),
            torch.zeros(searches, k, max_len, device=device),
            torch.full((searches, k), -torch.inf, device=device),
            torch.zeros(searches, k, dtype=torch.bool, device=device),
        )

    def select(self, rows):
        return _Beam(*(None if field is None else field[rows] for field in self))

    def take(self, index):
        """The sequences `index` (A, N) of each search."""
        rows = torch.arange(len(index), device=index.device).unsqueeze(1)
        return _Beam(*(None if field is None else field[rows, index] for field in self))

    def extend(self, log_probs, choice, length, attention=None):
        """The continuations `choice` (A, N) of the K * V candidates with `log_probs` (A, K, V)."""
        k, vocab_size = log_probs.shape[1:]
        parent, last = choice // vocab_size, choice % vocab_size
        chosen = log_probs.flatten(1).gather(1, choice)
        beam = self.take(parent)
        beam.tokens[:, :, length - 1] = last
        beam.log_probs[:, :, length - 1] = chosen
        beam = beam._replace(scores=beam.scores + chosen, ended=last == END)
        if attention is None:
            return beam
        attention = attention.unflatten(0, (-1, k)).take_along_dim(parent.unsqueeze(2), 1)
        history = beam.attention
        if history is None:
            history = attention.new_zeros(*beam.tokens.shape, attention.size(2))
        history[:, :, length - 1] = attention
        return beam._replace(attention=history)

    def update(self, search, beam, scores):
        """Merge with the sequences of `beam`, scored by `scores`, and keep the N best, in order."""
        both = zip(self.select(search), beam._replace(scores=scores), strict=True)
        both = _Beam(*(None if old is None else torch.cat([old, new], 1) for old, new in both))
        best = both.take(both.scores.topk(self.scores.size(1)).indices)
        for field, values in zip(self, best, strict=True):
            if field is not None:
                field[search] = values

    def fill(self, search, beam, length_penalty):
        """Fill unused entries with the best prefixes that have not ended."""
        max_len = self.tokens.size(2)
        missing = self.scores[search] == -torch.inf  # (A, N)
        order = beam.scores.argsort(1, descending=True)[:, : missing.size(1)]
        rank = (missing.cumsum(1) - 1).clamp(0, order.size(1) - 1)  # i-th best for the i-th entry
        choice = order.gather(1, rank)
        usable = missing & (beam.scores.gather(1, choice) > -torch.inf)
        a, slot = usable.nonzero(as_tuple=True)
        source = choice[a, slot]
        for field, candidates in zip(self, beam, strict=True):
            if field is not None:
                field[search[a], slot] = candidates[a, source]
        self.scores[search[a], slot] /= max_len**length_penalty
        return self

    def result(self, groups, n_best):
        """Convert to `Decoded`: the best captions of each image, without padding common to all."""
        beam = self
        if groups > 1:  # of the searches of an image, (B, groups * N)
            beam = _Beam(
                *(None if x is None else x.unflatten(0, (-1, groups)).flatten(1, 2) for x in self)
            )
            # A caption that several groups have found counts once.
            same = (beam.tokens.unsqueeze(1) == beam.tokens.unsqueeze(2)).all(3)
            repeated = (same & (beam.scores > -torch.inf).unsqueeze(1)).tril(-1).any(2)
            beam.scores[repeated], beam.ended[repeated] = -torch.inf, False
            order = beam.scores.argsort(1, descending=True)
            ended_first = beam.ended.gather(1, order).to(torch.uint8)
            ended_first = ended_first.sort(stable=True, dim=1, descending=True).indices
            beam = beam.take(order.gather(1, ended_first)[:, : n_best or 1])
        unused = beam.scores == -torch.inf
        tokens = beam.tokens.masked_fill(unused.unsqueeze(2), PAD)
        longest = int((tokens != PAD).sum(2).max()) if tokens.numel() else 0
        tokens, log_probs = tokens[:, :, :longest], beam.log_probs[:, :, :longest]
        padding, attention = tokens == PAD, beam.attention
        if attention is not None:
            attention = attention[:, :, :longest].masked_fill(padding.unsqueeze(3), 0.0)
        log_probs, ended = log_probs.masked_fill(padding, 0.0), beam.ended & ~unused
        fields = tokens, log_probs, ended, beam.scores, attention
        if n_best is None:
            fields = (None if field is None else field[:, 0] for field in fields)
        return Decoded(*fields)
