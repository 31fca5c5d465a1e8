"""The confidence of captions."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_model

from captioning.base.checkpoints import export, save
from captioning.base.tokens import SPECIAL_TOKENS
from captioning.data.coco import CocoCaptions
from captioning.decoding.confidence import PENALTY, REPEATED, Confidence, caption_predictors
from captioning.decoding.decoded import Decoded
from captioning.decoding.generate import generate
from captioning.networks.word_detector import WordDetector, word_shares
from captioning.scoring.calibration import calibrate, encode_images
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
    features = torch.cat([*encode_images(model, known)]).detach()
    shares = word_shares(model.vocab, known.data.captions)
    model.detector = WordDetector.fit(features, shares)
    model.confidence = calibrate(model, known, beam_size=2)
    model.known = known.data
    return model


def test_predictors():
    """Statistics of the log-probabilities, the words that are found, and repeated words."""
    shares = torch.tensor([[0, 0, 0, 0, 1, 0.5, 0.5, 0], [0, 0, 0, 0, 1, 0, 0, 1]] * 20)
    features = torch.randn(40, 3, 10, generator=torch.Generator().manual_seed(0))  # (N, P, C)
    detector = WordDetector.fit(features, shares)
    tokens = torch.tensor([[[4, 6, 2], [7, 2, 0]], [[6, 6, 6], [5, 2, 0]]])  # 2 is <end>
    log_probs = -torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(1)) - 0.1
    log_probs[tokens == 0] = 0.0
    decoded = Decoded(tokens, log_probs, None, None, None)
    found = caption_predictors(detector, features[:2], decoded)
    probability = detector.probabilities(features[:2]).double().numpy()
    idf = -np.log(shares.double().mean(0).numpy() + 1e-4)
    for image in range(2):
        for n in range(2):
            real = log_probs[image, n][tokens[image, n] != 0].numpy()
            words = sorted({int(word) for word in tokens[image, n] if word > 3})
            known = probability[image, words]
            ids = tokens[image, n].tolist()
            expected = [real.sum(), real.mean()]
            expected.append(idf[words] ** 2 @ known / (idf[words] ** 2).sum())
            expected.append(idf[words] @ known)
            expected.append(sum((ids.count(word) - 1) * idf[word] for word in words))
            np.testing.assert_allclose(found[image, n], expected, rtol=2e-3, atol=1e-5)


def test_fit():
    """A linear score of many captions is found again, whatever the scales of the predictors."""
    x = torch.randn(5000, 5, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]) + 3
    scores = x @ torch.tensor([0.2, 0.01, 1.0, 0.0, 0.5]) + 2
    confidence = Confidence.fit(x, scores)
    np.testing.assert_allclose(x @ confidence.weight + confidence.bias, scores, atol=0.1)
    penalty = PENALTY * (x[:, 4] > REPEATED)
    np.testing.assert_allclose(confidence.expected(x), scores - penalty, atol=0.1)


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
    decoder = model.detector.supported(model.decoder)
    beam = generate(decoder, encoded, beam_size=4, n_best=4)
    found = confidence(model.detector, encoded, beam).sort(1, descending=True).values
    np.testing.assert_allclose(ranked.confidence, found, atol=1e-4)
    for one, other in zip(model.decode(ranked), model.decode(beam), strict=True):
        assert sorted(one) == sorted(other)
    assert model.decode(ranked) != model.decode(beam)
    best = [best for best, *_ in model.decode(ranked)]
    assert model.caption(model.known.paths, beam_size=4) == best


def test_a_checkpoint_keeps_it(model, images, tmp_path):
    """A checkpoint and its export in half precision have the same confidence."""
    paths = images.data.paths[:4]
    expected = model.caption(paths, return_confidence=True)
    save(model.checkpoint(), tmp_path / "full.pt")
    export(tmp_path / "full.pt", tmp_path / "half.pt")
    for name, tolerance in ("full.pt", 2e-3), ("half.pt", 0.02):
        loaded = CaptionModel.from_checkpoint(tmp_path / name)
        _, confidence = loaded.caption(paths, return_confidence=True)
        np.testing.assert_allclose(confidence, expected[1], rtol=tolerance)


def test_without_calibration(images):
    """A model without calibration captions as usual, and says so when it is asked."""
    model = tiny_model(WORDS, inject="attend")
    assert next(model.describe(images.data.paths[0])).confidence is None
    with pytest.raises(ValueError, match="not been calibrated"):
        model.caption(images.data.paths[0], return_confidence=True)
