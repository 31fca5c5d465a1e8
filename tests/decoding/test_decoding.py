"""Decoding strategies: beam search, greedy decoding and sampling, compared with naive.py."""

from itertools import product

import numpy as np
import pytest
import torch
from naive import (
    END,
    START,
    Hypothesis,
    NaiveDecoder,
    beam_search,
    greedy,
    log_softmax,
    without_special_tokens,
)

from captioning.decoding import beam_search as searching
from captioning.decoding.ensemble import EnsembleDecoder
from captioning.decoding.generate import generate
from captioning.networks.config import INJECT
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
    clear = [
        (image, hypotheses) for image, (hypotheses, margin) in enumerate(searches) if margin > 1e-4
    ]
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


# ---------------------------------------------------------------------------- beam search


@pytest.mark.parametrize("inject", INJECT)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_greedy(inject, num_layers):
    """A beam of one takes the most probable token at every step, until `<end>` or max_len."""
    kinds = set()
    for seed in range(12):
        decoder, features = random_decoder(seed, inject, num_layers=num_layers)
        found = [greedy(model, max_len=8) for model in language_models(decoder, features)]
        searches = [([hypothesis], margin) for hypothesis, margin in found]
        assert_equal(decoder.sample(features, beam_size=1, max_len=8), searches)
        kinds |= {len(h.tokens) if h.ended else "max_len" for h, _ in found}
    assert "max_len" in kinds and len(kinds) > 2


@pytest.mark.parametrize("inject", INJECT)
@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
def test_beam_search(inject, length_penalty):
    """The n best captions of a batch equal those of a naive search for each image alone."""
    for seed in range(12):
        vocab_size, beam_size, max_len = 7 + seed % 6, 1 + seed % 4, 1 + seed * 5 % 8
        n_best = [1, 1, beam_size][seed % 3]
        decoder, features = random_decoder(seed, inject, vocab_size, num_layers=1 + seed % 2)
        searches = [
            beam_search(model, beam_size, max_len, length_penalty, n_best)
            for model in language_models(decoder, features)
        ]
        options = {"length_penalty": length_penalty, "n_best": n_best, "max_len": max_len}
        decoded = decoder.sample(features, beam_size, **options)
        assert_equal(decoded, searches, length_penalty)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_exhaustive_beam(length_penalty):
    """A beam that holds all prefixes ranks all captions that can end within max_len."""
    decoder, features = random_decoder(3, vocab_size=7, images=8)  # <end> and three words
    searches = []
    for model in language_models(decoder, features):
        captions = [
            Hypothesis(
                [*words, END], [model(words[:t])[token] for t, token in enumerate([*words, END])]
            )
            for length in range(3)
            for words in product((4, 5, 6), repeat=length)
        ]
        assert len(captions) == 1 + 3 + 9
        captions.sort(key=lambda caption: caption.score(length_penalty), reverse=True)
        gaps = np.diff([caption.score(length_penalty) for caption in captions])
        searches.append((captions, -gaps.max()))
    decoded = decoder.sample(features, 64, max_len=3, length_penalty=length_penalty, n_best=13)
    assert_equal(decoded, searches, length_penalty)


@pytest.mark.parametrize("vocab_size, captions", [(4, 1), (5, 4)])
def test_fewer_captions_than_n_best(vocab_size, captions):
    """If fewer than n captions exist, the last entries are padding with the score -inf."""
    decoder, features = random_decoder(21, vocab_size=vocab_size)  # no word but <end>, or one
    decoded = decoder.sample(features, beam_size=50, max_len=3, n_best=6)
    searches = [beam_search(m, 50, 3, 0.7, 6) for m in language_models(decoder, features)]
    assert {len(hypotheses) for hypotheses, _ in searches} == {captions}
    assert_equal(decoded, searches)


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


def test_any_decoder():
    """The search needs no more of a decoder than `init_state` and `step`."""
    torch.manual_seed(9)
    table, memory = 2 * torch.randn(8, 8), torch.randn(6, 8)

    def model(image):
        return lambda tokens: without_special_tokens(
            (table[tokens[-1] if tokens else 1] + image).numpy()
        )

    decoded = searching.beam_search(Bigrams(table), memory, beam_size=4, max_len=6, n_best=3)
    assert_equal(decoded, [beam_search(model(image), 4, 6, 0.7, 3) for image in memory])


def test_memory_is_kept():
    """The memory is copied when the beam grows or a search ends, not at every step."""
    memories = []

    class Recorder(Bigrams):
        def step(self, tokens, state, memory):
            memories.append(memory)
            return super().step(tokens, state, memory)

    table = torch.zeros(8, 8)
    table[:, END] = -100.0
    searching.beam_search(Recorder(table), torch.zeros(3, 8), beam_size=4, max_len=6)
    assert [len(memory) for memory in memories] == [3] + 5 * [12]
    assert len({id(memory) for memory in memories}) == 2


def test_ensemble():
    """An ensemble searches with the mean of its members' log-probabilities, normalized."""
    for seed in range(6):
        members = [
            random_decoder(seed + 50 * i, inject) for i, inject in enumerate(("par", "init"))
        ]
        models = zip(*(language_models(*member) for member in members), strict=True)

        def mean(both):
            return lambda tokens: log_softmax(sum(model(tokens) for model in both) / 2)

        searches = [beam_search(mean(both), 3, 6, 0.7, 2) for both in models]
        decoders, memory = zip(*members, strict=True)
        for decoder in decoders:
            decoder.eval()
        decoded = searching.beam_search(EnsembleDecoder(decoders), memory, 3, 6, n_best=2)
        assert_equal(decoded, searches)


class Prefixes(Bigrams):
    """Its attention, over five positions, is determined by all tokens so far."""

    def init_state(self, memory):
        return (torch.zeros(1, len(memory), dtype=torch.int64),)

    @staticmethod
    def attention(number):
        return torch.nn.functional.one_hot(number % 5, 5) * 0.5 + 0.1

    def step(self, tokens, state, memory):
        number = state[0][0] * 31 + tokens
        logits, _, _ = super().step(tokens, state, memory)
        return logits, (number.unsqueeze(0),), self.attention(number)


@pytest.mark.parametrize(
    "options", [{}, {"beam_size": 4}, {"beam_size": 4, "n_best": 3}, {"temperature": 1.0}], ids=str
)
def test_attention_follows_the_beam(options):
    """The attention of each token is that of its own prefix, also after the beam was reordered."""
    torch.manual_seed(9)
    decoder = Prefixes(torch.randn(8, 8))
    decoded = generate(decoder, torch.randn(20, 8), max_len=7, **options)
    tokens, attention = decoded.tokens.flatten(0, -2), decoded.attention.flatten(0, -3)
    assert attention.shape == (*tokens.shape, 5)
    for row, weights in zip(tokens.tolist(), attention, strict=True):
        number = torch.tensor(START)
        for token, found in zip(row, weights, strict=True):
            torch.testing.assert_close(found, Prefixes.attention(number) * (token != 0))
            number = number * 31 + token


# ---------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies(temperature):
    """Sequences occur as often as the product of softmax(log-probability / temperature) says.

    Pearson's chi-square over 8000 captions of at most two tokens: the probability of exceeding the
    threshold by chance is 1e-7 (31 sequences at most, so 30 degrees of freedom).
    """
    decoder, features = uncertain_decoder(images=1)
    count, (model,) = 8000, language_models(decoder, features)
    generator = torch.Generator().manual_seed(0)
    decoded = decoder.sample(
        features.expand(count, -1), max_len=2, temperature=temperature, generator=generator
    )
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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_log_probs(temperature):
    """`log_probs` are the model's own at any temperature, `scores` their sums."""
    decoder, features = uncertain_decoder(images=50)
    decoded = decoder.sample(features, max_len=6, temperature=temperature)
    searches = []
    for model, tokens in zip(
        language_models(decoder, features), decoded.tokens[:, 0].tolist(), strict=True
    ):
        tokens = [token for token in tokens if token]
        log_probs = [model(tokens[:t])[token] for t, token in enumerate(tokens)]
        searches.append(([Hypothesis(tokens, log_probs)], np.inf))
    assert_equal(decoded, searches, length_penalty=0)
    assert len(set(decoded.ended[:, 0].tolist())) == 2


def test_sampling_becomes_greedy():
    """With a temperature close to 0, the most probable tokens are sampled."""
    decoder, features = random_decoder(25, images=8)
    found = [greedy(model, max_len=8) for model in language_models(decoder, features)]
    searches = [([hypothesis], margin) for hypothesis, margin in found]
    assert_equal(decoder.sample(features, max_len=8, temperature=1e-40), searches, length_penalty=0)


def test_seeded_sampling():
    """The same seed of the generator samples the same captions, another seed others."""
    decoder, features = random_decoder(24, images=20)
    first, second, other = (
        decoder.sample(features, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first[:4], second[:4]))
    assert first.tokens.tolist() != other.tokens.tolist()


# ---------------------------------------------------------------------------- both

STRATEGIES = pytest.mark.parametrize(
    "strategy", [{}, {"beam_size": 3}, {"beam_size": 3, "n_best": 2}, {"temperature": 1.0}], ids=str
)


@STRATEGIES
def test_no_special_tokens(strategy):
    """`<pad>`, `<start>` and `<unk>` are never generated, however probable they are."""
    decoder, features = random_decoder(22)
    decoder.linear.bias.data[[0, 1, 3]] = 50.0
    decoded = decoder.sample(features, max_len=6, **strategy)
    generated = decoded.tokens[decoded.log_probs != 0]
    assert set(generated.tolist()) <= {END, 4, 5, 6, 7, 8} and len(generated) > 4
    assert not decoded.tokens[decoded.log_probs == 0].any()


@STRATEGIES
def test_dropout_is_off(strategy):
    """Decoding disables dropout, and leaves the decoder in train mode if it was."""
    decoder, features = random_decoder(23)
    results = []
    for training in (True, False):
        torch.manual_seed(0)
        results.append(decoder.train(training).sample(features, **strategy))
        assert decoder.training == training
    assert all(map(torch.equal, results[0][:4], results[1][:4]))


@STRATEGIES
def test_nan(strategy):
    """NaN in the features or the weights is an error, not an empty caption."""
    decoder, features = random_decoder(28)
    features[1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        decoder.sample(features, **strategy)


@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": 0},
        {"max_len": 0},
        {"max_len": 0, "temperature": 1.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1.0, "beam_size": 2},
        {"temperature": 1.0, "n_best": 2},
        {"beam_size": 3, "n_best": 4},
        {"length_penalty": -0.5},
        {"length_penalty": float("nan")},
    ],
    ids=str,
)
def test_invalid_options(options):
    """Options out of range, or that contradict each other, raise ValueError."""
    decoder, features = random_decoder(27)
    with pytest.raises(ValueError, match="at least|cannot be combined|between"):
        generate(decoder, features, **options)


@STRATEGIES
def test_no_images(strategy):
    """An empty batch gives an empty result."""
    decoder, features = random_decoder(29)
    assert all(len(field) == 0 for field in decoder.sample(features[:0], **strategy)[:4])
