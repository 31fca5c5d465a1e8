"""Several models of one vocabulary that caption together.

    ensemble = Ensemble([CaptionModel.from_checkpoint(path) for path in paths])
    ensemble.caption("photo.jpg", beam_size=5)

At each step the log-probabilities of the models are averaged, inside one beam search.
"""

import contextlib

import torch

import decoding
from layers import eval_mode
from model import CaptionModel


class Ensemble:
    """Captions images with several models, whose encoders may differ.

    Raises ValueError if the vocabularies differ.
    """

    def __init__(self, models: list[CaptionModel]):
        self.models = list(models)
        if any(model.vocab.words != self.models[0].vocab.words for model in self.models):
            raise ValueError("the models of an ensemble must have the same vocabulary")
        self.vocab = self.models[0].vocab

    def generate(self, images, precomputed=False, **options) -> decoding.Decoded:
        """Captions as token ids. images: a batch for each model, as in `CaptionModel.generate`."""
        memory, decoder = [], EnsembleDecoder([model.decoder for model in self.models])
        with contextlib.ExitStack() as stack:
            for model in self.models:
                stack.enter_context(eval_mode(model))
            for model, batch in zip(self.models, images, strict=True):
                with model.autocast():
                    memory.append(model.encode(batch.to(model.device), precomputed))
            with self.models[0].autocast():
                return decoding.generate(decoder, tuple(memory), **options)

    def preprocess(self, images):
        """A list of images -> a batch for each model."""
        return [model.preprocess(images) for model in self.models]

    decode, caption = CaptionModel.decode, CaptionModel.caption


class EnsembleDecoder:
    """Several decoders as one: the mean of their log-probabilities, normalized again by the beam.

    Its memory is a tuple with the memory of each decoder. The attention is the mean of those of
    the decoders, or None if one has none or their numbers of positions differ.
    """

    def __init__(self, decoders):
        self.decoders = list(decoders)

    def init_state(self, memory):
        return tuple(d.init_state(m) for d, m in zip(self.decoders, memory, strict=True))

    def step(self, tokens, state, memory):
        results = [
            decoder.step(tokens, *own)
            for decoder, *own in zip(self.decoders, state, memory, strict=True)
        ]
        logits, state, attentions = zip(*results, strict=True)
        log_probs = torch.stack([x.float().log_softmax(-1) for x in logits]).mean(0)
        shapes = {None if x is None else x.shape for x in attentions}
        comparable = len(shapes) == 1 and None not in shapes
        return log_probs, state, torch.stack(attentions).mean(0) if comparable else None
