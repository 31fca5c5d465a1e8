"""Pre-trained networks of torchvision and timm without their classifier.

network = build_backbone("resnet50", weights="DEFAULT")    # classifier removed
network(images)                                            # (B, 2048), pooled
build_backbone("resnet50", weights=None, pooled=False)(images)    # (B, 2048, 7, 7), the last map
build_backbone("timm/vit_small_patch16_224", weights="DEFAULT", pooled=False)    # (B, 384, 14, 14)
transform = eval_transform(**input_settings("timm/vit_small_patch16_224"))
"""

import difflib
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from captioning.base.checkpoints import load_safely

CLASSIFIER_NAMES = ("fc", "classifier", "heads", "head")
AUXILIARY_NAMES = ("AuxLogits", "aux1", "aux2")  # Inception's and GoogLeNet's extra classifiers
TIMM = "timm/"  # prefix of the names of timm's networks
IMAGE_SIZE = 224  # of torchvision's networks


def input_settings(name, image_size=None) -> dict:
    """The arguments of `images.eval_transform` and `train_transform` for a network.

    image_size: None for the network's own: 224 pixels for torchvision's, and what timm's data
        configuration says, like the normalization and the interpolation, for timm's.
    """
    if not name.startswith(TIMM):
        return {"image_size": image_size or IMAGE_SIZE}
    settings = _timm(name).data.resolve_data_config(
        pretrained_cfg=_timm(name).get_pretrained_cfg(name.removeprefix(TIMM)).to_dict()
    )
    return {
        "image_size": image_size or settings["input_size"][-1],
        "mean": settings["mean"],
        "std": settings["std"],
        "interpolation": settings["interpolation"],
    }


def build_backbone(name, weights, pooled=True, image_size=None) -> nn.Module:
    """The classification network `name` without its classifier.

    name: of torchvision, or "timm/" and a name of timm.
    weights: "DEFAULT", a name that torchvision knows ("IMAGENET1K_V1"), the path of a state dict,
        or None for random weights.
    pooled: return the pooled features (B, C); otherwise the last feature map (B, C, H, W), or the
        tokens of a transformer's patches in that form, for images of `image_size` pixels.

    Raises ValueError for an unknown network or weights that do not fit, ConnectionError if the
    weights cannot be downloaded.
    """
    image_size = input_settings(name, image_size)["image_size"]
    if name.startswith(TIMM):
        return _TimmNetwork(name, weights, pooled, image_size)
    models = torchvision.models
    known = models.list_models(module=models), models.list_models(module=models.quantization)
    if name not in known[0] + known[1]:
        raise ValueError(f"unknown backbone {name!r}; torchvision has {', '.join(sum(known, []))}")
    options = {"quantize": True} if is_quantized(name) else {}
    from_file = weights is not None and Path(weights).is_file()
    with warnings.catch_warnings():  # about future defaults, raised by torchvision's own calls
        warnings.simplefilter("ignore")
        if weights is None or from_file:
            network = models.get_model(name, weights=None, **options)
        else:
            network = _download(name, weights, **options)
    # Inception and GoogLeNet were trained with another normalization. `transform_input` converts
    # ImageNet's to it; torchvision sets it only for weights that it has downloaded itself.
    for auxiliary in AUXILIARY_NAMES:
        if hasattr(network, auxiliary):
            network.aux_logits, network.transform_input = False, True
            setattr(network, auxiliary, None)
    classifier = next(c for c in CLASSIFIER_NAMES if hasattr(network, c))
    setattr(network, classifier, nn.Identity())
    if from_file:
        _load_weights(network, name, weights, classifier)
    return network if pooled else _FeatureMap(network, name, image_size)


def is_quantized(name) -> bool:
    """Whether `name` is one of torchvision's int8 networks: inference on a CPU only."""
    return name.startswith("quantized_")


@torch.no_grad()
def fold_batch_norm(network: nn.Module, image_size) -> nn.Module:
    """Fold the BatchNorms of a network into the preceding convolutions, in place, in eval mode.

    It computes the same function with fewer memory accesses: 9 % (ResNet50) to 29 % (MobileNetV2)
    more images per second on a CPU. A BatchNorm follows a convolution if its input is the output of
    the convolution, in a forward pass with an image of `image_size` pixels.
    """
    network, outputs, pairs = network.eval(), {}, []

    def remember(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = module, output  # the output too, so that its id stays its own
        elif id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], module))

    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    weight = next(network.parameters())
    network(weight.new_zeros(1, 3, image_size, image_size))  # on the device of the network
    for hook in hooks:
        hook.remove()
    parents = {
        child: (parent, name)
        for parent in network.modules()
        for name, child in parent.named_children()
    }
    for convolution, norm in pairs:
        folded = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = folded.weight, folded.bias
        parent, name = parents[norm]
        setattr(parent, name, getattr(norm, "act", nn.Identity()))  # timm's have an activation
    return network.to(memory_format=torch.channels_last)


class _FeatureMap(nn.Module):
    """The network up to the last operation whose output is a spatial map (B, C, H, W)."""

    def __init__(self, network, name, image_size):
        super().__init__()
        image = torch.zeros(1, 3, image_size, image_size)
        try:
            _, nodes = get_graph_node_names(network)
            with torch.no_grad():
                outputs = create_feature_extractor(network.eval(), nodes)(image)
            last = [node for node in nodes if _is_map(outputs[node])][-1]
            modules = dict(network.named_modules())
            after = [modules[n] for n in nodes[nodes.index(last) + 1 :] if n in modules]
            if any(list(module.parameters()) for module in after):
                raise ValueError("its last layers have no spatial output")
            self.extractor = create_feature_extractor(network, {last: "map"})
        except Exception as error:  # torch.fx raises nearly anything if it cannot trace a network
            raise ValueError(f"{name} has no feature map to extract ({error})") from None

    def forward(self, images):
        return self.extractor(images)["map"]  # (B, C, H, W)


class _TimmNetwork(nn.Module):
    """A timm network without its classifier."""

    def __init__(self, name, weights, pooled, image_size):
        super().__init__()
        self.pooled = pooled
        options = {"num_classes": 0, "pretrained": weights == "DEFAULT"}
        create, name = _timm(name).create_model, name.removeprefix(TIMM)
        from_file = weights is not None and Path(weights).is_file()
        if weights not in (None, "DEFAULT") and not from_file:
            raise ValueError(f"no weights {weights!r} for {name}: there is no such file")
        if weights == "DEFAULT" and not _timm(name).get_pretrained_cfg(name).has_weights:
            raise ValueError(f"timm has no weights for {name}; pass the path of a state dict")
        try:
            try:
                network = create(name, img_size=image_size, **options)
            except TypeError:  # a network without a fixed size of its input
                network = create(name, **options)
        except (OSError, RuntimeError) as error:
            raise ConnectionError(
                f"cannot download the weights of {name} ({error}); pass the path of a state dict "
                "as weights"
            ) from None
        if from_file:
            _load_weights(network, name, weights, network.pretrained_cfg["classifier"])
        self.network = network

    def forward(self, images):
        if self.pooled:
            return self.network(images)  # (B, C)
        prefix = getattr(self.network, "num_prefix_tokens", 0)
        features = self.network.forward_features(images)
        return as_map(features, type(self.network).__name__, prefix, self.network.num_features)


def as_map(features, name, prefix, channels):
    """The last output of one of timm's networks as a map (B, C, H, W).

    prefix: the number of tokens before those of the patches.
    """
    if not isinstance(features, torch.Tensor):  # of several branches
        raise ValueError(f"{name} has no single feature map to extract")
    if features.dim() == 3:  # tokens (B, P, C)
        features = features[:, prefix:]
        side = round(features.size(1) ** 0.5)
        features = features.unflatten(1, (side, -1))
    if features.size(1) != channels:  # (B, H, W, C)
        features = features.permute(0, 3, 1, 2)
    return features


def _timm(name):
    """timm, imported only when one of its networks is used. Raises ValueError for unknown names."""
    import timm

    name = name.removeprefix(TIMM)
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), 3) or ["resnet50"]
        raise ValueError(f"timm has no network {name!r}; similar names: {', '.join(similar)}")
    if "." in name and name not in timm.list_pretrained():
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ValueError(f"timm has no weights {name!r}; it has {', '.join(known) or 'none'}")
    return timm


def _is_map(output):
    return isinstance(output, torch.Tensor) and output.dim() == 4 and output.size(-1) > 1


def _load_weights(network, name, path, classifier):
    """Load the state dict in `path` without its classifiers."""
    state = load_safely(path)
    classifiers = [classifier] if isinstance(classifier, str) else classifier
    removed = tuple(f"{part}." for part in (*classifiers, *AUXILIARY_NAMES))
    try:
        network.load_state_dict({k: v for k, v in state.items() if not k.startswith(removed)})
    except (RuntimeError, AttributeError, KeyError) as error:
        reason = str(error)[:300]
        raise ValueError(f"{path} does not contain weights of {name}: {reason}") from None


def _download(name, weights, **options):
    choices = torchvision.models.get_model_weights(name)
    if weights not in choices.__members__:
        raise ValueError(
            f"no weights {weights!r} for {name}: there is no such file, and torchvision has "
            f"{', '.join(choices.__members__)}"
        )
    try:
        return torchvision.models.get_model(name, weights=choices[weights], **options)
    except (OSError, RuntimeError) as error:
        directory = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConnectionError(
            f"cannot download the {name} weights ({error}); download {choices[weights].url} on "
            f"another machine and put it into {directory}, or pass the file's path as weights"
        ) from None


def fuse_batch_norm(network):
    return network


def last_stage(network, name):
    return []
