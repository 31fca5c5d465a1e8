"""Ensembles of whole models; their search is tested in test_decoding.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import calibrated_weights, supported

from captioning.decoding.ensemble import Ensemble
from model import CaptionModel, ModelConfig
from vocabulary import Vocabulary

TINY = ModelConfig(
    backbone="mobilenet_v3_small", image_size=64, embed_size=16, hidden_size=16, precision="float32"
)


def random_model(seed, words=("a cat", "a dog runs", "sits"), **changes):
    torch.manual_seed(seed)
    vocab = Vocabulary.build(words, threshold=1)
    model = CaptionModel(vocab, replace(TINY, **changes), calibrated_weights())
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight)
    return model.eval()


@pytest.fixture
def photos(shared_dataset):
    return sorted((shared_dataset / "images").iterdir())


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
        Ensemble([random_model(0), random_model(0, words=["a bus"])])
    with pytest.raises(ValueError, match="at least one model"):
        Ensemble([])
