"""Free-running captions: greedy, beam search and sampling, against plain loops over words."""

from itertools import product

import numpy as np
import pytest
import torch
from naive import END, NaiveDecoder, log_softmax

from model import DecoderRNN

INJECT_MODES = ("pre", "par", "init")


def random_decoder(seed, inject="pre", vocab_size=9, num_layers=1):
    """Large weights and a good memory, so that captions differ, end anywhere, and never tie."""
    torch.manual_seed(seed)
    decoder = DecoderRNN(4, 8, vocab_size, num_layers, dropout=0.5, inject=inject)
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight)
    decoder.lstm.bias_ih_l0.data[8:16] += 4  # the forget gate's
    return decoder, torch.randn(3, 4)


def undecided_decoder():
    """One for which no word is too rare to be counted."""
    decoder, features = random_decoder(26)
    for weight in decoder.linear.parameters():
        weight.data *= 0.2
    return decoder, features


def naive_greedy(decoder, image, max_len):
    naive, words = NaiveDecoder(decoder), []
    while len(words) < max_len:
        word = int(naive.speak(words, image).argmax())
        if word == END:
            break
        words.append(word)
    return words


def naive_beam(decoder, image, beam_size, max_len, length_penalty):
    """The search as `sample` documents it: no tensors, no batches, no early stop."""
    naive = NaiveDecoder(decoder)
    beam, ended = [(0.0, [])], []  # (log-probability, words)
    for _ in range(max_len):
        longer = [
            (score + log_p, [*words, word])
            for score, words in beam
            for word, log_p in enumerate(naive.speak(words, image))
            if log_p > -np.inf
        ]
        longer = sorted(longer, reverse=True)[:beam_size]
        ended += [(score / len(words) ** length_penalty, words) for score, words in longer
                  if words[-1] == END]  # fmt: skip
        beam = [(score, words) for score, words in longer if words[-1] != END]
    return max(ended)[1][:-1] if ended else max(beam)[1]


@pytest.mark.parametrize("inject", INJECT_MODES)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_greedy(inject, num_layers):
    """A beam of one takes the likeliest word, again and again, until `<end>` or max_len."""
    lengths = set()
    for seed in range(12):
        decoder, features = random_decoder(seed, inject, num_layers=num_layers)
        expected = [naive_greedy(decoder, image, max_len=8) for image in features.numpy()]
        assert decoder.sample(features, beam_size=1, max_len=8) == expected
        lengths |= set(map(len, expected))
    assert 8 in lengths and len(lengths) > 2  # some captions end by themselves, some do not


@pytest.mark.parametrize("inject", INJECT_MODES)
@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
def test_beam(inject, length_penalty):
    """Beam search equals a plain-Python search, for any beam, length and vocabulary."""
    for seed in range(12):
        vocab_size, beam_size, max_len = 7 + seed % 6, 1 + seed % 4, 1 + seed * 5 % 8
        decoder, features = random_decoder(seed, inject, vocab_size, num_layers=1 + seed % 2)
        expected = [
            naive_beam(decoder, image, beam_size, max_len, length_penalty)
            for image in features.numpy()
        ]
        assert decoder.sample(
            features, beam_size, max_len, length_penalty=length_penalty
        ) == expected, f"seed {seed}"  # fmt: skip


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_that_holds_everything(length_penalty):
    """A beam as large as the number of beginnings finds the best of all captions that end."""
    for seed in range(5):
        decoder, features = random_decoder(seed, vocab_size=7)  # <end> and three words
        naive = NaiveDecoder(decoder)
        for image, words in zip(
            features.numpy(),
            decoder.sample(features, 64, max_len=3, length_penalty=length_penalty),
            strict=True,
        ):
            scores = {}
            for caption in [c for length in range(3) for c in product((4, 5, 6), repeat=length)]:
                whole = [*caption, END]
                log_p = sum(naive.speak(whole[:t], image)[whole[t]] for t in range(len(whole)))
                scores[caption] = log_p / len(whole) ** length_penalty
            assert len(scores) == 1 + 3 + 9
            assert tuple(words) == max(scores, key=scores.get)


@pytest.mark.parametrize("inject", INJECT_MODES)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_batched_equals_one_by_one(inject, beam_size):
    """An image's caption does not depend on the other images of its batch."""
    decoder, _ = random_decoder(2, inject)
    features = 3 * torch.randn(16, 4)
    one_by_one = [decoder.sample(row, beam_size, max_len=8)[0] for row in features.split(1)]
    assert decoder.sample(features, beam_size, max_len=8) == one_by_one
    assert len(set(map(tuple, one_by_one))) > 3


def test_beam_wider_than_the_vocabulary():
    """A beam may be wider than there are words, even when each of them ends the caption."""
    decoder, features = random_decoder(21, vocab_size=4)  # no word at all: only <end>
    assert decoder.sample(features, beam_size=50, max_len=5) == [[], [], []]


@pytest.mark.parametrize("sampling", [{}, {"beam_size": 3}, {"temperature": 1.0}])
def test_only_words_come_out(sampling):
    """No caption holds `<pad>`, `<start>`, `<end>` or `<unk>`, however likely they are."""
    decoder, features = random_decoder(22)
    decoder.linear.bias.data[[0, 1, 3]] = 50.0
    captions = decoder.sample(features, max_len=6, **sampling)
    assert all(4 <= word < 9 for words in captions for word in words)
    assert any(captions)


def test_dropout_is_off():
    """Captions are the same every time, also from a decoder in train mode, which it stays in."""
    decoder, features = random_decoder(23)
    decoder.train()
    assert decoder.sample(features, 3) == decoder.sample(features, 3)
    assert decoder.training


def test_seeded_sampling():
    """The same generator seed draws the same captions, and another seed others."""
    decoder, _ = random_decoder(24)
    features = torch.randn(20, 4)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return decoder.sample(features, temperature=1.0, generator=generator)

    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_top_1_is_greedy(temperature):
    """Drawing from the one likeliest word is greedy decoding, at any temperature."""
    decoder, features = random_decoder(25)
    assert decoder.sample(features, temperature=temperature, top_k=1) == decoder.sample(features)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 3])
def test_sampling_frequencies(temperature, top_k):
    """Words are drawn as often as softmax(log-probability / temperature) says.

    Pearson's chi-square over 4000 draws, with 5 degrees of freedom at most, stays below 20: chance
    goes beyond that once in 800 seeds, and this seed is fixed.
    """
    decoder, features = undecided_decoder()
    image, draws = features[:1], 4000
    generator = torch.Generator().manual_seed(0)
    captions = decoder.sample(image.expand(draws, -1), max_len=1, temperature=temperature,
                              top_k=top_k, generator=generator)  # fmt: skip
    drawn = [words[0] if words else END for words in captions]

    log_p = NaiveDecoder(decoder).speak([], image[0].numpy()) / temperature
    if top_k:
        log_p[log_p < np.sort(log_p)[-top_k]] = -np.inf
    expected = draws * np.exp(log_softmax(log_p))
    counts = np.bincount(drawn, minlength=9)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert expected[possible].min() > 5
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 20


def test_lowest_temperature_is_greedy():
    """However close the temperature is to 0, nothing overflows: the likeliest words are drawn."""
    decoder, features = random_decoder(27)
    assert decoder.sample(features, temperature=1e-40) == decoder.sample(features)


@pytest.mark.parametrize("beam_size, temperature", [(1, 0), (3, 0), (1, 0.7)])
def test_nan_is_no_caption(beam_size, temperature):
    """Features or weights that are not numbers are an error, not a caption without words."""
    decoder, features = random_decoder(28)
    features[1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        decoder.sample(features, beam_size=beam_size, temperature=temperature)


def test_sampling_goes_on_from_what_was_drawn():
    """Each later word is drawn given the words before it: pairs come as often as they should."""
    decoder, features = undecided_decoder()
    image, draws = features[:1], 4000
    generator = torch.Generator().manual_seed(1)
    captions = decoder.sample(
        image.expand(draws, -1), max_len=2, temperature=1.0, generator=generator
    )
    naive = NaiveDecoder(decoder)
    first = naive.speak([], image[0].numpy())
    for word in range(4, 9):
        second = naive.speak([word], image[0].numpy())
        for following in range(4, 9):
            expected = draws * np.exp(first[word] + second[following])
            spread = 5 * np.sqrt(expected) + 1
            assert abs(captions.count([word, following]) - expected) < spread


@pytest.mark.parametrize(
    "wrong",
    [
        {"beam_size": 0},
        {"max_len": 0},
        {"temperature": -1.0},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "beam_size": 2},
        {"length_penalty": -0.5},
    ],
    ids=str,
)
def test_bad_arguments(wrong):
    """Arguments that make no sense are refused."""
    decoder, features = random_decoder(27)
    with pytest.raises(ValueError):
        decoder.sample(features, **wrong)
