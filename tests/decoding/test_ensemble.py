"""Ensembles: their search, and captions of whole models."""

import numpy as np
import pytest
import torch
from conftest import WORDS, supported, tiny_model
from decoders import assert_equal, language_models, random_decoder
from naive import beam_search as naive_beam_search
from naive import log_softmax

from captioning.decoding.beam_search import beam_search
from captioning.decoding.ensemble import Ensemble, EnsembleDecoder


def random_model(seed, words=WORDS, **changes):
    torch.manual_seed(seed)
    model = tiny_model(words, **changes)
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight)
    return model.eval()


@pytest.fixture
def photos(shared_dataset):
    return sorted((shared_dataset / "images").iterdir())


def members(seed):
    """Two decoders, each with the features of the same images."""
    pairs = [random_decoder(seed + 50 * i, inject) for i, inject in enumerate(("par", "init"))]
    return [decoder.eval() for decoder, _ in pairs], tuple(features for _, features in pairs)


def test_search():
    """An ensemble searches with the mean of its members' log-probabilities, normalized."""

    def mean(both):
        return lambda tokens: log_softmax(sum(model(tokens) for model in both) / 2)

    for seed in range(6):
        decoders, features = members(seed)
        models = zip(*map(language_models, decoders, features), strict=True)
        searches = [naive_beam_search(mean(both), 3, 6, 0.7, 2) for both in models]
        decoded = beam_search(EnsembleDecoder(decoders), features, beam_size=3, max_len=6, n_best=2)
        assert_equal(decoded, searches)


def test_teacher_forcing():
    """The log-probabilities of given captions are the mean of those of the members."""
    decoders, features = members(0)
    captions = torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0], [1, 8, 4, 2]])
    index, targets = torch.tensor([3, 0, 3]), torch.tensor([0, 4, 8])
    found = EnsembleDecoder(decoders).predict(features, captions, index, targets)
    both = zip(decoders, features, strict=True)
    logits = [decoder(x[index], captions).log_softmax(-1) for decoder, x in both]
    expected = (logits[0] + logits[1]).flatten(0, 1)[targets] / 2
    torch.testing.assert_close(found, expected)


def test_same_model(photos):
    """An ensemble of equal models captions as one of them does, with the same attention."""
    model = random_model(0, inject="attend")
    captions, maps = Ensemble([model, model]).caption(photos, return_attention=True)
    expected, expected_maps = model.caption(photos, return_attention=True)
    assert captions == expected
    for found, weights in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(found, weights, atol=1e-4)


def test_precision(photos):
    """Each model computes in its own precision, in whatever order they are listed."""
    supported("bfloat16")
    for inject in ("pre", "attend"):
        first = random_model(0, inject=inject)
        second = random_model(1, inject=inject, precision="bfloat16")
        captions = Ensemble([first, second]).caption(photos)
        assert captions == Ensemble([second, first]).caption(photos)


def test_converted_models(photos):
    """Models converted to another data type caption as before, and keep their mode."""
    models = [random_model(seed, inject="par") for seed in (0, 1)]
    captions = Ensemble(models).caption(photos)
    assert Ensemble([models[0].double(), models[1].train()]).caption(photos) == captions
    assert models[1].training and not models[0].training


def test_attention_of_different_grids(photos):
    """Models whose grids differ caption together, but have no common attention."""
    ensemble = Ensemble([random_model(i, inject="attend", image_size=64 + 32 * i) for i in (0, 1)])
    assert len(ensemble.caption(photos)) == len(photos)
    with pytest.raises(ValueError, match="same number of positions"):
        ensemble.caption(photos, return_attention=True)


def test_errors():
    """Different vocabularies, or no model, raise ValueError."""
    with pytest.raises(ValueError, match="same vocabulary"):
        Ensemble([random_model(0), random_model(0, words=[*WORDS, "bus"])])
    with pytest.raises(ValueError, match="at least one model"):
        Ensemble([])
