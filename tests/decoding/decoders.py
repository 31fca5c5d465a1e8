"""Small decoders for the tests of decoding, and the comparison with the searches of naive.py."""

import numpy as np
import torch
from naive import NaiveDecoder

from model import DecoderRNN


def random_decoder(seed, inject="pre", vocab_size=9, num_layers=1, images=4):
    """Large weights and a large forget gate: captions differ and end at any length."""
    torch.manual_seed(seed)
    decoder = DecoderRNN(4, 8, vocab_size, num_layers, dropout=0.5, inject=inject)
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight)
    decoder.lstm.bias_ih_l0.data[8:16] += 4  # the forget gate's
    return decoder, torch.randn(images, 4)


def uncertain_decoder(images):
    """A decoder for which no word is very improbable."""
    decoder, features = random_decoder(26, images=images)
    for weight in decoder.linear.parameters():
        weight.data *= 0.2
    return decoder, features


def language_models(decoder, features):
    naive = NaiveDecoder(decoder)
    return [naive.language_model(image) for image in features.numpy()]


def assert_equal(decoded, searches, length_penalty=0.7):
    """All fields of `decoded` are those of (hypotheses, margin), for each image.

    Images whose margin is close to rounding are left out; they must be few.
    """
    n, length = decoded.tokens.shape[1:]
    assert (decoded.tokens[:, :, -1] != 0).any()  # no column of padding alone
    clear = [(image, found) for image, (found, margin) in enumerate(searches) if margin > 1e-4]
    assert len(decoded.tokens) == len(searches) and len(clear) >= 0.7 * len(searches)
    for image, hypotheses in clear:
        tokens, log_probs = np.zeros((2, n, length))
        ended, scores = np.zeros(n, bool), np.full(n, -np.inf)
        for row, hypothesis in enumerate(hypotheses):
            tokens[row, : len(hypothesis.tokens)] = hypothesis.tokens
            log_probs[row, : len(hypothesis.tokens)] = hypothesis.log_probs
            ended[row], scores[row] = hypothesis.ended, hypothesis.score(length_penalty)
        np.testing.assert_array_equal(decoded.tokens[image], tokens)
        np.testing.assert_array_equal(decoded.ended[image], ended)
        np.testing.assert_allclose(decoded.log_probs[image], log_probs, atol=1e-4)
        np.testing.assert_allclose(decoded.scores[image], scores, atol=1e-4)


class Bigrams:
    """A decoder without a recurrent network: the next token depends on the last and the image."""

    def __init__(self, table):
        self.table = table  # (vocab_size, vocab_size)

    def memory(self, features):
        return features

    def init_state(self, memory):
        return ()

    def step(self, tokens, state, memory):
        return self.table[tokens] + memory, state, None
