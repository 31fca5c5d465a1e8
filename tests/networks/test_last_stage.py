"""Training of the CNN's last stage on the cached maps before it."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import calibrate, calibrated_weights, tiny_config
from PIL import Image
from torch import nn

from captioning.data import features
from captioning.data.features import extract_features, fingerprint
from captioning.data.images import eval_transform
from captioning.learning.run import build_run
from captioning.networks.backbones import build_backbone
from captioning.networks.encoder import EncoderCNN
from captioning.networks.last_stage import split_last_stage
from data_loader import val_loader
from evaluate import evaluate_loss
from model import CaptionModel
from train import fit

SMALL = "mobilenet_v3_small"


def small_encoder(**changes):
    """The calibrated CNN with fine_tune "last"; `changes` are other options."""
    options = {"image_size": 64, "fine_tune": "last", "precision": "float32", **changes}
    torch.manual_seed(0)
    return EncoderCNN(16, SMALL, calibrated_weights(), **options)


def is_last(name):
    """Whether a parameter belongs to the last stage of mobilenet_v3_small: from block 9 on."""
    return any(f"features.{block}." in name for block in (9, 10, 11, 12))


@pytest.fixture
def paths(dataset):
    return sorted((dataset / "images").iterdir())


# ---------------------------------------------------------------------------- division


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(
    "name, channels",
    [
        ("resnet18", 256),
        ("mobilenet_v2", 96),
        (SMALL, 48),
        ("densenet121", 512),
        ("timm/tf_efficientnet_lite0", 112),
    ],
)
def test_division(name, channels, pooled):
    """The two parts compute, bit for bit, what the network does, from a map of twice the size."""
    torch.manual_seed(0)
    network = calibrate(build_backbone(name, None, pooled, image_size=64))
    trunk, last_stage = split_last_stage(network, name, 64)
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        maps = trunk(images)
        assert maps.shape == (3, channels, 4, 4)
        assert torch.equal(last_stage(maps), network(images))


def test_every_parameter_is_in_one_part():
    """The parts contain the parameters of the network themselves, each in one part."""
    network = build_backbone("mobilenet_v2", None)
    parts = split_last_stage(network, "mobilenet_v2", 64)
    shared = [id(weight) for part in parts for weight in part.parameters()]
    assert sorted(shared) == sorted(id(weight) for weight in network.parameters())


@pytest.mark.parametrize("name, pooled", [("vit_b_32", True), ("timm/vit_tiny_patch16_224", False)])
def test_network_without_a_last_stage(name, pooled):
    """A vision transformer, whose stages all have one resolution, is refused in one sentence."""
    with pytest.raises(ValueError, match=f"^{name} has no last stage.*use fine_tune all") as caught:
        EncoderCNN(16, name, None, fine_tune="last", image_size=224, pooled=pooled)
    assert "\n" not in str(caught.value)


def test_names_of_the_parameters():
    """The parameters have the same names, and a checkpoint the same size, for each fine_tune."""
    shapes = [
        {name: tensor.shape for name, tensor in small_encoder(fine_tune=part).state_dict().items()}
        for part in ("none", "last", "all")
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_copy():
    """A deep copy is independent, and its parts belong to its own CNN."""
    encoder = small_encoder().eval()
    copied, images = deepcopy(encoder), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = encoder(images)
        for weight in copied.backbone.parameters():
            weight.mul_(1.5)
        torch.testing.assert_close(encoder(images), before, rtol=0, atol=0)
        expected = copied.backbone(images).unsqueeze(1)
        torch.testing.assert_close(copied.forward_features(images), expected, rtol=0, atol=0)
        assert not torch.allclose(copied(images), before)


# ---------------------------------------------------------------------------- training


def test_depthwise_convolutions_in_float32():
    """Within autocast, the depthwise convolutions compute in float32, the others in bfloat16."""
    encoder, computed = small_encoder(), {}
    for name, layer in encoder.backbone.named_modules():
        if isinstance(layer, nn.Conv2d) and is_last(f"{name}."):
            layer.register_forward_hook(
                lambda layer, inputs, output, name=name: computed.update({name: output.dtype})
            )
    with torch.autocast("cpu", torch.bfloat16):
        encoder(torch.rand(2, 3, 64, 64))
    for name, dtype in computed.items():
        depthwise = encoder.backbone.get_submodule(name).groups > 1
        assert dtype == (torch.float32 if depthwise else torch.bfloat16), name
    assert len(set(computed.values())) == 2


def test_gradients():
    """The last stage without its BatchNorms has gradients, the trunk none."""
    encoder = small_encoder()
    encoder(torch.rand(2, 3, 64, 64)).square().sum().backward()
    norms = {
        f"{name}.{part}"
        for name, module in encoder.backbone.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    found = {name for name, w in encoder.backbone.named_parameters() if w.grad is not None}
    expected = {name for name, _ in encoder.backbone.named_parameters() if is_last(name)} - norms
    assert found == expected and len(expected) > 10
    assert all(encoder.backbone.get_parameter(name).grad.any() for name in found)


@pytest.mark.parametrize("inject", ["par", "attend"])
def test_training(dataset, inject):
    """A run trains the last stage without its BatchNorms; no other bit of the CNN changes."""
    options = {"flip": True, "inject": inject, "num_heads": 2}
    run = build_run(
        tiny_config(dataset, fine_tune="last", epochs=1, backbone_learning_rate=1e-3, **options)
    )
    before = deepcopy(run.model.state_dict())
    parameters = run.model.named_parameters(remove_duplicate=False)
    trained = {name for name, weight in parameters if weight.requires_grad}
    fit(run)
    assert trained > {name for name in trained if is_last(name)} > set()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


@pytest.mark.parametrize("fine_tune", ["last", "all"])
def test_learning_rates(dataset, fine_tune):
    """The trained part of the CNN has its own learning rate, and every parameter has one group."""
    run = build_run(tiny_config(dataset, fine_tune=fine_tune, backbone_learning_rate=1e-5))
    rates = {
        id(w): group["max_lr"] for group in run.optimizer.param_groups for w in group["params"]
    }
    trained = {name: w for name, w in run.model.named_parameters() if w.requires_grad}
    assert len(rates) == len(trained) == sum(len(g["params"]) for g in run.optimizer.param_groups)
    for name, weight in trained.items():
        expected = 1e-5 if name.startswith("encoder.backbone") else run.config.learning_rate
        assert rates[id(weight)] == expected


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("inject", ["par", "attend"])
def test_loss(dataset, inject, flip):
    """The loss from the cached maps is the loss from the images, of which a part is cached."""
    run = build_run(
        tiny_config(dataset, fine_tune="last", inject=inject, num_heads=2, flip=flip, dropout=0.0)
    )
    data, model = run.val_loader.dataset.data, run.model
    images = val_loader(data, model.vocab, transform=model.transform, group_images=True)
    views, *_ = next(iter(run.val_loader))
    assert views.shape[1:] == (1 + flip, 48, 4, 4)
    (cached, count), (expected, same) = (
        evaluate_loss(model, loader) for loader in (run.val_loader, images)
    )
    assert count == same and cached == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pooled", [True, False])
def test_features_of_both_views(pooled):
    """The features of an image and its flip are those of a CNN that is not divided."""
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found, expected = (
            small_encoder(fine_tune=part, flip=True, pooled=pooled).eval().forward_features(images)
            for part in ("last", "none")
        )
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------- the cache


def test_cached_maps(paths, tmp_path):
    """The cache contains the maps of the trunk, computed with folded BatchNorms, in float16."""
    encoder, transform = small_encoder(flip=True).eval(), eval_transform(64)
    found = torch.from_numpy(extract_features(encoder, paths, transform, tmp_path).features[:])
    images = torch.stack([transform(path) for path in paths])
    with torch.no_grad():
        expected = torch.stack([encoder.trunk(images), encoder.trunk(images.flip(3))], 1)
    assert found.shape == (12, 2, 48, 4, 4) and found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=4e-3, atol=4e-3)


def test_fingerprint(paths):
    """Models share a cache if they differ only in the last stage, and not with a frozen CNN."""
    transform = eval_transform(64)
    names = [fingerprint(small_encoder(fine_tune="none"), paths, transform)]
    for block in (None, 10, 3):
        encoder = small_encoder()
        if block:
            encoder.backbone.features[block].block[0][0].weight.data += 0.1
        names.append(fingerprint(encoder, paths, transform))
    assert names[1] == names[2] and len({names[0], names[1], names[3]}) == 3


def test_size_is_printed(paths, tmp_path, monkeypatch, capsys):
    """The size of many features is printed before the first is written, that of few is not."""
    encoder, transform = small_encoder(), eval_transform(64)
    extract_features(encoder, paths, transform, tmp_path / "few")
    assert capsys.readouterr().out == ""
    size = 12 * 48 * 4 * 4 * 2
    monkeypatch.setattr(features, "LARGE", size - 1)
    extract_features(encoder, paths, transform, tmp_path / "many")
    assert capsys.readouterr().out.startswith("writing 0.0 GB of features to ")


# ---------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("first, second", [("none", "last"), ("last", "none"), ("last", "all")])
def test_init_from(dataset, tmp_path, first, second):
    """A run can start from one with another fine_tune: the loss before training is the same."""
    run = build_run(tiny_config(dataset, fine_tune=first, epochs=1, backbone_learning_rate=1e-3))
    fit(run)
    config = replace(
        run.config,
        fine_tune=second,
        out=str(tmp_path / "second"),
        init_from=str(dataset / "out" / "best.pt"),
    )
    other = build_run(config)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, run.model.state_dict()[name])
    (nll, count), (expected, same) = (evaluate_loss(r.model, r.val_loader) for r in (other, run))
    assert count == same and nll == pytest.approx(expected, rel=1e-3)


def test_checkpoint_captions_photographs(dataset, paths):
    """A fine-tuned checkpoint is complete: it captions images as the model that was trained."""
    run = build_run(tiny_config(dataset, fine_tune="last", epochs=1, backbone_learning_rate=1e-2))
    fit(run)
    model = CaptionModel.from_checkpoint(dataset / "out" / "best.pt")
    image = Image.open(paths[0])
    assert model.caption([image]) == run.model.caption([image])
    batch = model.preprocess(paths[:3])
    with torch.no_grad():
        assert torch.equal(model.encode(batch), run.model.eval().encode(batch))


def test_loss_of_given_features():
    """Features without the dimension of the views are accepted by all encoders."""
    encoder = small_encoder(fine_tune="none").eval()
    given = torch.rand(2, 1, encoder.feature_size)
    torch.testing.assert_close(encoder.project(given), encoder.project(given.unsqueeze(1)))
