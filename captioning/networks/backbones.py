"""Pre-trained networks of torchvision and timm without their classifier.

network = build_backbone("resnet50", weights="DEFAULT")    # classifier removed
network(images)                                            # (B, 2048), pooled
build_backbone("resnet50", weights=None, pooled=False)(images)    # (B, 2048, 7, 7), the last map
last_stage(network, "resnet50")                            # the parameters of layer4
"""

import difflib
import warnings
from pathlib import Path

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models

from captioning.base.checkpoints import load_safely
from captioning.networks.feature_map import FeatureMap, TimmNetwork

TIMM = "timm/"  # prefix of the names of timm's networks
IMAGE_SIZE = 224  # of torchvision's networks
CLASSIFIERS = ("fc", "classifier", "heads", "head")  # of torchvision's networks
NO_DOWNLOAD = "cannot download the weights of {} ({}); get {} elsewhere, and pass the file's path"
AUXILIARY = ("AuxLogits", "aux1", "aux2")  # Inception's and GoogLeNet's extra classifiers
BEFORE_LAST_STAGE = {  # what precedes the last stage, for torchvision's names that begin like this
    "resne": "layer3",
    "wide_resnet": "layer3",
    "mobilenet_v2": "features.13",
    "mobilenet_v3_small": "features.8",
    "mobilenet_v3_large": "features.12",
    "efficientnet": "features.5",
    "convnext": "features.5",
    "densenet": "features.transition3",
    "regnet": "trunk_output.block3",
    "vgg16": "features.23",
    "vgg16_bn": "features.33",
}


def input_settings(backbone, image_size=None) -> dict:
    """The arguments of `images.eval_transform` and `train_transform` for a network.

    image_size: None for the network's own: 224 pixels for torchvision's, and what timm's data
        configuration says, like the normalization and the interpolation, for timm's.
    """
    if isinstance(backbone, nn.Module) or not backbone.startswith(TIMM):
        return {"image_size": image_size or IMAGE_SIZE}
    timm, name = _timm(backbone)
    config = timm.get_pretrained_cfg(name).to_dict()
    settings = timm.data.resolve_data_config(pretrained_cfg=config)
    size = image_size or settings["input_size"][-1]
    return {"image_size": size} | {key: settings[key] for key in ("mean", "std", "interpolation")}


def build_backbone(backbone, weights, pooled=True, image_size=None) -> nn.Module:
    """A classification network without its classifier.

    backbone: a name of torchvision, "timm/" and a name of timm, or a module, which is used as it
        is: images -> (B, C) if pooled, otherwise (B, C, H, W).
    weights: "DEFAULT", a name that torchvision knows ("IMAGENET1K_V1"), the path of a state dict,
        or None for random weights.
    pooled: return the pooled features (B, C); otherwise the last feature map (B, C, H, W), or the
        tokens of a transformer's patches in that form, for images of `image_size` pixels.

    Raises ValueError for an unknown network or weights that do not fit, ConnectionError if the
    weights cannot be downloaded.
    """
    if isinstance(backbone, nn.Module):
        return backbone
    image_size = input_settings(backbone, image_size)["image_size"]
    file = weights if weights and Path(weights).is_file() else None
    create = _timm_network if backbone.startswith(TIMM) else _torchvision_network
    network = create(backbone, None if file else weights, image_size)
    if file:
        _load_weights(network, backbone, file)
    if backbone.startswith(TIMM):
        return TimmNetwork(network, pooled)
    return network if pooled else FeatureMap(network, backbone, image_size)


def last_stage(network, name) -> list[nn.Parameter]:
    """The parameters of the last stage of a network that `build_backbone` returned.

    It computes at the lowest resolution, such as layer4 of a ResNet; its BatchNorms are left out.
    Raises ValueError if it is not known.
    """
    network = getattr(network, "extractor", getattr(network, "network", network))  # in the wrapper
    modules = dict(network.named_modules())  # in order
    name = name if isinstance(name, str) else type(name).__name__  # a module is used as backbone
    if name.startswith(TIMM):
        before = [stage["module"] for stage in getattr(network, "feature_info", [])][-2:-1]
    else:
        families = sorted(filter(name.startswith, BEFORE_LAST_STAGE), key=len)
        before = [BEFORE_LAST_STAGE[family] for family in families[-1:]]
    inside = [i for i, n in enumerate(modules) if before and f"{n}.".startswith(f"{before[0]}.")]
    if not inside:
        raise ValueError(f"the last stage of {name} is not known; use fine_tune all, or none")
    stage = [m for m in list(modules.values())[inside[-1] + 1 :] if not isinstance(m, _BatchNorm)]
    return [weight for module in stage for weight in module.parameters(recurse=False)]


def _torchvision_network(name, weights, _image_size):
    _check_name(name, models.list_models(models))
    choices = models.get_model_weights(name).__members__
    _check_weights(name, weights, choices)
    try:
        with warnings.catch_warnings():  # about future defaults, raised by torchvision's own calls
            warnings.simplefilter("ignore")
            network = models.get_model(name, weights=choices.get(weights))
    except (OSError, RuntimeError) as error:
        raise ConnectionError(NO_DOWNLOAD.format(name, error, choices[weights].url)) from error
    # Inception and GoogLeNet were trained with another normalization. `transform_input` converts
    # ImageNet's to it; torchvision sets it only for weights that it has downloaded itself.
    for auxiliary in AUXILIARY:
        if hasattr(network, auxiliary):
            network.aux_logits, network.transform_input = False, True
            setattr(network, auxiliary, None)
    setattr(network, next(c for c in CLASSIFIERS if hasattr(network, c)), nn.Identity())
    return network


def _timm_network(backbone, weights, image_size):
    timm, name = _timm(backbone)
    config = timm.get_pretrained_cfg(name)
    _check_weights(name, weights, ["DEFAULT"] if config.has_weights else [])
    options = {"num_classes": 0, "pretrained": weights == "DEFAULT"}
    try:
        try:
            return timm.create_model(name, img_size=image_size, **options)
        except TypeError:  # a network without a fixed size of its input
            return timm.create_model(name, **options)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(NO_DOWNLOAD.format(name, error, config.hf_hub_id)) from error


def _timm(backbone):
    """(timm, the name without "timm/"). Raises ValueError for an unknown name."""
    import timm  # only when one of its networks is used

    name = backbone.removeprefix(TIMM)
    _check_name(name, timm.list_models() + timm.list_pretrained())
    return timm, name


def _check_name(name, known):
    if name not in known:
        similar = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0))
        raise ValueError(
            f"unknown backbone {name!r}; similar names: {similar}; a module of your own is an "
            "argument of build_run, CaptionModel and from_checkpoint (backbone=)"
        )


def _check_weights(name, weights, choices):
    if weights is not None and weights not in choices:
        known = ", ".join(choices) or "none"
        raise ValueError(f"no weights {weights!r} for {name}: neither a file nor one of: {known}")


def _load_weights(network, name, path):
    try:
        missing, excess = network.load_state_dict(load_safely(path), strict=False)
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not contain weights of {name}: {error!s:.300}") from error
    wrong = missing + [k for k in excess if not str(k).startswith((*CLASSIFIERS, *AUXILIARY))]
    if wrong:
        raise ValueError(f"{path} does not contain weights of {name}: see {', '.join(wrong[:3])}")
