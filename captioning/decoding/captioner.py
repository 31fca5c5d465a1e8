"""Captioning of images, for a single model and for an ensemble."""

from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from captioning.base.device import usual_defaults
from captioning.base.modules import eval_mode
from captioning.data.images import BadImageError
from captioning.decoding.decoded import Decoded
from captioning.decoding.generate import DecodingOptions, generate
from captioning.decoding.likelihood import log_probabilities


class Captioned(NamedTuple):
    """The generated captions of an image."""

    image: Any  # path or PIL image
    captions: list[str]  # at most n_best, best first
    scores: list[float]  # of the captions, see `Decoded`
    attention: np.ndarray | None  # of the best caption, see `Decoded.attention_maps`
    confidence: float | None  # the CIDEr-D to expect of the best caption, if the model knows it


class Captioner:
    """What `CaptionModel` and `Ensemble` have in common. Both have a `vocab`, a `decoder`, and

    preprocess(images)          a list of paths or PIL images -> a batch; raises BadImageError
    encode(images, features)    a batch of images or of features -> what the decoder takes
    autocast()                  the precision, as a context manager
    detector                    a `networks.word_detector.WordDetector`, or None
    """

    confidence = None  # a `captioning.decoding.confidence.Confidence`

    def caption(
        self, images, n_best=None, return_attention=False, return_confidence=False, **options
    ):
        """Caption an image (path or PIL image) or an iterable of images.

        Returns a string per image or, with `n_best`, a list of strings, best first. options: those
        of `describe`. Raises BadImageError.

        return_attention: also return the attention of each image's first caption, see
            `Decoded.attention_maps`. return_confidence: also return the CIDEr-D to expect of it.
            Both raise ValueError if the model has none.
        """
        self.check_confidence(return_confidence)
        found = list(self.describe(images, return_attention, n_best=n_best or 1, **options))
        captions = [x.captions[0] if n_best is None else x.captions for x in found]
        attention = [[x.attention for x in found]] if return_attention else []
        confidence = [[x.confidence for x in found]] if return_confidence else []
        return (captions, *attention, *confidence) if attention or confidence else captions

    def check_confidence(self, wanted=True):
        """Raise ValueError if the confidence is `wanted`, but this model has none."""
        if wanted and self.confidence is None:
            raise ValueError(
                "the confidence of this model has not been calibrated; the included model, "
                "pretrained/photo_captioner.pt, has one"
            )

    def describe(self, images, return_attention=False, on_bad=None, batch_size=32, **options):
        """Yields a `Captioned` for each image, in order; images are read `batch_size` at a time.

        on_bad: a function that gets the BadImageError of an image that cannot be read, which is
            then left out; None: it is raised. options: those of `DecodingOptions`.
        """
        one = isinstance(images, (str, Path, Image.Image))
        remaining = iter([images] if one else images)
        while batch := list(islice(remaining, batch_size)):
            readable, inputs = [], []
            for image in batch:
                try:
                    inputs.append(self.preprocess([image]))
                    readable.append(image)
                except BadImageError as error:
                    if on_bad is None:
                        raise
                    on_bad(error)
            if not readable:
                continue
            decoded = self.generate(concatenate(inputs), **options)
            maps = decoded.attention_maps() if return_attention else [None] * len(readable)
            scores, known = decoded.scores.tolist(), decoded.confidence
            known = [None] * len(readable) if known is None else known[:, 0].tolist()
            for row, captions in enumerate(self.decode(decoded)):
                found = captions, scores[row][: len(captions)], maps[row], known[row]
                yield Captioned(readable[row], *found)

    @usual_defaults()
    def generate(self, images=None, features=None, generator=None, **options) -> Decoded:
        """Captions of a batch as token ids. options: `decoding.generate.DecodingOptions`.

        With a detector, the words that it finds are more probable. With a confidence, the captions
        of a beam are ranked by it, not by their scores.
        """
        wanted = DecodingOptions(**options)
        beam = {"n_best": wanted.beam_size} if self.confidence and wanted.beam_size else {}
        decoder = self.detector.supported(self.decoder) if self.detector else self.decoder
        with eval_mode(self), self.autocast():
            encoded = self.encode(images, features)
            decoded = generate(decoder, encoded, generator, **options | beam)
        if self.confidence is None:
            return decoded
        confidence = self.confidence(self.detector, encoded, decoded)
        order = confidence.topk(wanted.n_best).indices
        return decoded._replace(confidence=confidence).take(order).trimmed()

    @usual_defaults()
    def score(self, images, captions):
        """The log-probabilities of given captions, (N, M): of M captions for each of N images.

        images: an image (path or PIL image) or an iterable of images. captions: a string or a list
        of strings. The log-probabilities are in nats, summed over the words and `<end>`, without
        the detector of words; a word outside the vocabulary counts as `<unk>`. Raises
        BadImageError.
        """
        one = isinstance(images, (str, Path, Image.Image))
        captions = [captions] if isinstance(captions, str) else captions
        encoded_captions, rows = [self.vocab.encode(text) for text in captions], []
        with eval_mode(self):
            for image in [images] if one else images:
                with self.autocast():
                    encoded = self.encode(self.preprocess([image]))
                    rows.append(log_probabilities(self.decoder, encoded, encoded_captions))
        return torch.cat(rows)

    def decode(self, decoded: Decoded) -> list[list[str]]:
        """Token ids (B, N, L) as N captions for each of B images; fewer, if fewer were found."""
        found = (decoded.scores > -torch.inf).sum(1).clamp(min=1).tolist()
        rows = zip(decoded.tokens.tolist(), found, strict=True)
        return [[self.vocab.decode(ids) for ids in captions[:n]] for captions, n in rows]


def concatenate(batches):
    """Batches as one: tensors, or tuples with a tensor for each model of an ensemble."""
    if isinstance(batches[0], tuple):
        return tuple(map(torch.cat, zip(*batches, strict=True)))
    return torch.cat(batches)
