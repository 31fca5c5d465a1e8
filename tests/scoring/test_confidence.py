"""The confidence of captions."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_model

from captioning.base.checkpoints import export, save
from captioning.base.tokens import SPECIAL_TOKENS
from captioning.data.coco import CocoCaptions
from captioning.decoding.decoded import Decoded
from captioning.decoding.generate import generate
from captioning.scoring.confidence import MAX_PRIOR, PRIOR, SMOOTHING, Confidence, calibrate
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
    """A model whose captions differ, calibrated on images of which it describes half better."""
    model = tiny_model(WORDS, inject="attend", precision="float32").eval()
    torch.manual_seed(3)
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    known = copy.copy(images)
    known.data = copy.copy(images.data)
    captions = model.caption(images.data.paths, beam_size=2)
    known.data.captions = [[text, "a dog"][: 1 + row % 2] for row, text in enumerate(captions)]
    model.confidence = calibrate(model, known, known, beam_size=2)
    model.known = known.data
    return model


FEATURES = torch.randn(40, 3, 10, generator=torch.Generator().manual_seed(0))  # (N, P, C)
CAPTIONS = [[[4, 5], [4, 6, 6]] if row % 2 else [[4, 7]] for row in range(40)]  # of the images


def test_prior_is_float32_in_autocast():
    """A decoder in bfloat16 gets the same prior as one in float32."""
    model = tiny_model(WORDS, inject="attend")
    features = torch.randn(40, 3, model.encoder.cnn.feature_size)
    confidence = Confidence.of_images(features, CAPTIONS)
    exact = confidence.prior(features[:3], len(WORDS))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, prior = confidence.supported(model.decoder).memory(features[:3])
    torch.testing.assert_close(prior, exact, rtol=0, atol=0)


def test_predictors():
    """Statistics of the log-probabilities, the words of similar images, and repeated words."""
    confidence = Confidence.of_images(FEATURES, CAPTIONS)
    tokens = torch.tensor([[[4, 6, 2], [7, 2, 0]], [[6, 6, 6], [5, 2, 0]]])  # 2 is <end>
    log_probs = -torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(1)) - 0.1
    log_probs[tokens == 0] = 0.0
    decoded = Decoded(tokens, log_probs, None, None, None)
    found = confidence.predictors(FEATURES[:2], decoded)

    x = FEATURES.mean(1).numpy().astype(np.float64)
    z = (x - x.mean(0)) / (x.std(0, ddof=1) + 1e-3)  # with all components, only rotated
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    similarity = unit[:2] @ unit.T
    shares = np.array(
        [[0, 0, 0, 0, 1, *(([0.5, 0.5, 0], [0, 0, 1])[row % 2 == 0])] for row in range(40)]
    )
    idf = -np.log(shares.mean(0) + 1e-4)
    for image in range(2):
        nearest = np.argsort(similarity[image])[-20:]
        weights = np.exp(10 * similarity[image, nearest])
        support = weights @ shares[nearest] / weights.sum()
        for n in range(2):
            real = log_probs[image, n][tokens[image, n] != 0].numpy()
            words = sorted({int(word) for word in tokens[image, n] if word > 3})
            agreement = idf[words] ** 2 @ support[words] / (idf[words] ** 2).sum()
            expected = [real.sum(), real.mean(), real.min(), agreement]
            expected.append(idf[words] @ support[words])
            ids = tokens[image, n].tolist()
            expected.append(sum((ids.count(word) - 1) * idf[word] for word in words))
            np.testing.assert_allclose(found[image, n], expected, rtol=2e-3, atol=1e-5)


def test_fitted():
    """A linear score of many captions is found again, whatever the scales of the predictors."""
    x = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0, 1.0]) + 3
    scores = x @ torch.tensor([0.2, 0.01, 1.0, 0.0, 0.5, 0.1]) + 2
    confidence = Confidence.of_images(FEATURES, CAPTIONS).fitted(x, scores)
    np.testing.assert_allclose(x @ confidence.weight + confidence.bias, scores, atol=0.1)


def test_calibrated_on_the_scores_of_the_captions(model):
    """The mean confidence is about the mean CIDEr-D of the captions, and rises with it."""
    paths = model.known.paths
    captions, confidence = model.caption(paths, beam_size=2, return_confidence=True)
    _, scores = score_sources(captions, model.known)
    assert len(set(captions)) > 1 and np.corrcoef(confidence, scores)[0, 1] > 0.5
    assert np.mean(confidence) == pytest.approx(np.mean(scores), rel=0.1)


@torch.no_grad()
def test_the_caption_of_the_beam_with_the_highest_confidence_is_first(model):
    """The captions of a beam are ranked by their confidence; none is lost."""
    batch, confidence = model.preprocess(model.known.paths), model.confidence
    ranked = model.generate(batch, beam_size=4, n_best=4)
    encoded = model.encode(batch)
    beam = generate(confidence.supported(model.decoder), encoded, beam_size=4, n_best=4)
    found = confidence(encoded, beam).sort(1, descending=True).values
    np.testing.assert_allclose(ranked.confidence, found, atol=1e-4)
    for one, other in zip(model.decode(ranked), model.decode(beam), strict=True):
        assert sorted(one) == sorted(other)
    assert model.decode(ranked) != model.decode(beam)
    best = [best for best, *_ in model.decode(ranked)]
    assert model.caption(model.known.paths, beam_size=4) == best


@torch.no_grad()
def test_prior():
    """A word gains the weighted logarithm of its share among similar images over its share in all;
    special tokens gain nothing.
    """
    confidence = Confidence.of_images(FEATURES, CAPTIONS)
    gain = confidence.prior(FEATURES[:2], 9)
    support, _ = confidence.support(confidence.similarity(FEATURES[:2]), 9)
    share = np.array([0, 0, 0, 0, 1, 0.25, 0.25, 0.5, 0])  # of the captions of an image, on average
    expected = np.log((support.numpy() + SMOOTHING) / (share + SMOOTHING))
    expected = PRIOR * np.clip(expected, -MAX_PRIOR, MAX_PRIOR)
    np.testing.assert_allclose(gain[:, 4:], expected[:, 4:], atol=5e-3)
    assert gain.shape == (2, 9) and not gain[:, :4].any() and gain[:, 5:8].abs().max() > 0.01


@torch.no_grad()
def test_supported_decoder(model):
    """At each step the prior is added to the logits of the decoder, also in a beam search."""
    encoded = model.encode(model.preprocess(model.known.paths[:2]))
    decoder, tokens = model.confidence.supported(model.decoder), torch.tensor([1, 1])
    memory, own = decoder.memory(encoded), model.decoder.memory(encoded)
    logits, _, _ = decoder.step(tokens, decoder.init_state(memory), memory)
    plain, _, _ = model.decoder.step(tokens, model.decoder.init_state(own), own)
    torch.testing.assert_close(logits, plain + model.confidence.prior(encoded, len(WORDS)))


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
