"""Captioning of images, for a single model and for an ensemble."""

from pathlib import Path

import torch
from PIL import Image

from captioning.decoding.decoded import Decoded


class Captioner:
    """What `CaptionModel` and `Ensemble` have in common. Both have a `vocab` and

    preprocess(images)          a list of paths or PIL images -> a batch; raises BadImageError
    generate(batch, **options)  the batch -> `Decoded`; options: those of `DecodingOptions`
    """

    def caption(self, images, n_best=None, batch_size=32, return_attention=False, **options):
        """Caption an image (path or PIL image) or an iterable of images.

        Returns a string per image or, with `n_best`, a list of strings, best first. options: those
        of `DecodingOptions`. Raises BadImageError.

        return_attention: also return the attention of each image's first caption, see
            `Decoded.attention_maps`.
        """
        images = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
        captions, maps = [], []
        for start in range(0, len(images), batch_size):
            batch = self.preprocess(images[start : start + batch_size])
            decoded = self.generate(batch, n_best=n_best or 1, **options)
            captions += self.decode(decoded)
            maps += decoded.attention_maps() if return_attention else []
        if n_best is None:
            captions = [best for best, *_ in captions]
        return (captions, maps) if return_attention else captions

    def decode(self, decoded: Decoded) -> list[list[str]]:
        """Token ids (B, N, L) as N captions for each of B images; fewer, if fewer were found."""
        found = (decoded.scores > -torch.inf).sum(1).clamp(min=1).tolist()
        rows = zip(decoded.tokens.tolist(), found, strict=True)
        return [[self.vocab.decode(ids) for ids in captions[:n]] for captions, n in rows]
