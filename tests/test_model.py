"""The encoder, the decoder under teacher forcing, checkpoints, and images on their way in.

Decoding has its own file, test_decoding.py.
"""

import os
import random
import runpy
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from conftest import seeing_weights, wake
from naive import NaiveDecoder, log_softmax
from PIL import Image

from engine import caption_nll
from model import (
    BadImageError,
    CaptionModel,
    DecoderRNN,
    EncoderCNN,
    eval_transform,
    load_image,
    load_safely,
    train_transform,
)

ROOT = Path(__file__).parent.parent
WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "cat", "dog", "runs", "sits"]
# <start> w1 .. wn <end> <pad> .., of different lengths
CAPTIONS = torch.tensor([[1, 4, 5, 8, 7, 2], [1, 6, 2, 0, 0, 0], [1, 4, 6, 3, 2, 0]])
SMALL = "mobilenet_v3_small"


def tiny_model(**changes):
    settings = {"backbone": SMALL, "weights": seeing_weights(), "image_size": 64}
    return CaptionModel(WORDS, **{**settings, "embed_size": 16, "hidden_size": 16, **changes})


@pytest.fixture(scope="module")
def model():
    """A model that the tests only look at; its captions are nonsense, another for each image."""
    torch.manual_seed(0)
    model = tiny_model(inject="par").eval()
    for weight in [*model.decoder.parameters(), *model.encoder.linear.parameters()]:
        torch.nn.init.normal_(weight)
    return model


@pytest.fixture(scope="module")
def photos(shared_dataset):
    return sorted((shared_dataset / "images").iterdir())[:6]


# ---------------------------------------------------------------------------- decoder

shapes_of_decoder = pytest.mark.parametrize(
    "inject, num_layers",
    [(inject, layers) for inject in ("pre", "par", "init") for layers in (1, 2)],
)


@shapes_of_decoder
def test_decoder_shapes(inject, num_layers):
    """Logits are (B, T-1, vocab_size), and a start state is two of (num_layers, B, hidden_size)."""
    decoder = DecoderRNN(5, 6, vocab_size=9, num_layers=num_layers, inject=inject)
    assert decoder(torch.rand(3, 5), CAPTIONS).shape == (3, 5, 9)
    assert [s.shape for s in decoder.start_state(torch.rand(3, 5))] == [(num_layers, 3, 6)] * 2


@shapes_of_decoder
def test_teacher_forcing(inject, num_layers):
    """The logits at position t are those of word t+1, from the words up to t and the image alone.

    The oracle reads one word at a time and could not look ahead.
    """
    torch.manual_seed(1)
    decoder = DecoderRNN(5, 6, vocab_size=9, num_layers=num_layers, inject=inject, dropout=0.5)
    features = torch.randn(3, 5)
    logits = decoder.eval()(features, CAPTIONS).detach().numpy()
    naive = NaiveDecoder(decoder)
    for row, feature, caption in zip(logits, features.numpy(), CAPTIONS.tolist(), strict=True):
        np.testing.assert_allclose(row, naive.teach(feature, caption), atol=1e-5)


@pytest.mark.parametrize("inject", ["pre", "par", "init"])
def test_loss_counts_words_and_end(inject):
    """The loss sums -log p over every word and `<end>`: never over `<start>` or `<pad>`."""
    torch.manual_seed(2)
    model = tiny_model(inject=inject).eval()
    features = torch.randn(3, model.encoder.feature_size)
    nll, tokens = caption_nll(model, features, CAPTIONS)

    naive, expected = NaiveDecoder(model.decoder), []
    embedded = model.encoder.linear(features).detach().numpy()
    for feature, caption in zip(embedded, CAPTIONS.tolist(), strict=True):
        for logits, word in zip(naive.teach(feature, caption), caption[1:], strict=True):
            if word != 0:
                expected.append(-log_softmax(logits)[word])
    assert tokens == len(expected) == 5 + 2 + 4
    assert nll.item() == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("inject", ["pre", "par", "init"])
def test_padding_changes_nothing(inject):
    """More columns of `<pad>` behind the captions change no logit before them, and no loss."""
    torch.manual_seed(3)
    model = tiny_model(inject=inject).eval()
    padded = torch.nn.functional.pad(CAPTIONS, (0, 4))
    features = torch.randn(3, model.encoder.feature_size)
    embedded = model.encoder(features)
    torch.testing.assert_close(
        model.decoder(embedded, padded)[:, :5], model.decoder(embedded, CAPTIONS)
    )
    nll, tokens = caption_nll(model, features, CAPTIONS)
    padded_nll, padded_tokens = caption_nll(model, features, padded)
    assert padded_nll.item() == pytest.approx(nll.item(), rel=1e-6)
    assert padded_tokens == tokens


@pytest.mark.parametrize("inject", ["pre", "par", "init"])
def test_image_reaches_every_word(inject):
    """The logits of the first and of the last word depend on the image, in every mode."""
    torch.manual_seed(4)
    features = torch.randn(3, 5, requires_grad=True)
    logits = DecoderRNN(5, 6, vocab_size=9, inject=inject)(features, CAPTIONS)
    for position in (0, 4):
        (gradient,) = torch.autograd.grad(logits[:, position].sum(), features, retain_graph=True)
        assert gradient.abs().min() > 0


def test_unknown_inject():
    """An unknown way to inject the image is an error that names the choices."""
    with pytest.raises(ValueError, match="'post'.*pre.*par.*init"):
        DecoderRNN(5, 6, 9, inject="post")


@pytest.mark.parametrize("inject", ["pre", "par", "init"])
def test_overfit_one_batch(inject):
    """A decoder that has learnt four captions by heart says exactly these, by any beam."""
    torch.manual_seed(5)
    captions = torch.tensor(
        [[1, 4, 5, 8, 2, 0, 0], [1, 4, 6, 7, 4, 5, 2], [1, 6, 2, 0, 0, 0, 0], [1, 4, 5, 7, 7, 2, 0]]
    )
    model = tiny_model(inject=inject, hidden_size=32)
    features = torch.randn(4, model.encoder.feature_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        nll, tokens = caption_nll(model, features, captions)
        (nll / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert nll.item() / tokens < 0.02
    expected = [[word for word in row if word > 2] for row in captions.tolist()]
    for beam_size in (1, 3):
        assert model.decoder.sample(model.encoder(features), beam_size) == expected


# ---------------------------------------------------------------------------- encoder


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", "resnet50", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "densenet121"],
)
def test_backbones(backbone):
    """Any classification network becomes an encoder: its features are (B, feature_size)."""
    encoder = EncoderCNN(16, backbone, weights=None).eval()
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        assert encoder.pool(images).shape == (2, encoder.feature_size)
        assert encoder(images).shape == (2, 16)


def test_features_or_images(model):
    """The encoder gives the same for images and for their pooled features."""
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.encoder(images), model.encoder(model.encoder.pool(images)))


def test_quantized_backbone():
    """A CNN in int8 sees nearly what the same CNN sees in float32."""
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 6), size=96)
    torch.manual_seed(0)
    encoder = EncoderCNN(16, "quantized_resnet18", weights=None).eval()
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()  # the same random weights
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        int8, float32 = encoder.pool(images), network(images)
    assert 0 < (int8 - float32).norm() < 0.1 * float32.norm()


def test_quantized_backbone_in_a_checkpoint(tmp_path, photos):
    """A checkpoint keeps the weights of a CNN in int8: what is loaded says and sees the same."""
    torch.manual_seed(0)
    model = tiny_model(backbone="quantized_shufflenet_v2_x0_5", weights=None).eval()
    torch.save({"config": model.config, "model": model.state_dict()}, tmp_path / "best.pt")
    torch.manual_seed(1)  # for the weights that those of the file replace
    loaded = CaptionModel.from_checkpoint(tmp_path / "best.pt")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded.encoder.pool(images), model.encoder.pool(images))
    assert loaded.caption(photos) == model.caption(photos)


def test_float32_weights_for_a_quantized_backbone(tmp_path):
    """The weights of a CNN in float32 are not those of its quantized form: an error names both."""
    network = torchvision.models.resnet18(weights=None)
    torch.save(network.state_dict(), tmp_path / "float32.pth")
    with pytest.raises(ValueError, match="float32.pth does not hold weights of quantized_resnet18"):
        EncoderCNN(16, "quantized_resnet18", weights=tmp_path / "float32.pth")


def test_quantized_backbone_elsewhere():
    """int8 can neither be trained nor run on a GPU, and says so."""
    with pytest.raises(ValueError, match="quantized_resnet18 .* cannot be fine-tuned"):
        EncoderCNN(16, "quantized_resnet18", weights=None, fine_tune=True)
    encoder = EncoderCNN(16, "quantized_resnet18", weights=None)
    with pytest.raises(ValueError, match="CPU only"):
        encoder.pool(torch.rand(1, 3, 64, 64, device="meta"))


def train_a_little(model):
    """Three real steps in train mode, on images; the backbone's state before and after."""
    before = {name: t.clone() for name, t in model.encoder.backbone.state_dict().items()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        model.train()
        nll, tokens = caption_nll(model, torch.rand(3, 3, 64, 64), CAPTIONS)
        (nll / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, model.encoder.backbone.state_dict()


def test_mirror():
    """With `mirror` an image and its mirror image give the same features, their mean without it."""
    images = torch.rand(2, 3, 64, 64)
    plain = EncoderCNN(4, SMALL, seeing_weights(), image_size=64).eval()
    both = EncoderCNN(4, SMALL, seeing_weights(), image_size=64, mirror=True).eval()
    flipped = torch.from_numpy(images.numpy()[..., ::-1].copy())
    with torch.no_grad():
        mean = (plain.pool(images) + plain.pool(flipped)) / 2
        assert (plain.pool(images) - plain.pool(flipped)).abs().max() > 1e-2
        torch.testing.assert_close(both.pool(images), mean)
        torch.testing.assert_close(both.pool(flipped), mean)


def test_frozen_backbone_stays():
    """Training changes no bit of a frozen CNN: no weight and no BatchNorm statistic."""
    before, after = train_a_little(tiny_model(dropout=0.5))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_frozen_backbone_is_in_eval_mode():
    """`train()` reaches the decoder and the linear layer, but no part of a frozen CNN."""
    model = tiny_model().train()
    assert model.decoder.training and model.encoder.linear.training
    assert not any(module.training for module in model.encoder.backbone.modules())
    assert not any(weight.requires_grad for weight in model.encoder.backbone.parameters())


def test_fine_tuning_trains_the_backbone():
    """With `fine_tune`, the weights of the CNN and its BatchNorm statistics do change."""
    before, after = train_a_little(tiny_model(fine_tune=True))
    for name in ("features.0.0.weight", "features.0.1.running_mean"):
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("fine_tune", [False, True])
def test_new_encoder_is_in_train_mode(fine_tune):
    """Like any module, an encoder begins in train mode, and its CNN with it if that is trained."""
    encoder = EncoderCNN(16, SMALL, weights=None, fine_tune=fine_tune)
    assert encoder.training and encoder.backbone.training == fine_tune


def test_blind_model(photos):
    """A blind model, also out of its checkpoint, says the same of images however different."""
    torch.manual_seed(3)
    model = tiny_model(blind=True, inject="par")
    for weight in model.decoder.parameters():
        torch.nn.init.normal_(weight)
    again = CaptionModel(weights=None, **model.config)
    again.load_state_dict(model.state_dict())
    assert len(set(again.caption(photos))) == 1
    again.encoder.blind = False
    assert len(set(again.caption(photos))) > 1


def test_linear_layer_trains():
    """The linear layer on the features of a frozen CNN is trained with the decoder."""
    model = tiny_model()
    before = model.encoder.linear.weight.clone()
    train_a_little(model)
    assert not torch.equal(model.encoder.linear.weight, before)


def test_unknown_backbone():
    """An unknown backbone is an error that names the known ones."""
    with pytest.raises(ValueError, match="'resnet51'.*resnet50"):
        EncoderCNN(16, "resnet51", weights=None)


# ---------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(6)
    return wake(torchvision.models.get_model(SMALL, weights=None))


@pytest.mark.parametrize("kept", ["everything", "no classifier", "half precision"])
def test_weights_from_a_file(tmp_path, network, kept):
    """A state dict is loaded with or without its classifier, in single or half precision."""
    state, tolerance = network.state_dict(), 1e-6
    if kept == "no classifier":
        state = {name: t for name, t in state.items() if not name.startswith("classifier")}
    if kept == "half precision":
        state = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
        tolerance = 1e-2
    torch.save(state, tmp_path / "weights.pt")
    encoder = EncoderCNN(16, SMALL, weights=str(tmp_path / "weights.pt")).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.avgpool(network.features(images)).flatten(1)
        torch.testing.assert_close(encoder.pool(images), expected, atol=tolerance, rtol=tolerance)
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}


def test_weights_of_googlenet(tmp_path):
    """GoogLeNet's weights load although its auxiliary classifiers are gone; its input changes.

    torchvision feeds it images normalised in its own way, whenever it loads trained weights.
    """
    network = wake(torchvision.models.googlenet(weights=None, init_weights=False))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    encoder = EncoderCNN(16, "googlenet", weights=tmp_path / "weights.pt").eval()
    network.fc, network.transform_input = torch.nn.Identity(), True
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder.pool(images), network(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("content", ["another network", "a tensor", "a list", "other keys"])
def test_weights_of_something_else(tmp_path, network, content):
    """A file that holds other things than this network's weights is an error that names it."""
    things = {
        "another network": torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(),
        "a tensor": torch.rand(3),
        "a list": [1, 2],
        "other keys": {1: torch.rand(3)},
    }
    torch.save(things[content], tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"weights.pt does not hold weights of {SMALL}"):
        EncoderCNN(16, SMALL, weights=tmp_path / "weights.pt")


def test_unknown_weights():
    """A name that is neither a file nor torchvision's is an error that names the choices."""
    with pytest.raises(ValueError, match="'IMAGENET1K_V9'.*no such file.*IMAGENET1K_V1"):
        EncoderCNN(16, SMALL, weights="IMAGENET1K_V9")


def test_download_fails(tmp_path, monkeypatch):
    """Without the network, the error names the address and the folder to put the file into."""

    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(ConnectionError) as caught:
        EncoderCNN(16, SMALL, weights="DEFAULT")
    message = str(caught.value)
    assert "no route to host" in message
    assert "https://download.pytorch.org/models/mobilenet_v3_small" in message
    assert str(tmp_path / "hub" / "checkpoints") in message


# ---------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    torch.save({"config": model.config, "model": model.state_dict()}, path)
    return path


def test_checkpoint_round_trip(checkpoint, model, photos):
    """A model from a checkpoint gives the same logits, to the bit, and the same captions."""
    loaded = CaptionModel.from_checkpoint(checkpoint)
    images = torch.stack([model.transform(photo) for photo in photos])
    assert torch.equal(loaded(images[:3], CAPTIONS), model(images[:3], CAPTIONS))
    assert loaded.caption(photos) == model.caption(photos)
    assert not loaded.training


def test_truncated_checkpoint(checkpoint, tmp_path):
    """A checkpoint cut off anywhere is an error that names the file."""
    whole, path = checkpoint.read_bytes(), tmp_path / "cut.pt"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.pt"):
            load_safely(path)


@pytest.mark.parametrize(
    "content", [b"hello", b"\x80\x02.", b"\x80\x02}q", b"\x80\x02G1", b"PK\x03\x04", bytes(1000)]
)
def test_foreign_file(tmp_path, content):
    """A file that PyTorch did not write is an error that names it, whatever its bytes."""
    (tmp_path / "foreign.pt").write_bytes(content)
    with pytest.raises(ValueError, match="foreign.pt"):
        load_safely(tmp_path / "foreign.pt")


class Intruder:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_checkpoint_with_code(tmp_path):
    """Code hidden in a checkpoint does not run."""
    torch.save({"config": Intruder(tmp_path / "made by the intruder")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt holds more than tensors"):
        CaptionModel.from_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "made by the intruder").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"config": {"words": WORDS, "backbone": "resnet51"}},
        {"config": {"words": WORDS, "colour": "red"}},
        {"model": None},
        {"model": {}},
        {"model": {"encoder.linear.weight": torch.rand(2, 2)}},
    ],
    ids=["no config", "backbone", "argument", "no model", "no weights", "other weights"],
)
def test_checkpoint_of_something_else(checkpoint, tmp_path, change):
    """A PyTorch file that is no checkpoint of this model is an error that names it."""
    torch.save({**torch.load(checkpoint), **change}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is not a checkpoint of this model"):
        CaptionModel.from_checkpoint(tmp_path / "other.pt")


def test_no_checkpoint(tmp_path):
    """A missing checkpoint is an error that names the file."""
    with pytest.raises(FileNotFoundError, match="best.pt"):
        CaptionModel.from_checkpoint(tmp_path / "best.pt")


# ---------------------------------------------------------------------------- captions of images


def test_one_road_for_every_image(model, photos):
    """A path, its string, the open image and the steps by hand all give the same caption."""
    features = model.encoder(torch.stack([model.transform(photo) for photo in photos]))
    by_hand = [model.text(ids) for ids in model.decoder.sample(features, beam_size=3)]
    assert all(isinstance(caption, str) for caption in by_hand) and len(set(by_hand)) > 2
    assert model.caption(photos) == by_hand
    assert model.caption([str(photo) for photo in photos]) == by_hand
    assert model.caption([Image.open(photo) for photo in photos]) == by_hand
    for photo, caption in zip(photos, by_hand, strict=True):
        for single in (photo, str(photo), Image.open(photo)):
            assert model.caption(single) == [caption]


def test_batches_of_images(model, photos):
    """The number of images captioned at a time changes no caption; no image, no caption."""
    assert model.caption(photos, batch_size=1) == model.caption(photos, batch_size=2)
    assert model.caption([]) == []


def test_caption_takes_any_series(model, photos):
    """Images may come from a generator as well as in a list."""
    assert model.caption(path for path in photos) == model.caption(photos)


def test_caption_draws(model, photos):
    """With a temperature nothing else has to be said: words are drawn, not searched by a beam."""
    one, other = (
        model.caption(photos, temperature=2.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    assert one != other


def test_caption_in_another_precision(photos):
    """A model converted to another precision captions images from files, too."""
    model = tiny_model()
    assert model.double().caption(photos) == model.float().caption(photos)


@pytest.mark.parametrize("training", [True, False])
def test_caption_keeps_the_mode(photos, training):
    """Captioning happens in eval mode and leaves the model in the mode it was in."""
    model = tiny_model(dropout=0.9).train(training)
    assert model.caption(photos) == model.caption(photos)
    assert model.training == model.decoder.training == training


def test_caption_keeps_the_mode_after_a_bad_image(tmp_path):
    """An unreadable image is an error that names it, and leaves the model in its mode too."""
    model = tiny_model().train()
    with pytest.raises(BadImageError, match="nothing.jpg: there is no such file"):
        model.caption(tmp_path / "nothing.jpg")
    assert model.training


# ---------------------------------------------------------------------------- images


def saved(image, path, **options):
    image.save(path, **options)
    return path


GREY = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


def test_grey_image(tmp_path):
    """A grey image becomes an RGB image of three equal channels."""
    image = np.asarray(load_image(saved(Image.fromarray(GREY), tmp_path / "grey.png")))
    np.testing.assert_array_equal(image, np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_become_white(tmp_path, mode):
    """What is transparent becomes white, and what is not keeps its colour."""
    pixels = np.zeros((2, 2, len(mode)), dtype=np.uint8)  # black,
    pixels[0, :, -1] = 255  # with an opaque upper row and a transparent lower one
    path = saved(Image.fromarray(pixels, mode=mode), tmp_path / "image.png")
    image = np.asarray(load_image(path))
    np.testing.assert_array_equal(image[0], 0)
    np.testing.assert_array_equal(image[1], 255)


def test_palette_with_transparency(tmp_path):
    """In an image with a palette, the transparent colour becomes white, the others stay."""
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    path = saved(image, tmp_path / "palette.png", transparency=1)
    np.testing.assert_array_equal(load_image(path), [[[255, 0, 0], [255, 255, 255]]])


def test_cmyk_jpeg(tmp_path):
    """A JPEG for print, in CMYK, keeps its colours."""
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image = np.asarray(load_image(saved(red, tmp_path / "print.jpg"))).astype(int)
    assert np.abs(image - [255, 0, 0]).max() < 12


def test_sixteen_bits(tmp_path):
    """A PNG of 16 bits a pixel is scaled to 8, not clipped: the darkest and brightest stay so."""
    deep = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = np.asarray(load_image(saved(Image.fromarray(deep), tmp_path / "deep.png")))
    np.testing.assert_allclose(image[0, :, 0], [0, 1, 128, 255], atol=1)


@pytest.mark.parametrize("kind, white", [(np.int32, 65535), (np.int32, 255), (np.float32, 255),
                                         (np.float32, 1)])  # fmt: skip
def test_integers_and_floats(kind, white):
    """Pixels that are integers or floats keep their brightness, whatever stands for white."""
    pixels = (np.array([[0.0, 0.25, 0.5, 1.0]]) * white).astype(kind)
    image = np.asarray(load_image(Image.fromarray(pixels)))
    np.testing.assert_allclose(image[0, :, 0], [0, 64, 128, 255], atol=1)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 3)])
def test_a_line_is_no_image(tmp_path, size):
    """An image so long and thin that resizing it would take gigabytes counts as unreadable."""
    with pytest.raises(BadImageError, match=f"line.png.*{size[0]} x {size[1]}"):
        load_image(saved(Image.new("RGB", size), tmp_path / "line.png"))


def test_exif_rotation(tmp_path):
    """A photo that a camera stored lying on its side is stood upright."""
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    lying, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees, clockwise
    path = saved(lying, tmp_path / "lying.png", exif=exif)
    np.testing.assert_array_equal(load_image(path), np.rot90(pixels, k=-1))


def test_reduced_decoding(tmp_path):
    """A large JPEG decoded in less detail is no smaller than asked for, and looks the same."""
    y, x = np.mgrid[:600, :800]
    waves = [np.sin(x / 30), np.cos(y / 20), np.sin((x + y) / 40)]
    large = Image.fromarray((127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8))
    path = saved(large, tmp_path / "large.jpg", quality=95)
    reduced = load_image(path, min_size=200)
    assert 200 <= min(reduced.size) < 600
    full, reduced = (image.resize((64, 64)) for image in (load_image(path), reduced))
    assert np.abs(np.asarray(full, dtype=int) - np.asarray(reduced)).mean() < 2


@pytest.mark.parametrize("size", [(48, 48), (200, 90), (31, 500)])
def test_eval_transform(tmp_path, size):
    """Any image becomes (3, size, size), normalised, the same every time."""
    path = saved(Image.effect_noise(size, 80), tmp_path / "noise.png")
    transform = eval_transform(64)
    image = transform(path)
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert torch.equal(image, transform(path))
    assert torch.equal(image, transform(Image.open(path)))


def test_normalisation(tmp_path):
    """A pixel is scaled to 0..1, less ImageNet's mean, over ImageNet's standard deviation."""
    path = saved(Image.new("RGB", (10, 10), (255, 0, 51)), tmp_path / "plain.png")
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    for transform in (eval_transform(8), train_transform(8)):
        torch.testing.assert_close(transform(path).mean((1, 2)), torch.tensor(expected))


def test_train_transform_never_mirrors(tmp_path):
    """A training crop is drawn, but never mirrored: left stays left."""
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    path = saved(Image.fromarray(ramp), tmp_path / "ramp.png")
    crops = torch.stack([train_transform(32)(path) for _ in range(20)])
    assert (crops[..., -1] > crops[..., 0]).all()
    assert not torch.equal(crops[0], crops[1])


# ---------------------------------------------------------------------------- the file itself


def torch_state():
    return {
        "seed": torch.get_rng_state().tolist(),
        "numpy's seed": str(np.random.get_state()),
        "Python's seed": random.getstate(),
        "device": torch.get_default_device(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("module", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_import_has_no_side_effect(module, tmp_path, monkeypatch, capfd):
    """Importing a module prints nothing, writes nothing, and touches no seed and no device."""
    monkeypatch.chdir(tmp_path)
    before = torch_state()
    runpy.run_path(str(module), run_name=f"imported_{module.stem}")
    assert torch_state() == before
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
