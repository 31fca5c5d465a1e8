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

    Raises ValueError if the vocabularies differ, or if there is no model.
    """

    def __init__(self, models: list[CaptionModel]):
        self.models = list(models)
        if not self.models:
            raise ValueError("an ensemble needs at least one model")
        if any(model.vocab.words != self.models[0].vocab.words for model in self.models):
            raise ValueError("the models of an ensemble must have the same vocabulary")
        self.vocab = self.models[0].vocab

    def generate(self, images, precomputed=False, **options) -> decoding.Decoded:
        """Captions as token ids. images: a batch for each model, as in `CaptionModel.generate`."""
        models, memory = self.models, []
        decoder = EnsembleDecoder([m.decoder for m in models], [m.autocast for m in models])
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(eval_mode(model))
            # An outer context keeps the weights that autocast has converted from step to step.
            stack.enter_context(models[0].autocast())
            for model, batch in zip(models, images, strict=True):
                with model.autocast():
                    batch = batch.to(model.decoder.linear.weight)  # device and dtype
                    memory.append(model.encode(batch, precomputed))
            return decoding.generate(decoder, tuple(memory), **options)

    def preprocess(self, images):
        """A list of images -> a batch for each model."""
        return [model.preprocess(images) for model in self.models]

    def concatenate(self, batches):
        """Several results of `preprocess` as one."""
        return [torch.cat(of_model) for of_model in zip(*batches, strict=True)]

    decode, caption = CaptionModel.decode, CaptionModel.caption
    attention_maps = staticmethod(CaptionModel.attention_maps)


class EnsembleDecoder:
    """Several decoders as one: the mean of their log-probabilities, normalized again by the beam.

    Its memory is a tuple with the memory of each decoder. The attention is the mean of those of
    the decoders, or None if one has none or their numbers of positions differ.

    contexts: for each decoder, a function that returns the context in which it runs, such as
        `CaptionModel.autocast`; None: no context.
    """

    def __init__(self, decoders, contexts=None):
        self.decoders = list(decoders)
        self.contexts = contexts or [contextlib.nullcontext] * len(self.decoders)

    def init_state(self, memory):
        return self._each("init_state", zip(memory, strict=True))

    def step(self, tokens, state, memory):
        own = ((tokens, *pair) for pair in zip(state, memory, strict=True))
        logits, state, attentions = zip(*self._each("step", own), strict=True)
        log_probs = torch.stack([x.float().log_softmax(-1) for x in logits]).mean(0)
        shapes = {None if x is None else x.shape for x in attentions}
        comparable = len(shapes) == 1 and None not in shapes
        return log_probs, state, torch.stack(attentions).mean(0) if comparable else None

    def _each(self, method, arguments):
        """The results of a method of each decoder, called with its own arguments."""
        results = []
        for decoder, context, own in zip(self.decoders, self.contexts, arguments, strict=True):
            with context():
                results.append(getattr(decoder, method)(*own))
        return tuple(results)
