"""The confidence of captions."""

import numpy as np
import pytest
import torch
from conftest import tiny_model

from captioning.base.checkpoints import export, save
from captioning.base.tokens import SPECIAL_TOKENS
from captioning.data.coco import CocoCaptions
from captioning.decoding.decoded import Decoded
from captioning.scoring.confidence import NEAREST, Confidence, calibrate
from captioning.scoring.evaluation import score_sources
from data_loader import ImageDataset
from model import CaptionModel

WORDS = [*SPECIAL_TOKENS, "a", "cat", "dog", "red", "circle"]


@pytest.fixture(scope="module")
def images(shared_dataset):
    data = CocoCaptions(shared_dataset / "images", shared_dataset / "captions.json")
    return ImageDataset(data, tiny_model(WORDS, inject="attend").transform)


@pytest.fixture(scope="module")
def model(images):
    """A model whose captions differ, calibrated on images that it is asked about again."""
    model = tiny_model(WORDS, inject="attend").eval()
    torch.manual_seed(3)
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    model.confidence = calibrate(model, images, images, beam_size=2)
    return model


def test_predictors():
    """Sum, mean and minimum of the log-probabilities, and the mean similarity of the nearest."""
    torch.manual_seed(0)
    features = torch.randn(40, 3, 10)  # (N, P, C)
    confidence = Confidence.of_images(features)
    log_probs = torch.tensor([[[-1.0, -2.0, -0.5]], [[-3.0, 0.0, 0.0]]])
    decoded = Decoded(log_probs.new_ones(2, 1, 3).long(), log_probs, None, None, None)
    found = confidence.predictors(features[:2], decoded)
    expected = [[-3.5, -3.5 / 3, -2.0], [-3.0, -3.0, -3.0]]
    np.testing.assert_allclose(found[:, :3], expected, rtol=1e-6)
    x = features.mean(1).numpy().astype(np.float64)
    z = (x - x.mean(0)) / (x.std(0, ddof=1) + 1e-3)  # with all components, only rotated
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    nearest = np.sort(unit[:2] @ unit.T, 1)[:, -NEAREST:]
    np.testing.assert_allclose(found[:, 3], nearest.mean(1), rtol=1e-3)


def test_fitted():
    """A linear score of many captions is found again, whatever the scales of the predictors."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 4, generator=rng) * torch.tensor([1.0, 10.0, 0.1, 1.0]) + 3
    scores = x @ torch.tensor([0.2, 0.01, 1.0, 0.0]) + 2
    confidence = Confidence.of_images(torch.randn(9, 5)).fitted(x, scores)
    np.testing.assert_allclose(x @ confidence.weight + confidence.bias, scores, atol=0.05)


@torch.no_grad()
def test_calibrated_on_the_scores_of_the_captions(model, images):
    """Before it is limited to 0, the mean confidence is the mean CIDEr-D of the images."""
    encoded = model.encode(model.preprocess(images.data.paths))
    decoded = model.generate(model.preprocess(images.data.paths), beam_size=2)
    captions = [best for best, *_ in model.decode(decoded)]
    _, scores = score_sources(captions, images.data)
    values = model.confidence.predictors(encoded, decoded) @ model.confidence.weight
    assert float((values + model.confidence.bias).mean()) == pytest.approx(
        np.mean(scores), abs=1e-3
    )
    assert len(set(captions)) > 1 and values.std() > 0
    _, found = model.caption(images.data.paths, beam_size=2, return_confidence=True)
    limited = (values + model.confidence.bias).clamp(min=0)
    np.testing.assert_allclose(found, limited, atol=1e-3)


def test_a_checkpoint_keeps_it(model, images, tmp_path):
    """A checkpoint and its export in half precision have the same confidence."""
    paths = images.data.paths[:4]
    expected = model.caption(paths, return_confidence=True)
    save(model.checkpoint(), tmp_path / "full.pt")
    export(tmp_path / "full.pt", tmp_path / "half.pt")
    for name, tolerance in ("full.pt", 2e-3), ("half.pt", 0.02):
        loaded = CaptionModel.from_checkpoint(tmp_path / name)
        _, confidence = loaded.caption(paths, return_confidence=True)
        np.testing.assert_allclose(confidence, expected[1], atol=tolerance)


def test_without_calibration(images):
    """A model without calibration captions as usual, and says so when it is asked."""
    model = tiny_model(WORDS, inject="attend")
    assert next(model.describe(images.data.paths[0])).confidence is None
    with pytest.raises(ValueError, match="not been calibrated"):
        model.caption(images.data.paths[0], return_confidence=True)
