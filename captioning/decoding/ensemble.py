"""Several models of one vocabulary that caption together.

    ensemble = Ensemble([CaptionModel.from_checkpoint(path) for path in paths])
    ensemble.caption("photo.jpg", beam_size=5)

At each step the log-probabilities of the models are averaged, inside one beam search.
"""

import contextlib

import torch
from torch import nn

from captioning.decoding.captioner import Captioner


class Ensemble(Captioner, nn.Module):
    """Captions and scores images as one model. The encoders of its `models` may differ.

    Where a `CaptionModel` has a batch of images or features, an ensemble has a tuple with one for
    each of its models.

    Raises ValueError if the vocabularies differ, or if there is no model.
    """

    def __init__(self, models):
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs at least one model")
        if any(model.vocab.words != models[0].vocab.words for model in models):
            raise ValueError("the models of an ensemble must have the same vocabulary")
        self.models, self.vocab, self.detector = nn.ModuleList(models), models[0].vocab, None
        self.decoder = EnsembleDecoder(
            [model.decoder for model in models], [model.autocast for model in models]
        )

    @property
    def device(self):
        return self.models[0].device

    def autocast(self):
        # An outer context keeps the weights that autocast has converted from step to step.
        return self.models[0].autocast()

    def preprocess(self, images) -> tuple:
        """A list of images -> a batch for each model. Raises BadImageError."""
        return tuple(model.preprocess(images) for model in self.models)

    def encode(self, images=None, features=None) -> tuple:
        """A batch for each model, as in `CaptionModel.encode` -> what `self.decoder` takes."""
        nothing, encoded = [None] * len(self.models), []
        for model, *own in zip(self.models, images or nothing, features or nothing, strict=True):
            with model.autocast():
                encoded.append(model.encode(*own))
        return tuple(encoded)


class EnsembleDecoder:
    """Several decoders as one: the mean of their log-probabilities, normalized again by the search.

    Features, memory and state are tuples with those of each decoder. The attention is the mean of
    those of the decoders, or None if one has none or their numbers of positions differ.

    contexts: for each decoder, a function that returns the context in which it runs, such as
        `CaptionModel.autocast`; None: no context.
    """

    def __init__(self, decoders, contexts=None):
        self.decoders = list(decoders)
        self.contexts = contexts or [contextlib.nullcontext] * len(self.decoders)

    def memory(self, features):
        return self._each("memory", zip(features, strict=True))

    def init_state(self, memory):
        return self._each("init_state", zip(memory, strict=True))

    def predict(self, memory, captions, image_index=None, kept=None):
        """Teacher forcing, as `Decoder.predict`: the mean log-probabilities."""
        own = ((m, captions, image_index, kept) for m in memory)
        return mean_log_probs(self._each("predict", own))

    def step(self, tokens, state, memory):
        own = ((tokens, *pair) for pair in zip(state, memory, strict=True))
        logits, state, attentions = zip(*self._each("step", own), strict=True)
        shapes = {None if x is None else x.shape for x in attentions}
        comparable = len(shapes) == 1 and None not in shapes
        attention = torch.stack(attentions).mean(0) if comparable else None
        return mean_log_probs(logits), state, attention

    def _each(self, method, arguments):
        """The results of a method of each decoder, called with its own arguments."""
        results = []
        for decoder, context, own in zip(self.decoders, self.contexts, arguments, strict=True):
            with context():
                results.append(getattr(decoder, method)(*own))
        return tuple(results)


def mean_log_probs(logits):
    """The mean of the log-probabilities of several models, not normalized."""
    return torch.stack([x.float().log_softmax(-1) for x in logits]).mean(0)
