"""The training loss."""

import pytest
import torch
from conftest import calibrated_weights
from naive import NaiveDecoder, log_softmax

from captioning.learning.losses import TeacherForcing
from model import INJECT_MODES, CaptionModel, ModelConfig

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "cat", "dog", "runs", "sits"]
CAPTIONS = torch.tensor([[1, 4, 5, 8, 7, 2], [1, 6, 2, 0, 0, 0], [1, 4, 6, 3, 2, 0]])


@pytest.fixture(scope="module", params=INJECT_MODES)
def model(request):
    torch.manual_seed(2)
    config = ModelConfig(
        backbone="mobilenet_v3_small",
        image_size=64,
        embed_size=16,
        hidden_size=16,
        inject=request.param,
        precision="float32",
    )
    return CaptionModel(WORDS, config, calibrated_weights()).eval()


@pytest.fixture(scope="module")
def features(model):
    torch.manual_seed(3)
    return torch.randn(3, 1, model.encoder.feature_size)


def test_loss_counts_words_and_end(model, features):
    """The loss is the sum of -log p over all words and `<end>`, without `<start>` and `<pad>`."""
    nll, tokens = TeacherForcing(model, precomputed=True)(features, CAPTIONS)
    naive, expected = NaiveDecoder(model.decoder), []
    embedded = model.encoder.project(features).detach().numpy()
    for feature, caption in zip(embedded, CAPTIONS.tolist(), strict=True):
        logits = naive.teacher_forcing(feature, caption)
        expected += [
            -log_softmax(row)[word]
            for row, word in zip(logits, caption[1:], strict=True)
            if word != 0
        ]
    assert tokens.item() == len(expected) == 5 + 2 + 4
    assert nll.item() == pytest.approx(sum(expected), rel=1e-5)


def test_loss_gradient(model, features):
    """The gradient of the loss is that of the cross-entropy of `decoder(features, captions)`."""
    logits = model.decoder(model.encode(features, precomputed=True), CAPTIONS)
    log_probs = logits.log_softmax(2).gather(2, CAPTIONS[:, 1:, None]).squeeze(2)
    expected = -(log_probs * (CAPTIONS[:, 1:] != 0)).sum()
    nll, _ = TeacherForcing(model, precomputed=True)(features, CAPTIONS)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for found, right in zip(
        *(torch.autograd.grad(x, weights) for x in (nll, expected)), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(model, features):
    """More columns of `<pad>` change no logit before them, and no loss."""
    padded = torch.nn.functional.pad(CAPTIONS, (0, 4))
    embedded = model.encode(features, precomputed=True)
    torch.testing.assert_close(
        model.decoder(embedded, padded)[:, :5], model.decoder(embedded, CAPTIONS)
    )
    loss = TeacherForcing(model, precomputed=True)
    torch.testing.assert_close(loss(features, padded), loss(features, CAPTIONS))


def test_images_or_features(model):
    """The loss given images is that given their precomputed features."""
    torch.manual_seed(4)
    images = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(
        TeacherForcing(model)(images, CAPTIONS),
        TeacherForcing(model, precomputed=True)(model.encoder.forward_features(images), CAPTIONS),
    )


def test_grouped_images(model, features):
    """With `image_index`, captions share images as if each image had been repeated."""
    index = torch.tensor([2, 0, 2])
    loss = TeacherForcing(model, precomputed=True)
    torch.testing.assert_close(
        loss(features, CAPTIONS, image_index=index), loss(features[index], CAPTIONS)
    )


def test_label_smoothing(model, features):
    """In training, the gradient is that of smoothed targets; the value is always the likelihood."""
    loss = TeacherForcing(model, precomputed=True, label_smoothing=0.2)
    plain, _ = TeacherForcing(model, precomputed=True)(features, CAPTIONS)
    model.decoder.dropout.p = 0.0
    weight = model.decoder.linear.weight
    for training in (False, True):
        loss.train(training)
        nll, _ = loss(features, CAPTIONS)
        torch.testing.assert_close(nll, plain)
        logits = model.decoder(model.encode(features, precomputed=True), CAPTIONS)
        log_probs, targets = logits.log_softmax(2), CAPTIONS[:, 1:]
        smooth = torch.nn.functional.one_hot(targets, len(WORDS)).float()
        if training:
            smooth = 0.8 * smooth + 0.2 / len(WORDS)
        expected = -(smooth * log_probs * (targets != 0).unsqueeze(2)).sum()
        found, right = (torch.autograd.grad(x, weight)[0] for x in (nll, expected))
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    model.eval()
