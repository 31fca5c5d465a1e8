"""Several models of one vocabulary that caption together.

    ensemble = Ensemble([CaptionModel.from_checkpoint(path) for path in paths])
    ensemble.caption("photo.jpg", beam_size=5)

At each step the log-probabilities of the models are averaged, inside one beam search.
"""

import contextlib

import torch

from captioning.decoding import search as decoding
from captioning.learning.losses import cross_entropy
from captioning.networks.layers import eval_mode
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
        self.decoder = EnsembleDecoder(
            [model.decoder for model in self.models], [model.autocast for model in self.models]
        )

    @property
    def device(self):
        return self.models[0].device

    @contextlib.contextmanager
    def inference(self):
        """Evaluation mode of all models, without gradients."""
        with contextlib.ExitStack() as stack:
            for model in self.models:
                stack.enter_context(eval_mode(model))
            # An outer context keeps the weights that autocast has converted from step to step.
            stack.enter_context(self.models[0].autocast())
            yield

    def encode(self, images, precomputed=False) -> tuple:
        """A batch for each model, as in `CaptionModel.encode` -> the memory of `self.decoder`."""
        memory = []
        for model, batch in zip(self.models, images, strict=True):
            with model.autocast():
                batch = batch.to(model.decoder.linear.weight)  # device and dtype
                memory.append(model.encode(batch, precomputed))
        return tuple(memory)

    def generate(self, images, precomputed=False, **options) -> decoding.Decoded:
        """Captions as token ids. images: a batch for each model, as in `CaptionModel.generate`."""
        with self.inference():
            return decoding.generate(self.decoder, self.encode(images, precomputed), **options)

    def evaluate_loss(self, loaders) -> tuple[float, int]:
        """(total negative log-likelihood in nats, number of targets) under teacher forcing.

        loaders: for each model a `val_loader` of the same captions, with the features for it.
        """
        total, count = 0.0, 0
        with self.inference():
            for batches in zip(*loaders, strict=True):
                memory = self.encode([images for images, *_ in batches], precomputed=True)
                nll, tokens = cross_entropy(self, memory, *batches[0][1:])
                total, count = total + nll.item(), count + int(tokens)
        return total, count

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

    def __call__(self, memory, captions, positions=None, image_index=None):
        """Teacher forcing, as `DecoderRNN.forward`: the log-probabilities of all models."""
        own = ((m, captions, positions, image_index) for m in memory)
        return mean_log_probs(self._each("forward", own))

    def init_state(self, memory):
        return self._each("init_state", zip(memory, strict=True))

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
