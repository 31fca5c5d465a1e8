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

from captioning.data.images import BadImageError
from captioning.learning.checkpoint import export, load_safely, save
from captioning.learning.losses import TeacherForcing
from captioning.networks.layers import BatchNorm, Dropout
from model import INJECT_MODES, CaptionModel, DecoderRNN, ModelConfig

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
    weights = None if settings["backbone"].startswith("quantized") else calibrated_weights()
    return CaptionModel(WORDS, ModelConfig(**settings), weights)


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
        features = model.encoder.forward_features(images)
    loss = TeacherForcing(model, precomputed=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        nll, tokens = loss(features, captions)
        (nll / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), nll.item() / tokens.item()


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
    "inject, num_layers", [(inject, layers) for inject in INJECT_MODES for layers in (1, 2)]
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


def test_logits_at_positions():
    """With `positions`, the logits are those rows of all the logits, in that order."""
    torch.manual_seed(2)
    decoder = DecoderRNN(5, 6, vocab_size=9).eval()
    features, positions = torch.randn(3, 5), torch.tensor([14, 0, 7, 7, 3])
    logits = decoder(features, CAPTIONS).flatten(0, 1)
    torch.testing.assert_close(decoder(features, CAPTIONS, positions), logits[positions])


@pytest.mark.parametrize("inject", INJECT_MODES)
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
    with pytest.raises(ValueError, match="'post'.*pre.*par.*init"):
        DecoderRNN(5, 6, 9, inject="post")


@pytest.mark.parametrize("inject", INJECT_MODES)
def test_overfit_one_batch(photos, inject, precision):
    """A model trained on one caption per photo generates exactly these, with any beam.

    Of 10 seeds, in both precisions, the largest loss was 0.007 nats per word.
    """
    model, loss = overfitted(tuple(photos), inject=inject, precision=precision)
    assert loss < 0.05
    for beam_size in (1, 3):
        assert model.caption(photos, beam_size=beam_size) == LEARNED


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout(p):
    """A fraction p of the elements, rounded to 1/256, becomes 0; scaling preserves the mean.

    The tolerances are 6 standard deviations.
    """
    torch.manual_seed(0)
    x = torch.ones(400, 250, requires_grad=True)
    y = Dropout(p)(x)
    rounded = round(256 * p) / 256
    deviation = 6 * (rounded * (1 - rounded) / x.numel()) ** 0.5
    assert abs((y == 0).float().mean().item() - rounded) < deviation
    assert abs(y.mean().item() - 1) < deviation / (1 - rounded)
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - rounded)]))
    y.sum().backward()
    assert torch.equal(x.grad, y)
    torch.manual_seed(0)
    assert torch.equal(Dropout(p)(x), y)
    assert not torch.equal(Dropout(p)(x), y)


@pytest.mark.parametrize("p, training, kept", [(0.5, False, 1), (0.0, True, 1), (1.0, True, 0)])
def test_dropout_of_nothing_or_all(p, training, kept):
    """Dropout is the identity in eval mode and for p = 0, and drops everything for p = 1."""
    x = torch.randn(7, 3)
    assert torch.equal(Dropout(p).train(training)(x), kept * x)


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


def test_old_checkpoint(photos, tmp_path):
    """A checkpoint in the first format, with other option names, is loaded and exported."""
    model, _ = overfitted(tuple(photos), flip=True)
    content = model.checkpoint()
    config = content["config"] | {"words": content.pop("words"), "mirror": True, "blind": False}
    content["config"] = {
        k: v for k, v in config.items() if k not in ("flip", "no_image", "precision")
    }
    torch.save(content, tmp_path / "old.pt")
    export(tmp_path / "old.pt", tmp_path / "small.pt")
    for name in ("old.pt", "small.pt"):
        loaded = CaptionModel.from_checkpoint(tmp_path / name, precision="float32")
        assert loaded.config == model.config
        assert loaded.caption(photos) == LEARNED


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
    assert content.keys() == {"config", "words", "model", "history", "card"}
    halved = {name for name, t in content["model"].items() if t.dtype == torch.float16}
    assert halved == {name for name, t in training["model"].items() if t.dim() > 1}


def test_quantized_checkpoint(tmp_path):
    """A checkpoint contains the weights of an int8 CNN, which exporting does not change."""
    torch.manual_seed(0)
    model = tiny_model(backbone="quantized_shufflenet_v2_x0_5").eval()
    save(model.checkpoint(), tmp_path / "best.pt")
    export(tmp_path / "best.pt", tmp_path / "small.pt")
    images = torch.rand(2, 3, 64, 64)
    for name in ("best.pt", "small.pt"):
        torch.manual_seed(1)  # for the weights that are replaced
        encoder = CaptionModel.from_checkpoint(tmp_path / name).encoder
        assert torch.equal(encoder.forward_features(images), model.encoder.forward_features(images))


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


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"config": {"backbone": "resnet51"}},
        {"config": {"colour": "red"}},
        {"words": None},
        {"words": ["a", "cat"]},
        {"model": None},
        {"model": {}},
        {"model": {"encoder.linear.weight": torch.zeros(2, 2)}},
    ],
    ids=str,
)
def test_checkpoint_of_another_model(checkpoint, tmp_path, change):
    """A PyTorch file with other content is an error that names it."""
    torch.save({**torch.load(checkpoint), **change}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is not a checkpoint of this model"):
        CaptionModel.from_checkpoint(tmp_path / "other.pt")


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {}, {"config": 1, "model": 2}], ids=str)
def test_neither_loaded_nor_exported(tmp_path, content):
    """Both loading and exporting refuse a file that is not a checkpoint."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is not a checkpoint"):
        CaptionModel.from_checkpoint(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is not a checkpoint"):
        export(tmp_path / "other.pt", tmp_path / "small.pt")
    assert not (tmp_path / "small.pt").exists()


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
    features = model.encoder.forward_features(images)
    assert model.decode(model.generate(features, precomputed=True)) == LEARNED


def test_attention_maps(model, photos):
    """A map for each word of a caption and none for `<end>`: a square, where the positions are."""
    attend = tiny_model(inject="attend").eval()
    torch.manual_seed(0)
    for weight in (*attend.decoder.parameters(), attend.encoder.linear.weight):
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
    row = attend.attention_maps(decoded._replace(attention=decoded.attention[:, :, :3]))[0]
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
