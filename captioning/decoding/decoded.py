"""Generated captions as tensors, and the probabilities that they are generated from."""

from typing import NamedTuple

import torch

from captioning.base.tokens import END, PAD, START, UNK


class Decoded(NamedTuple):
    """N captions for each of B images, best first."""

    tokens: torch.Tensor  # (B, N, L) int64, up to and including <end>, padded with <pad>
    log_probs: torch.Tensor  # (B, N, L) log-probability of each token in nats, 0 for <pad>
    ended: torch.Tensor  # (B, N) bool, False if <end> was not reached within max_len tokens
    scores: torch.Tensor  # (B, N) sum of log_probs / length ** length_penalty; -inf: no caption
    attention: torch.Tensor | None  # (B, N, L, P) with which each token was predicted
    confidence: torch.Tensor | None = None  # (B, N) the CIDEr-D to expect, if the model knows it

    @classmethod
    def empty(cls, batch, count, max_len, device):
        """Room for `count` captions per image, none of them used."""
        return cls(
            torch.full((batch, count, max_len), PAD, device=device),
            torch.zeros(batch, count, max_len, device=device),
            torch.zeros(batch, count, dtype=torch.bool, device=device),
            torch.full((batch, count), -torch.inf, device=device),
            None,
        )

    def of_images(self, rows):
        """The captions of some of the images: an index (A,) or a mask (B,)."""
        return Decoded(*(None if x is None else x[rows] for x in self))

    def take(self, index):
        """The captions `index` (B, M) of each image."""
        rows = torch.arange(len(index), device=index.device).unsqueeze(1)
        return Decoded(*(None if x is None else x[rows, index] for x in self))

    def cat(self, other):
        """The captions of both, for the same images."""
        pairs = zip(self, other, strict=True)
        return Decoded(*(None if x is None else torch.cat([x, y], 1) for x, y in pairs))

    def trimmed(self):
        """Without padding that is common to all captions, and all <pad> where there is none."""
        padding = (self.tokens == PAD) | (self.scores == -torch.inf).unsqueeze(2)
        length = int((~padding).sum(2).max()) if padding.numel() else 0
        padding = padding[:, :, :length]
        tokens = self.tokens[:, :, :length].masked_fill(padding, PAD)
        log_probs = self.log_probs[:, :, :length].masked_fill(padding, 0.0)
        attention = self.attention
        if attention is not None:
            attention = attention[:, :, :length].masked_fill(padding.unsqueeze(3), 0.0)
        ended = self.ended & (self.scores > -torch.inf)
        return self._replace(tokens=tokens, log_probs=log_probs, ended=ended, attention=attention)

    def attention_maps(self) -> list:
        """The attention weights of each image's first caption, without `<end>`: (words, H, W) if
        the P positions form a square, else (words, P). Raises ValueError if there is none.
        """
        if self.attention is None:
            raise ValueError(
                "attention maps need a model with --inject attend (in an ensemble, all of them, "
                "with the same number of positions)"
            )
        maps = self.attention[:, 0].float().cpu().numpy()  # (B, L, P)
        words = self.tokens[:, 0].ne(PAD).sum(1) - self.ended[:, 0].long()
        side = round(maps.shape[2] ** 0.5)
        shape = (side, side) if side * side == maps.shape[2] else (maps.shape[2],)
        return [x[:n].reshape(n, *shape) for x, n in zip(maps, words.tolist(), strict=True)]


def word_log_probs(logits, may_end=True):
    """Log-probabilities of the words that may be generated: (B, V) -> (B, V), float32.

    Those of `<pad>`, `<start>` and `<unk>` are -inf, unless `may_end` also that of `<end>`, and the
    others are normalized without them. Raises ValueError if the model computes NaN.
    """
    logits = logits.to(torch.float32, copy=True)
    logits[:, [PAD, START, UNK] if may_end else [PAD, START, UNK, END]] = -torch.inf
    log_probs = logits.log_softmax(-1)
    if log_probs[:, END].isnan().any():  # softmax propagates a NaN to all words
        raise ValueError("the model computes NaN: its weights or the features are damaged")
    return log_probs
