"""The probability of given captions."""

import numpy as np
import pytest
import torch
from decoders import random_decoder
from naive import NaiveDecoder, log_softmax

from captioning.decoding.likelihood import log_probabilities
from captioning.networks.model_config import INJECT

CAPTIONS = [[1, 4, 5, 2], [1, 2], [1, 8, 8, 6, 3, 7, 2], [1, 5, 2]]


@pytest.mark.parametrize("inject", INJECT)
@pytest.mark.parametrize("pairs", [3, 256])
def test_log_probabilities(inject, pairs, monkeypatch):
    """Of each caption for each image the sum over its words and <end>, however they are batched."""
    monkeypatch.setattr("captioning.decoding.likelihood.PAIRS", pairs)
    decoder, features = random_decoder(2, inject, images=3)
    decoder.eval()
    naive = NaiveDecoder(decoder)
    expected = np.zeros((3, len(CAPTIONS)))
    for row, image in enumerate(features.numpy()):
        for column, caption in enumerate(CAPTIONS):
            logits = naive.teacher_forcing(image, caption)
            chosen = [log_softmax(x)[token] for x, token in zip(logits, caption[1:], strict=True)]
            expected[row, column] = sum(chosen)
    np.testing.assert_allclose(log_probabilities(decoder, features, CAPTIONS), expected, atol=1e-3)


def test_sum_of_a_generated_caption():
    """A sampled caption has the log-probability with which it was drawn, but for the special
    tokens, which are never drawn.
    """
    decoder, features = random_decoder(4, images=1)
    decoder.eval()
    with torch.no_grad():
        decoder.linear.bias[[0, 1, 3]] = -1e4
    decoded = decoder.sample(features, max_len=30, temperature=1.0)
    assert decoded.ended.all()
    caption = [1, *decoded.tokens[0, 0].tolist()]
    found = log_probabilities(decoder, features, [caption])
    torch.testing.assert_close(found, decoded.scores, atol=1e-3, rtol=1e-3)
