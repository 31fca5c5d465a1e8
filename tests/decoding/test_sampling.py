"""Sampled captions, compared with the probabilities that naive.py computes."""

import numpy as np
import pytest
import torch
from decoders import assert_equal, language_models, random_decoder, uncertain_decoder
from naive import END, Hypothesis, at_least, greedy, log_softmax


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(temperature):
    """Sequences occur as often as the product of softmax(log-probability / temperature) says.

    Pearson's chi-square over 8000 captions of at most two tokens: the probability of exceeding the
    threshold by chance is 1e-7 (31 sequences at most, so 30 degrees of freedom).
    """
    decoder, features = uncertain_decoder(images=1)
    count, (model,) = 8000, language_models(decoder, features)
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": temperature, "generator": generator}
    decoded = decoder.sample(features.expand(count, -1), max_len=2, **options)
    counts = {}
    for tokens in decoded.tokens[:, 0].tolist():
        counts[tuple(tokens)] = counts.get(tuple(tokens), 0) + 1

    def probabilities(tokens):
        return enumerate(np.exp(log_softmax(model(tokens) / temperature)))

    expected = {}
    for first, p in probabilities([]):
        pairs = [(0, 1.0)] if first == END or p == 0 else probabilities([first])
        expected |= {(first, second): count * p * q for second, q in pairs}
    expected = {tokens: number for tokens, number in expected.items() if number > 0}
    assert counts.keys() <= expected.keys()
    assert min(expected.values()) > 3
    chi_square = sum((counts.get(t, 0) - number) ** 2 / number for t, number in expected.items())
    assert len(expected) <= 31 and chi_square < 90


@pytest.mark.parametrize("temperature, min_len", [(0.5, 0), (1.0, 0), (2.0, 0), (1.0, 3)])
def test_log_probs(temperature, min_len):
    """`log_probs` are the model's own at any temperature, `scores` their sums; with `min_len` they
    are those of a model that does not end before.
    """
    decoder, features = uncertain_decoder(images=50)
    decoded = decoder.sample(features, max_len=6, temperature=temperature, min_len=min_len)
    searches = []
    rows = decoded.tokens[:, 0].tolist()
    for model, row in zip(language_models(decoder, features), rows, strict=True):
        tokens, model = [token for token in row if token], at_least(model, min_len)
        log_probs = [model(tokens[:t])[token] for t, token in enumerate(tokens)]
        searches.append(([Hypothesis(tokens, log_probs)], np.inf))
    assert_equal(decoded, searches, length_penalty=0)
    assert len(set(decoded.ended.flatten().tolist())) == 2


def test_temperature_close_to_zero():
    """With a temperature close to 0, the most probable tokens are sampled."""
    decoder, features = random_decoder(25, images=8)
    found = [greedy(model, max_len=8) for model in language_models(decoder, features)]
    searches = [([hypothesis], margin) for hypothesis, margin in found]
    decoded = decoder.sample(features, max_len=8, temperature=1e-40)
    assert_equal(decoded, searches, length_penalty=0)


def test_seed():
    """The same seed of the generator samples the same captions, another seed others."""
    decoder, features = random_decoder(24, images=20)
    first, second, other = (
        decoder.sample(features, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first[:4], second[:4]))
    assert first.tokens.tolist() != other.tokens.tolist()
