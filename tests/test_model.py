"""The decoder under teacher forcing, checkpoints, and captions of images.

The CNN is tested in test_backbones.py, decoding in test_decoding.py.
"""

import functools
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import MakeFolder, calibrated_weights, supported
from naive import NaiveAttentionDecoder, NaiveDecoder
from PIL import Image

from captioning.base.checkpoints import export, load_safely, save
from captioning.data.images import BadImageError
from captioning.learning.losses import TeacherForcing
from captioning.networks.config import INJECT
from captioning.networks.layers import BatchNorm
from data_loader import Batch
from model import CaptionModel, DecoderRNN, EncoderCNN, ModelConfig
from vocabulary import Vocabulary

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "cat", "dog", "runs", "sits"]
# <start> w1 .. wn <end> <pad> .., of different lengths
CAPTIONS = torch.tensor([[1, 4, 5, 8, 7, 2], [1, 6, 2, 0, 0, 0], [1, 4, 6, 3, 2, 0]])
LEARNED = ["a cat sits", "a dog runs a cat", "dog", "a cat runs runs", "a dog sits", "sits cat"]


def tiny_model(**changes):
    settings = {
        "backbone": "mobilenet_v3_small",
        "image_size": 64,
        "embed_size": 16,
        "hidden_size": 32,
        "dropout": 0.0,
        "precision": "float32",
    }
    settings |= changes
    return CaptionModel(Vocabulary(WORDS, 5), ModelConfig(**settings), calibrated_weights())


@pytest.fixture(scope="module")
def photos(shared_dataset):
    return sorted((shared_dataset / "images").iterdir())[: len(LEARNED)]


@functools.cache
def overfitted(photos, **changes):
    """A model that has learned one caption per photo, in eval mode, and its loss per word."""
    torch.manual_seed(0)
    model = tiny_model(**changes)
    captions = [torch.tensor(model.vocab.encode(caption)) for caption in LEARNED]
    captions = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)
    with torch.no_grad():
        images = torch.stack([model.transform(photo) for photo in photos])
        features = model.encoder.cnn(images)
    loss = TeacherForcing(model)
    batch = Batch(None, captions, None, torch.arange(len(captions)), features)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        sums = loss(batch)
        (sums["loss"] / sums["targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), (sums["loss"] / sums["targets"]).item()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def precision(request):
    return supported(request.param)


@pytest.fixture(scope="module")
def model(photos, precision):
    """A model in each precision that this CPU supports, not to be modified.

    The best caption of each photo is better than the next by more than 1 nat: rounding does not
    change it.
    """
    return overfitted(tuple(photos), precision=precision)[0]


# ---------------------------------------------------------------------------- decoder

architectures = pytest.mark.parametrize(
    "inject, num_layers", [(inject, layers) for inject in INJECT for layers in (1, 2)]
)


@architectures
def test_decoder_shapes(inject, num_layers):
    """Logits are (B, T-1, vocab_size), and the initial state is two of (num_layers, B, size)."""
    decoder = DecoderRNN(5, 6, vocab_size=9, num_layers=num_layers, inject=inject)
    assert decoder(torch.rand(3, 5), CAPTIONS).shape == (3, 5, 9)
    assert [s.shape for s in decoder.init_state(torch.rand(3, 5))] == [(num_layers, 3, 6)] * 2


@architectures
def test_teacher_forcing(inject, num_layers):
    """The logits at position t predict token t+1, given the image and the tokens up to t alone.

    The oracle reads one token at a time.
    """
    torch.manual_seed(1)
    decoder = DecoderRNN(5, 6, vocab_size=9, num_layers=num_layers, inject=inject, dropout=0.5)
    features = torch.randn(3, 5)
    logits = decoder.eval()(features, CAPTIONS).detach().numpy()
    naive = NaiveDecoder(decoder)
    for row, feature, caption in zip(logits, features.numpy(), CAPTIONS.tolist(), strict=True):
        np.testing.assert_allclose(row, naive.teacher_forcing(feature, caption), atol=1e-5)


def test_predictions_by_index():
    """`image_index` selects the image of each caption, and `targets` rows of all the logits."""
    torch.manual_seed(2)
    decoder = DecoderRNN(5, 6, vocab_size=9).eval()
    features, targets = torch.randn(3, 5), torch.tensor([14, 0, 7, 7, 3])
    index = torch.tensor([2, 0, 2])
    logits = decoder(features[index], CAPTIONS).flatten(0, 1)
    found = decoder.predict(features, CAPTIONS, index, targets)
    torch.testing.assert_close(found, logits[targets])


@pytest.mark.parametrize("inject", INJECT)
def test_image_reaches_every_word(inject):
    """The logits of the first and of the last word depend on the image."""
    torch.manual_seed(4)
    features = torch.randn(3, 5, requires_grad=True)
    logits = DecoderRNN(5, 6, vocab_size=9, dropout=0.0, inject=inject)(features, CAPTIONS)
    for position in (0, 4):
        (gradient,) = torch.autograd.grad(logits[:, position].sum(), features, retain_graph=True)
        assert gradient.abs().min() > 0


def test_unknown_inject():
    """An unknown `inject` is an error that names the choices."""
    with pytest.raises(ValueError, match="'post'.*par, pre, init"):
        DecoderRNN(5, 6, 9, inject="post")


@pytest.mark.parametrize("inject", INJECT)
def test_overfit_one_batch(photos, inject, precision):
    """A model trained on one caption per photo generates exactly these, with any beam.

    Of 10 seeds, in both precisions, the largest loss was 0.007 nats per word.
    """
    model, loss = overfitted(tuple(photos), inject=inject, precision=precision)
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


# ---------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save(model.checkpoint(), path)
    return path


def test_checkpoint_round_trip(checkpoint, model, photos):
    """A model from a checkpoint gives the same logits, to the bit, and the same captions."""
    loaded = CaptionModel.from_checkpoint(checkpoint)
    images = torch.stack([model.transform(photo) for photo in photos])
    assert torch.equal(loaded(images[:3], CAPTIONS), model(images[:3], CAPTIONS))
    assert loaded.caption(photos) == LEARNED
    assert loaded.config == model.config and not loaded.training


def test_export(checkpoint, photos, tmp_path):
    """An exported model is half as large, and its captions are the same.

    Vectors stay in float32: BatchNorm's statistics may exceed the range of half precision.
    """
    training = torch.load(checkpoint) | {"optimizer": torch.rand(1000), "history": [{"epoch": 1}]}
    save(training, tmp_path / "last.pt")
    export(tmp_path / "last.pt", tmp_path / "small.pt")
    ratio = (tmp_path / "small.pt").stat().st_size / checkpoint.stat().st_size
    assert ratio < 0.58
    assert CaptionModel.from_checkpoint(tmp_path / "small.pt").caption(photos) == LEARNED
    content = torch.load(tmp_path / "small.pt")
    names = {"format", "config", "words", "threshold", "model", "history", "card"}
    assert content.keys() == names and content["threshold"] == 5
    halved = {name for name, t in content["model"].items() if t.dtype == torch.float16}
    assert halved == {name for name, t in training["model"].items() if t.dim() > 1}


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, -1])
def test_truncated_checkpoint(checkpoint, tmp_path, length):
    """A truncated checkpoint is an error that names the file."""
    content, path = checkpoint.read_bytes(), tmp_path / "cut.pt"
    path.write_bytes(content[: int(len(content) * length) if length == 0.5 else length])
    with pytest.raises(ValueError, match="cut.pt"):
        load_safely(path)


@pytest.mark.parametrize(
    "content", [b"hello", b"\x80\x02.", b"\x80\x02}q", b"\x80\x02G1", b"PK\x03\x04", bytes(1000)]
)
def test_foreign_file(tmp_path, content):
    """A file that PyTorch did not write is an error that names it."""
    (tmp_path / "foreign.pt").write_bytes(content)
    with pytest.raises(ValueError, match="foreign.pt"):
        load_safely(tmp_path / "foreign.pt")


def test_checkpoint_with_code(tmp_path):
    """Code in a checkpoint is not run."""
    torch.save({"config": MakeFolder(tmp_path / "made")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt contains more than tensors"):
        CaptionModel.from_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {}, {"model": 2}], ids=str)
def test_neither_loaded_nor_exported(tmp_path, content):
    """Both loading and exporting refuse a file that is not a checkpoint, by its name."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is not a checkpoint"):
        CaptionModel.from_checkpoint(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is not a checkpoint"):
        export(tmp_path / "other.pt", tmp_path / "small.pt")
    assert not (tmp_path / "small.pt").exists()


def test_checkpoint_of_another_version(checkpoint, tmp_path):
    """A checkpoint of another format, or without one, is refused in one sentence."""
    for format in (1, None):
        content = torch.load(checkpoint) | {"format": format}
        torch.save(content, tmp_path / "old.pt")
        with pytest.raises(ValueError, match=r"^\S+old.pt is a checkpoint of another version.+$"):
            CaptionModel.from_checkpoint(tmp_path / "old.pt")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"config": {"backbone": "resnet51"}}, ValueError, "unknown backbone 'resnet51'"),
        ({"config": {"colour": "red"}}, TypeError, "colour"),
        ({"words": ["a", "cat"]}, ValueError, "a vocabulary starts with"),
        ({"model": {}}, RuntimeError, "Missing key"),
    ],
    ids=str,
)
def test_errors_of_constructors(checkpoint, tmp_path, change, error, message):
    """An error in a constructor is not renamed: it says what is wrong."""
    torch.save({**torch.load(checkpoint), **change}, tmp_path / "other.pt")
    with pytest.raises(error, match=message):
        CaptionModel.from_checkpoint(tmp_path / "other.pt")


def test_no_checkpoint(tmp_path):
    """A missing checkpoint is an error that names the file."""
    with pytest.raises(FileNotFoundError, match="best.pt"):
        CaptionModel.from_checkpoint(tmp_path / "best.pt")


# ---------------------------------------------------------------------------- captions of images


@pytest.mark.parametrize("kind", [lambda path: path, str, Image.open], ids=["path", "str", "image"])
def test_kinds_of_images(model, photos, kind):
    """Images are paths, strings or PIL images, one, a list or a generator; the captions agree."""
    assert model.caption([kind(photo) for photo in photos]) == LEARNED
    assert model.caption(kind(photo) for photo in photos) == LEARNED
    assert model.caption(kind(photos[0])) == LEARNED[:1]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_caption_batch_size(model, photos, batch_size):
    """The number of images per batch changes no caption; without images there are none."""
    assert model.caption(photos, batch_size=batch_size) == LEARNED
    assert model.caption([], batch_size=batch_size) == []


def test_caption_by_hand(model, photos):
    """`caption` equals transform, encoder, decoder and vocabulary, applied one after the other."""
    images = torch.stack([model.transform(photo) for photo in photos])
    with torch.no_grad(), model.autocast():
        decoded = model.decoder.sample(model.encoder(images), beam_size=3, n_best=2)
    by_hand = [[model.vocab.decode(ids) for ids in row] for row in decoded.tokens]
    assert model.caption(photos, n_best=2) == by_hand
    assert [best for best, _ in by_hand] == LEARNED
    features = model.encoder.cnn(images)
    assert model.decode(model.generate(features=features)) == [[text] for text in LEARNED]


def test_attention_maps(model, photos):
    """A map for each word of a caption and none for `<end>`: a square, where the positions are."""
    attend = tiny_model(inject="attend").eval()
    torch.manual_seed(0)
    for weight in attend.decoder.parameters():
        torch.nn.init.normal_(weight)  # large, so that the maps of different words differ
    captions, maps = attend.caption(photos, max_len=7, return_attention=True)
    assert captions == attend.caption(photos, max_len=7)
    decoded = attend.generate(attend.preprocess(photos), beam_size=3, max_len=7)
    naive = NaiveAttentionDecoder(attend.decoder)
    with torch.no_grad():
        memory = attend.encode(attend.preprocess(photos)).numpy()
    for caption, weights, image in zip(captions, maps, memory, strict=True):
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


def test_sampled_captions(model, photos):
    """A temperature alone selects sampling, which depends on the generator."""
    captions = [
        model.caption(photos, temperature=5.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert captions[0] == captions[1] != captions[2]


def test_converted_model(model, photos):
    """A model converted to another data type generates the same captions."""
    for dtype in (torch.float64, getattr(torch, model.config.precision)):
        assert deepcopy(model).to(dtype).caption(photos) == LEARNED


def test_no_image(photos, tmp_path):
    """Without the image, all images get the same caption, also from a checkpoint."""
    model, _ = overfitted(tuple(photos))
    no_image = deepcopy(model)
    no_image.config.no_image = True
    save(no_image.checkpoint(), tmp_path / "best.pt")
    loaded = CaptionModel.from_checkpoint(tmp_path / "best.pt")
    assert len(set(loaded.caption(photos))) == 1 < len(set(model.caption(photos)))


@pytest.mark.parametrize("training", [True, False])
def test_caption_keeps_the_mode(photos, tmp_path, training):
    """Captioning runs in eval mode, and restores the mode also after an unreadable image."""
    model = tiny_model(dropout=0.9).train(training)
    assert model.caption(photos) == model.caption(photos)
    assert model.training == model.decoder.training == training
    with pytest.raises(BadImageError, match="nothing.jpg: there is no such file"):
        model.caption(tmp_path / "nothing.jpg")
    assert model.training == model.decoder.training == training


@pytest.mark.parametrize("inject", ["par", "attend"])
def test_own_network(tmp_path, inject):
    """A module of one's own serves as the CNN, and its checkpoint is loaded with it."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 5, 3, stride=16), torch.nn.AdaptiveAvgPool2d(1)]
    network = torch.nn.Sequential(*layers, torch.nn.Flatten()) if inject == "par" else layers[0]
    config = ModelConfig(backbone="mine", image_size=64, embed_size=8, inject=inject)
    model = CaptionModel(Vocabulary(WORDS), config, weights=None, backbone=network)
    image = Image.effect_noise((64, 64), 50)
    save(model.checkpoint(), tmp_path / "best.pt")
    other = deepcopy(network).apply(lambda m: m.reset_parameters() if hasattr(m, "bias") else None)
    loaded = CaptionModel.from_checkpoint(tmp_path / "best.pt", backbone=other)
    assert loaded.caption(image) == model.caption(image)
    assert EncoderCNN(8, network, pooled=inject == "par").cnn.feature_size == 5
