"""What all decoders offer, and the parts that they share."""

from torch import nn

from captioning.base.modules import eval_mode
from captioning.decoding.decoded import Decoded
from captioning.decoding.generate import generate


class Decoder(nn.Module):
    """A language model that is conditioned on images. Besides `predict`, decoding calls

    memory(features)                what it needs of the images, computed once: a tensor or a
                                    (nested) tuple of tensors, whose first dimension is the batch
    init_state(memory)              the state before `<start>`: tensors (num_layers, B, ..)
    step(tokens, state, memory)     (B,) -> logits (B, vocab_size) of the next word, the new state,
                                    and the attention (B, P) with which it is predicted, or None
    """

    def memory(self, features):
        return features

    def init_state(self, memory):
        raise NotImplementedError

    def step(self, tokens, state, memory):
        raise NotImplementedError

    def predict(self, memory, captions, image_index=None, kept=None):
        """The logits of the words of captions, given the words before them.

        captions: (B, T). image_index: (B,), the row of `memory` that belongs to each caption; None:
        the same row. kept: (N,) indices into the B * (T-1) predictions. The vocabulary
        projection, which dominates the cost, is then computed for these alone; None: for all.
        Returns (B, T-1, vocab_size), or (N, vocab_size) for `kept`.
        """
        raise NotImplementedError

    def forward(self, features, captions):
        """Teacher forcing: features, captions (B, T) -> logits (B, T-1, vocab_size)."""
        return self.predict(self.memory(features), captions)

    def sample(self, features, beam_size=None, **options) -> Decoded:
        """Captions in eval mode: by beam search, or with a temperature by sampling words.

        beam_size: 1 by default, the most probable word at each step. options: `DecodingOptions`.
        """
        if beam_size is None and not options.get("temperature"):
            beam_size = 1
        with eval_mode(self):
            return generate(self, features, beam_size=beam_size, **options)


def select_predictions(hidden, kept):
    """The outputs at some of the predictions: (B, T, size), (N,) -> (N, size). None: all."""
    return hidden if kept is None else hidden.flatten(0, 1).index_select(0, kept)


def open_forget_gates(lstm):
    """Start with forget-gate biases of 1 (Jozefowicz et al., 2015), so that the state persists."""
    for name, bias in lstm.named_parameters():
        if name.startswith("bias_ih"):
            nn.init.ones_(bias[lstm.hidden_size : 2 * lstm.hidden_size])
