"""What holds for beam search and for sampling, and the options of both."""

import pytest
import torch
from decoders import Bigrams, random_decoder
from naive import END, START

from captioning.decoding.generate import DecodingOptions, generate

STRATEGIES = pytest.mark.parametrize(
    "strategy", [{}, {"beam_size": 3}, {"beam_size": 4, "n_best": 3}, {"temperature": 1.0}], ids=str
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


@STRATEGIES
def test_no_images(strategy):
    """An empty batch gives an empty result."""
    decoder, features = random_decoder(29)
    decoded = decoder.sample(features[:0], **strategy)
    assert decoded.tokens.shape[:2] == (0, strategy.get("n_best", 1))
    assert all(len(field) == 0 for field in decoded[:4])


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


@STRATEGIES
def test_attention_follows_the_beam(strategy):
    """The attention of each token is that of its own prefix, also after the beam was reordered."""
    torch.manual_seed(9)
    decoder = Prefixes(torch.randn(8, 8))
    decoded = generate(decoder, torch.randn(20, 8), max_len=7, **strategy)
    assert decoded.attention.shape == (*decoded.tokens.shape, 5)
    captions = zip(decoded.tokens.flatten(0, 1), decoded.attention.flatten(0, 1), strict=True)
    for row, weights in captions:
        number = torch.tensor(START)
        for token, found in zip(row.tolist(), weights, strict=True):
            torch.testing.assert_close(found, Prefixes.attention(number) * (token != 0))
            number = number * 31 + token


@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": 0},
        {"n_best": 0},
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
        {"length_penalty": float("inf")},
    ],
    ids=str,
)
def test_invalid_options(options):
    """Options out of range, or that contradict each other, raise ValueError."""
    decoder, features = random_decoder(27)
    with pytest.raises(ValueError, match="at least|less than|cannot be combined|between"):
        decoder.sample(features, **options)


@pytest.mark.parametrize(
    "options, beam_size", [({}, 3), ({"n_best": 5}, 5), ({"temperature": 1.0}, None)], ids=str
)
def test_default_beam(options, beam_size):
    """The beam is 3 by default, wider for more captions, and there is none in sampling."""
    assert DecodingOptions(**options).beam_size == beam_size
