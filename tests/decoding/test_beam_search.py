"""Beam search and greedy decoding, compared with the naive searches of naive.py."""

from itertools import product

import numpy as np
import pytest
import torch
from decoders import Bigrams, assert_equal, language_models, random_decoder
from naive import END, Hypothesis, at_least
from naive import beam_search as naive_beam_search

from captioning.decoding.beam_search import beam_search
from captioning.networks.model_config import INJECT


@pytest.mark.parametrize("inject", INJECT)
@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
def test_beam_search(inject, length_penalty):
    """The n best captions of a batch equal those of a naive search for each image alone."""
    for seed in range(12):
        vocab_size, beam_size, max_len = 7 + seed % 6, 1 + seed % 4, 1 + (5 * seed + 8) % 9
        n_best = [1, beam_size][seed % 2]
        decoder, features = random_decoder(seed, inject, vocab_size, num_layers=1 + seed % 2)
        searches = [
            naive_beam_search(model, beam_size, max_len, length_penalty, n_best)
            for model in language_models(decoder, features)
        ]
        options = {"max_len": max_len, "length_penalty": length_penalty, "n_best": n_best}
        decoded = decoder.sample(features, beam_size, **options)
        assert decoded.tokens.shape[:2] == (4, n_best)
        assert_equal(decoded, searches, length_penalty)


@pytest.mark.parametrize("min_len", [1, 3, 7])
def test_min_len(min_len):
    """With `min_len` the search equals a naive one in which shorter captions have no <end>."""
    for seed in range(8):
        decoder, features = random_decoder(seed, vocab_size=9)
        searches = [
            naive_beam_search(at_least(model, min_len), 3, 8, 0.7, 2)
            for model in language_models(decoder, features)
        ]
        decoded = decoder.sample(features, 3, max_len=8, min_len=min_len, n_best=2)
        assert_equal(decoded, searches)
        assert (decoded.tokens[:, :, :min_len] > END).all()


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
    searches = [naive_beam_search(m, 50, 3, 0.7, 6) for m in language_models(decoder, features)]
    assert {len(hypotheses) for hypotheses, _ in searches} == {captions}
    assert_equal(decoded, searches)


def test_memory_is_kept():
    """The memory is copied when the beam grows or a search ends, not at every step."""
    memories = []

    class Recorder(Bigrams):
        def step(self, tokens, state, memory):
            memories.append(memory)
            return super().step(tokens, state, memory)

    table = torch.zeros(8, 8)
    table[:, END] = -100.0
    beam_search(Recorder(table), torch.zeros(3, 8), beam_size=4, max_len=6)
    assert [len(memory) for memory in memories] == [3] + 5 * [12]
    assert len({id(memory) for memory in memories}) == 2
