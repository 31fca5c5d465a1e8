"""The words that the captions of an image probably have."""

import copy

import numpy as np
import pytest
import torch

from captioning.base.tokens import SPECIAL_TOKENS, START
from captioning.networks.attention import AttentionDecoder
from captioning.networks.word_detector import LENGTH, LIMIT, SMOOTHING, WEIGHT, WordDetector

SPECIAL = len(SPECIAL_TOKENS)
CAT, DOG, OWL, A = range(SPECIAL, SPECIAL + 4)
CLASSES = torch.tensor([[4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]])  # cat, dog, owl


@pytest.fixture(scope="module")
def images():
    """4,000 images (N, P, C) of a cat (odd rows) or a dog, and the words of their captions."""
    generator = torch.Generator().manual_seed(0)
    features, shares = torch.rand(4000, 2, 4, generator=generator), torch.zeros(4000, SPECIAL + 4)
    features[1::2, :, 0] += 1
    features[::2, :, 1] += 1
    shares[1::2, CAT], shares[::2, DOG], shares[:, A] = 0.8, 0.6, 1.0
    return features, shares


@pytest.fixture(scope="module")
def detector(images):
    named = [(CAT, 0), (DOG, 1), (OWL, 2)]
    return WordDetector.fit(*images, (CLASSES, torch.zeros(3)), named)


def test_probabilities(images):
    """A word has the share of captions that similar training images have; `a` always occurs."""
    found = WordDetector.fit(*images).probabilities(images[0])
    assert found[1::2, CAT].mean() == pytest.approx(0.8, abs=0.05)
    assert found[::2, DOG].mean() == pytest.approx(0.6, abs=0.05)
    assert found[::2, CAT].max() < 0.2 and found[:, A].min() > 0.9


def test_evidence(detector, images):
    """The log-odds by hand: of normalized principal components and of the classes of a word."""
    x = images[0][:5].mean(1)
    z = (x.double().numpy() - detector.center.numpy()) @ detector.basis.double().numpy()
    z = LENGTH * z / np.linalg.norm(z, axis=1, keepdims=True)
    logits = x.double().numpy() @ CLASSES.double().numpy().T
    classes = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    named = np.log((classes + 3e-3) / (detector.class_shares[CAT : OWL + 1].numpy() + 3e-3))
    expected = z @ detector.weight.double().numpy() + detector.bias.numpy()
    expected[:, CAT : OWL + 1] += detector.class_weight[CAT : OWL + 1].numpy() * named
    np.testing.assert_allclose(detector.evidence(x), expected, rtol=1e-2, atol=2e-2)


def test_gain(detector, images):
    """The weighted, limited logarithm of a word's probability over its share; 0 for special tokens
    and for words that came to the vocabulary later."""
    shares = images[1].mean(0).numpy()
    ratio = (detector.probabilities(images[0]).numpy() + SMOOTHING) / (shares + SMOOTHING)
    expected = WEIGHT * np.clip(np.log(ratio), -LIMIT, LIMIT)
    found = detector.gain(images[0], SPECIAL + 6).numpy()
    np.testing.assert_allclose(found[:, SPECIAL:-2], expected[:, SPECIAL:], atol=1e-5)
    assert not found[:, :SPECIAL].any() and not found[:, -2:].any()
    assert found[1::2, CAT].mean() > 0.1 and found[::2, CAT].mean() < -0.1


def test_supported_decoder(detector, images):
    """A step adds the gain to the logits, except for words that the caption already has."""
    plain = AttentionDecoder(8, 8, SPECIAL + 4, feature_size=4).eval()
    decoder, features = detector.supported(plain), images[0][:2]
    memory, state = decoder.memory(features), None
    state, own = decoder.init_state(memory), plain.init_state(plain.memory(features))
    gain = detector.gain(features, SPECIAL + 4)
    for said, tokens in ([], [START, START]), ([], [CAT, DOG]), ([(0, CAT), (1, DOG)], [A, CAT]):
        tokens = torch.tensor(tokens)
        logits, state, _ = decoder.step(tokens, state, memory)
        expected, own, _ = plain.step(tokens, own, plain.memory(features))
        said = [*said, *enumerate(tokens.tolist())]
        left = gain.clone()
        for row, word in said:
            left[row, word] = 0.0
        torch.testing.assert_close(logits, expected + left)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_converted(detector, images, dtype):
    """A detector of another data type finds nearly the same."""
    found = copy.deepcopy(detector).to(dtype).probabilities(images[0][:5].to(dtype))
    torch.testing.assert_close(
        found.float(), detector.probabilities(images[0][:5]), rtol=0.05, atol=0.02
    )


def test_float32_in_autocast(detector, images):
    """The probabilities are the same when the model computes in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        found = detector.probabilities(images[0][:5])
    torch.testing.assert_close(found, detector.probabilities(images[0][:5]), rtol=0, atol=0)


def test_classes_that_no_caption_names(detector, images):
    """A word of no caption gains where the CNN's classifier recognizes what it names."""
    owl = images[0][:1].clone()
    owl[:, :, :2], owl[:, :, 2] = 0.0, 2.0
    assert detector.class_weight[OWL] > 0.1
    gain = detector.class_weight * detector.class_evidence(owl.mean(1))
    others = detector.class_weight * detector.class_evidence(images[0].mean(1))
    assert gain[0, OWL] > others[:, OWL].max() + 0.5


def test_principal_components(images):
    """The components are uncorrelated directions of the scaled features, the largest last."""
    detector = WordDetector.fit(*images)
    x = images[0].mean(1)
    projected = (x - detector.center) @ detector.basis
    covariance = np.cov(projected.T.numpy())
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    assert (np.diff(np.diag(covariance)) > 0).all()
