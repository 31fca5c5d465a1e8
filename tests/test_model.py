"""The decoder under teacher forcing, checkpoints, and captions of images.

The CNN is tested in test_backbones.py, decoding in tests/decoding.
"""

import functools
import os
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, MakeFolder, supported, tiny_model
from naive import NaiveAttentionDecoder, NaiveDecoder
from PIL import Image
from torch import nn

from captioning.base.checkpoints import export, save
from captioning.data.images import BadImageError
from captioning.learning.losses import TeacherForcing
from captioning.networks.batch_norm import BatchNorm
from captioning.networks.cnn import CNN
from captioning.networks.model_config import INJECT
from data_loader import Batch
from model import CaptionModel, DecoderRNN, EncoderCNN, ModelConfig
from vocabulary import Vocabulary

# <start> w1 .. wn <end> <pad> .., of different lengths
CAPTIONS = torch.tensor([[1, 4, 5, 8, 7, 2], [1, 6, 2, 0, 0, 0], [1, 4, 6, 3, 2, 0]])
LEARNED = ["a cat sits", "a dog runs a cat", "dog", "a cat runs runs", "a dog sits", "sits cat"]


@pytest.fixture(scope="module")
def photos(shared_dataset):
    return tuple(sorted((shared_dataset / "images").iterdir())[: len(LEARNED)])


def train(model, batch, steps, learning_rate=0.02):
    """The loss per word in the last of some optimizer steps with one batch."""
    loss = TeacherForcing(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], learning_rate)
    for _ in range(steps):
        sums = loss(batch)
        (sums["loss"] / sums["targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sums["loss"].item() / sums["targets"].item()


@functools.cache
def overfitted(photos, inject, precision):
    """A model that has learned one caption per photo, in eval mode, and its loss per word.

    The best caption of each photo is better than the next by more than 1 nat: rounding does not
    change it.
    """
    torch.manual_seed(0)
    model = tiny_model(hidden_size=32, dropout=0.0, inject=inject, precision=precision)
    captions = [torch.tensor(model.vocab.encode(caption)) for caption in LEARNED]
    captions = nn.utils.rnn.pad_sequence(captions, batch_first=True)
    with torch.no_grad():
        features = model.encoder.cnn(model.preprocess(photos))
    loss = train(model, Batch(None, captions, None, torch.arange(len(photos)), features), 100)
    return model.eval(), loss


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def precision(request):
    return supported(request.param)


@pytest.fixture(scope="module")
def model(photos):
    """A model, not to be modified."""
    return overfitted(photos, "par", "float32")[0]


# ---------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("inject", INJECT)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_teacher_forcing(inject, num_layers):
    """The logits at position t predict token t+1, given the image and the tokens up to t alone.

    The oracle reads one token at a time. The initial state is two of (num_layers, B, size).
    """
    torch.manual_seed(1)
    decoder = DecoderRNN(5, 6, 9, num_layers, dropout=0.5, inject=inject).eval()
    features = torch.randn(3, 5)
    assert [s.shape for s in decoder.init_state(features)] == [(num_layers, 3, 6)] * 2
    logits = decoder(features, CAPTIONS).detach().numpy()
    assert logits.shape == (3, 5, 9)
    naive = NaiveDecoder(decoder)
    for row, feature, caption in zip(logits, features.numpy(), CAPTIONS.tolist(), strict=True):
        np.testing.assert_allclose(row, naive.teacher_forcing(feature, caption), atol=1e-5)


@pytest.mark.parametrize("inject", INJECT)
def test_kept_predictions_and_shared_images(inject):
    """`kept` selects rows of all logits, in that order; `image_index` repeats images."""
    torch.manual_seed(2)
    decoder = DecoderRNN(5, 6, vocab_size=9, inject=inject).eval()
    features, kept = torch.randn(3, 5), torch.tensor([14, 0, 7, 7, 3])
    index = torch.tensor([2, 0, 2])
    logits = decoder(features[index], CAPTIONS).flatten(0, 1)
    found = decoder.predict(features, CAPTIONS, index, kept)
    torch.testing.assert_close(found, logits[kept])


def test_unknown_inject():
    """An unknown `inject` is an error that names the choices."""
    with pytest.raises(ValueError, match="'post'.*par.*pre.*init"):
        DecoderRNN(5, 6, 9, inject="post")


@pytest.mark.parametrize("inject", INJECT)
def test_overfit_one_batch(photos, inject, precision):
    """A model trained on one caption per photo generates exactly these, with any beam.

    Of 10 seeds, in both precisions, the largest loss was 0.007 nats per word.
    """
    model, loss = overfitted(photos, inject, precision)
    assert loss < 0.05
    for beam_size in (1, 3):
        assert model.caption(photos, beam_size=beam_size) == LEARNED


def test_batch_norm():
    """Normalizes each feature over all positions of all images, with the biased variance."""
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    mean, var = x.mean((0, 1)), x.var((0, 1), unbiased=False)
    torch.testing.assert_close(BatchNorm(4)(x), (x - mean) / (var + 1e-5).sqrt())


def test_batch_norm_of_one_vector():
    """In training, a single vector is normalized with the running statistics."""
    norm = BatchNorm(4)
    norm(torch.randn(8, 4) * 3 + 1)
    x = torch.randn(1, 4)
    trained = norm(x)
    torch.testing.assert_close(trained, norm.eval()(x))
    assert not torch.allclose(trained, x)


# ---------------------------------------------------------------------------- one's own network


class OwnNetwork(nn.Sequential):
    """Images -> (B, 8), or (B, 8, 4, 4)."""

    def __init__(self, pooled):
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pooled else [nn.AdaptiveAvgPool2d(4)]
        super().__init__(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), *pool)


@pytest.mark.parametrize("fine_tune", ["none", "all"])
@pytest.mark.parametrize("inject", ["par", "attend"])
def test_own_network(tmp_path, inject, fine_tune):
    """A module is used as the backbone, frozen or trained; its weights are in the checkpoint."""
    torch.manual_seed(0)
    config = ModelConfig(image_size=64, inject=inject, fine_tune=fine_tune, precision="float32")
    network = OwnNetwork(pooled=inject == "par")
    model, before = CaptionModel(Vocabulary(WORDS), config, None, network), deepcopy(network)
    images = torch.rand(3, 3, 64, 64)
    train(model, Batch(images, CAPTIONS, None, torch.arange(3)), 1)
    assert torch.equal(network[0].weight, before[0].weight) == (fine_tune == "none")
    save(model.eval().checkpoint(), tmp_path / "best.pt")
    with pytest.raises(ValueError, match="unknown backbone 'OwnNetwork'"):
        CaptionModel.from_checkpoint(tmp_path / "best.pt")
    other = OwnNetwork(pooled=inject == "par")
    loaded = CaptionModel.from_checkpoint(tmp_path / "best.pt", backbone=other)
    assert torch.equal(loaded(images, CAPTIONS), model(images, CAPTIONS))


@pytest.mark.parametrize(
    "pooled, message", [(True, r"pool it to \(1, C\)"), (False, "no feature map")]
)
def test_output_of_own_network(pooled, message):
    """A module whose output is not what is asked for is an error that names it."""
    with pytest.raises(ValueError, match=f"^OwnNetwork .*{message}"):
        EncoderCNN(16, OwnNetwork(not pooled), pooled=pooled)


def test_map_of_one_position():
    """A pooled output (B, C, 1, 1), such as ConvNeXt's, is a vector (B, C)."""
    network, images = OwnNetwork(pooled=True).eval(), torch.rand(2, 3, 64, 64)
    map_of_one = CNN(nn.Sequential(*list(network)[:-1]))  # without nn.Flatten
    assert torch.equal(map_of_one(images), network(images).unsqueeze(1))


# ---------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save(model.checkpoint(), path)
    return path


def test_checkpoint_round_trip(checkpoint, model, photos):
    """A model from a checkpoint gives the same logits, to the bit, and the same captions."""
    loaded, images = CaptionModel.from_checkpoint(checkpoint), model.preprocess(photos[:3])
    assert torch.equal(loaded(images, CAPTIONS), model(images, CAPTIONS))
    assert loaded.caption(photos) == LEARNED
    assert loaded.config == model.config and not loaded.training
    assert (loaded.vocab.words, loaded.vocab.threshold) == (WORDS, 2)


def test_export(checkpoint, photos, tmp_path):
    """An exported model is half as large, and its captions are the same.

    Vectors stay in float32: BatchNorm's statistics may exceed the range of half precision.
    """
    training = torch.load(checkpoint) | {"optimizer": torch.rand(1000), "history": [{"epoch": 1}]}
    save(training, tmp_path / "last.pt")
    export(tmp_path / "last.pt", tmp_path / "small.pt", {"licence": "MIT"})
    ratio = (tmp_path / "small.pt").stat().st_size / checkpoint.stat().st_size
    assert ratio < 0.58
    assert CaptionModel.from_checkpoint(tmp_path / "small.pt").caption(photos) == LEARNED
    content = torch.load(tmp_path / "small.pt")
    assert content.keys() == training.keys() - {"optimizer"}
    assert content["card"] == training["card"] | {"licence": "MIT"}
    halved = {name for name, t in content["model"].items() if t.dtype == torch.float16}
    assert halved == {name for name, t in training["model"].items() if t.dim() > 1}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    "content, message",
    [
        (torch.ones(3), "is not a checkpoint of a captioning model"),
        ([1, 2], "is not a checkpoint of a captioning model"),
        ({}, "is not a checkpoint of a captioning model"),
        ({"config": 1, "model": 2}, "of another version"),
        ({"config": {"mirror": True, "words": WORDS}, "model": {}}, "of another version"),
        ({"config": MakeFolder("made")}, "contains more than tensors"),
    ],
    ids=["tensor", "list", "empty", "no format", "older", "code"],
)
def test_neither_loaded_nor_exported(tmp_path, monkeypatch, content, message):
    """Loading and exporting refuse a file that is no checkpoint, or one in an older format, or with
    code, which is not run.
    """
    monkeypatch.chdir(tmp_path)
    torch.save(content, "other.pt")
    with pytest.raises(ValueError, match=f"other.pt .*{message}"):
        CaptionModel.from_checkpoint("other.pt")
    with pytest.raises(ValueError, match=f"other.pt .*{message}"):
        export("other.pt", "small.pt")
    assert os.listdir() == ["other.pt"]


@pytest.mark.parametrize(
    "change, error",
    [
        ({"format": 1}, "other.pt is a checkpoint of another version"),
        ({"config": {"backbone": "resnet51"}}, "unknown backbone 'resnet51'"),
        ({"config": {"colour": "red"}}, "colour"),
        ({"words": ["a", "cat"]}, "a vocabulary starts with"),
        ({"model": {}}, "Missing key"),
        ({"model": {"encoder.linear.weight": torch.zeros(2, 2)}}, "size mismatch"),
    ],
    ids=str,
)
def test_changed_checkpoint(checkpoint, tmp_path, change, error):
    """A checkpoint whose parts do not fit each other is not loaded."""
    torch.save({**torch.load(checkpoint), **change}, tmp_path / "other.pt")
    with pytest.raises((ValueError, TypeError, RuntimeError), match=error):
        CaptionModel.from_checkpoint(tmp_path / "other.pt")


# ---------------------------------------------------------------------------- captions of images


@pytest.mark.parametrize("kind", [Path, str, Image.open])
def test_kinds_of_images(model, photos, kind):
    """Images are paths, strings or PIL images, one, a list or a generator, in batches of any size;
    the captions agree. Without images there are none.
    """
    assert model.caption([kind(photo) for photo in photos], batch_size=1) == LEARNED
    assert model.caption((kind(photo) for photo in photos), batch_size=4) == LEARNED
    assert model.caption(kind(photos[0])) == LEARNED[:1]
    assert model.caption([]) == []


def test_caption_by_hand(photos, precision):
    """`caption` equals transform, encoder, decoder and vocabulary, applied one after the other."""
    model, _ = overfitted(photos, "par", precision)
    images = torch.stack([model.transform(photo) for photo in photos])
    with torch.no_grad(), model.autocast():
        decoded = model.decoder.sample(model.encoder(images), beam_size=3, n_best=2)
    by_hand = [[model.vocab.decode(ids) for ids in row] for row in decoded.tokens]
    assert model.caption(photos, n_best=2) == by_hand
    assert [best for best, _ in by_hand] == LEARNED
    features = model.encoder.cnn(images)
    assert model.decode(model.generate(features=features)) == [[caption] for caption in LEARNED]


def test_attention_maps(model, photos):
    """A map for each word of a caption and none for `<end>`: a square, where the positions are."""
    attend = tiny_model(inject="attend", hidden_size=32).eval()
    torch.manual_seed(0)
    for weight in attend.decoder.parameters():
        nn.init.normal_(weight)  # large, so that the maps of different words differ
    captions, maps = attend.caption(photos, max_len=7, return_attention=True)
    assert captions == attend.caption(photos, max_len=7)
    images, naive = attend.preprocess(photos), NaiveAttentionDecoder(attend.decoder)
    decoded = attend.generate(images, max_len=7)
    features = attend.encode(images).detach().numpy()
    for caption, weights, image in zip(captions, maps, features, strict=True):
        words, state = caption.split(), naive.init_state(image)
        assert weights.shape == (len(words), 2, 2)
        for token, found in zip([1, *map(attend.vocab, words)], weights, strict=False):
            _, state, expected = naive.step(token, state, image)
            np.testing.assert_allclose(found.flatten(), expected, atol=1e-4)
    assert max(np.ptp(weights, axis=0).max() for weights in maps if len(weights)) > 0.5
    row = decoded._replace(attention=decoded.attention[..., :3]).attention_maps()[0]
    assert row.shape == (len(captions[0].split()), 3)
    with pytest.raises(ValueError, match="--inject attend"):
        model.caption(photos, return_attention=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_converted_model(photos, precision, dtype):
    """A model converted to another data type generates the same captions."""
    model, _ = overfitted(photos, "par", precision)
    assert deepcopy(model).to(dtype).caption(photos) == LEARNED


@pytest.mark.filterwarnings("ignore")  # PyTorch's, that its quantization moves to another package
def test_quantized_model(photos, precision):
    """A model whose linear layers and LSTM are quantized generates the same captions."""
    model, _ = overfitted(photos, "par", precision)
    kinds = {torch.nn.Linear, torch.nn.LSTM}
    quantized = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    assert quantized.caption(photos) == LEARNED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_another_type(photos, dtype):
    """Images of any floating-point type are converted to that of the model."""
    model = tiny_model()
    images = model.preprocess(photos[:2]).to(dtype)
    expected = model.encoder(images.float())
    torch.testing.assert_close(model.encoder(images), expected)
    assert model(images, CAPTIONS[:2]).dtype == torch.float32


def test_images_of_integers():
    """Images of integers, which have not been normalized, are refused."""
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for call in (EncoderCNN(8, "resnet18", None), tiny_model().generate):
        with pytest.raises(ValueError, match="torch.uint8, not normalized: convert them"):
            call(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_the_caller(checkpoint, photos, device, dtype):
    """A default device and a default dtype that the caller has set change no caption.

    Tensors on "meta" have no content: whatever is created there by mistake fails.
    """
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            assert CaptionModel.from_checkpoint(checkpoint).caption(photos) == LEARNED
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # PyTorch's, of its own LSTM
@pytest.mark.parametrize("inject", ["par", "attend"])
def test_torch_export(photos, inject):
    """torch.export captures the encoder, a step of decoding and the whole model."""
    model = tiny_model(inject=inject).eval()
    images, captions = model.preprocess(photos[:2]), torch.tensor([[1, 4, 5, 2], [1, 5, 2, 0]])
    memory = model.decoder.memory(model.encoder(images))
    step = torch.ones(2, dtype=torch.long), model.decoder.init_state(memory), memory
    for module, inputs in (
        (model.encoder, (images,)),
        (model, (images, captions)),
        (Step(model.decoder), step),
    ):
        exported = torch.export.export(module, inputs).module()
        for found, expected in zip(flat(exported(*inputs)), flat(module(*inputs)), strict=True):
            torch.testing.assert_close(found, expected)


class Step(torch.nn.Module):
    """`decoder.step` as a module, which torch.export requires."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens, state, memory):
        return self.decoder.step(tokens, state, memory)[:2]


def flat(values):
    """The tensors in nested tuples."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)]


@pytest.mark.parametrize("training", [True, False])
def test_caption_keeps_the_mode(photos, training):
    """Captioning runs in eval mode, and restores the mode also after an unreadable image."""
    model = tiny_model(dropout=0.9).train(training)
    assert model.caption(photos) == model.caption(photos)
    assert model.training == model.decoder.training == training
    with pytest.raises(BadImageError, match="nothing.jpg: there is no such file"):
        model.caption("nothing.jpg")
    assert model.training == model.decoder.training == training
