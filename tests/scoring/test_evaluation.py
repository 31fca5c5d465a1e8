"""The teacher-forced loss of a split, and the captions generated for it."""

import copy

import pytest
import torch
from conftest import tiny_config
from pycocoevalcap.cider.cider import Cider

from captioning.base.tokens import tokenize
from captioning.scoring.evaluation import caption_split, evaluate_loss, score
from data_loader import ImageDataset, get_loader
from train import build_run


@pytest.fixture(scope="module")
def trained(shared_dataset):
    """A run whose captions differ from image to image."""
    run = build_run(tiny_config(shared_dataset))
    for weight in run.model.decoder.parameters():
        torch.nn.init.normal_(weight)
    yield run
    run.lock.close()


@torch.no_grad()
@pytest.mark.parametrize("batch_size, training", [(1, False), (5, True), (100, True)])
def test_loss(trained, batch_size, training):
    """The loss of a split is the sum over its captions without dropout, for any batch size; the
    model keeps its mode."""
    model, dataset = trained.model.train(training), trained.val_loader.dataset
    nll, tokens = evaluate_loss(model, get_loader(dataset, "val", batch_size))
    assert model.training == training
    model.eval()
    expected, count = 0.0, 0
    for row, captions in enumerate(dataset.data.captions):
        image = model.encoder.project(dataset.features[[row]])
        for caption in captions:
            ids = torch.tensor([model.vocab.encode(caption)])
            log_probs = model.decoder(image, ids)[0].log_softmax(-1)
            expected -= log_probs[range(len(log_probs)), ids[0, 1:]].sum().item()
            count += len(log_probs)
    assert tokens == count
    assert nll == pytest.approx(expected, rel=1e-5)


def test_captioning_changes_no_state(dataset):
    """Captioning with a model in training mode changes neither BatchNorm nor the mode."""
    run = build_run(tiny_config(dataset, fine_tune="all"))
    model = run.model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert len(caption_split(model, run.val_images)) == 12
    assert model.training and model.encoder.cnn.network.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_captions_of_a_split(trained):
    """A split's captions are, image by image, those of `CaptionModel.caption`, in any batches."""
    model, data = trained.model, trained.val_loader.dataset.data
    images = ImageDataset(data, model.transform)
    captions = caption_split(model, images, batch_size=5, beam_size=2, max_len=9)
    assert captions == model.caption(data.paths, beam_size=2, max_len=9)
    assert captions == caption_split(model, images, beam_size=2, max_len=9)
    assert captions == caption_split(model, trained.val_images, beam_size=2, max_len=9)
    assert len(set(captions)) >= 3


def test_images_of_two_sources_are_scored_apart(trained):
    """CIDEr-D is the mean of those of the sources, each with document frequencies of its own."""
    data = copy.copy(trained.val_loader.dataset.data)
    candidates = [captions[0].split(".")[0] for captions in data.captions[1:] + data.captions[:1]]
    data.sources, vocab = ["a"] * 5 + ["b"] * (len(data) - 5), trained.model.vocab
    first = Cider().compute_score(*tokenized(data.captions[:5], candidates[:5]))[0]
    second = Cider().compute_score(*tokenized(data.captions[5:], candidates[5:]))[0]
    scores = score(candidates, data, vocab)
    assert scores["sources"]["b"]["CIDEr-D"] == pytest.approx(second)
    assert scores["CIDEr-D"] == pytest.approx((first + second) / 2)
    data.sources = [""] * len(data)
    assert score(candidates, data, vocab)["CIDEr-D"] != pytest.approx((first + second) / 2)


def tokenized(references, candidates):
    """The arguments of pycocoevalcap's scorers."""
    truth = {row: [" ".join(tokenize(text)) for text in of] for row, of in enumerate(references)}
    return truth, {row: [" ".join(tokenize(text))] for row, text in enumerate(candidates)}
