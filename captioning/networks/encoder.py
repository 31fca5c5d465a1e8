"""The encoder: a pre-trained CNN without its classifier, and a trainable linear layer."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from captioning.learning.options import CHOICES, ModelConfig
from captioning.networks.backbones import build_backbone, input_settings, is_quantized
from captioning.networks.last_stage import split_last_stage
from captioning.networks.layers import BatchNorm, Dropout

DEFAULTS = ModelConfig


class EncoderCNN(nn.Module):
    """A pre-trained CNN without its classifier, followed by a trainable linear layer.

    Arguments are those of `ModelConfig`, and:

    weights: torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or None.
    pooled: return one embedding per image; otherwise, for `AttentionDecoder`, a key and a value for
        every position of the last feature map, each of embed_size.

    fine_tune: which part of the CNN is trained.
        "none"  no part: it has no gradients and stays in eval mode whatever `train()` is called
                with, so that BatchNorm neither uses nor updates batch statistics
        "last"  the last stage without its BatchNorms; in eval mode too. The rest is the `trunk`
        "all"   the whole CNN, in train mode

    Raises ValueError for an unknown backbone, weights that do not fit, or a backbone that cannot be
    fine-tuned, ConnectionError if the weights cannot be downloaded.
    """

    def __init__(
        self,
        embed_size=DEFAULTS.embed_size,
        backbone=DEFAULTS.backbone,
        weights="DEFAULT",
        fine_tune=DEFAULTS.fine_tune,
        image_size=DEFAULTS.image_size,
        flip=DEFAULTS.flip,
        no_image=DEFAULTS.no_image,
        precision=DEFAULTS.precision,
        image_norm=DEFAULTS.image_norm,
        feature_dropout=DEFAULTS.feature_dropout,
        pooled=True,
    ):
        super().__init__()
        network = build_backbone(backbone, weights, pooled, image_size)
        # Convolutions are fastest in channels-last memory format, on CPUs and GPUs.
        self.backbone = network.to(memory_format=torch.channels_last)
        self.fine_tune, self.flip, self.no_image = fine_tune, flip, no_image
        self.precision, self.pooled, self.quantized = precision, pooled, is_quantized(backbone)
        if fine_tune not in CHOICES["fine_tune"]:
            raise ValueError(f"unknown fine_tune {fine_tune!r}; choose from {CHOICES['fine_tune']}")
        if fine_tune != "none" and self.quantized:
            raise ValueError(f"{backbone} computes in int8 and cannot be fine-tuned")
        self.image_size = image_size = input_settings(backbone, image_size)["image_size"]
        self.backbone.requires_grad_(fine_tune == "all")
        if fine_tune == "last":
            # A tuple, which nn.Module does not register: `backbone` alone owns the parameters, so
            # that their names do not depend on `fine_tune`.
            self.stages = split_last_stage(self.backbone, backbone, image_size)
            for module in self.stages[1].modules():
                for weight in module.parameters(recurse=False):
                    weight.requires_grad_(not isinstance(module, _BatchNorm))
        try:
            with torch.set_grad_enabled(fine_tune == "all"):
                images = torch.zeros(1, 3, image_size, image_size)
                features = self.eval().forward_features(images)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"{backbone} rejects images of size {image_size}: {error}") from None
        if not pooled and features.size(1) == 1:
            raise ValueError(
                f"{backbone} has no feature map for attention: its output for images of size "
                f"{image_size} is a single vector; use another backbone, or inject par"
            )
        if fine_tune == "all":
            freeze_unused(self.backbone, features)
        self.feature_size = features.size(2)
        output_size = embed_size if pooled else 2 * embed_size
        self.dropout = Dropout(feature_dropout)
        self.linear = nn.Linear(self.feature_size, output_size)
        self.norm = BatchNorm(output_size) if image_norm else nn.Identity()
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if self.fine_tune != "all":
            self.backbone.eval()
        return self

    def forward(self, images):
        """(B, 3, H, W) -> (B, embed_size), or (B, P, 2 * embed_size) if not pooled."""
        return self.project(self.forward_views(images))

    def forward_features(self, images):
        """(B, 3, H, W) -> (B, P, feature_size), the mean of the views of each image.

        P is 1 if pooled, otherwise the number of positions in the last feature map.
        """
        views = self.forward_views(images)
        return (self.forward_last_stage(views) if views.dim() == 5 else views).mean(1)

    def forward_views(self, images):
        """(B, 3, H, W) -> (B, V, P, feature_size) of each image and, with `flip`, its flip: V = 2.

        If the last stage is trained, the maps before it, (B, V, C, H, W). Unless the whole CNN is
        trained, the views are constant, and can be computed once per image (features.py).
        """
        if self.quantized and images.device.type != "cpu":
            raise ValueError("a quantized backbone runs on the CPU only (use --device cpu)")
        views = [self.trunk(images)]
        if self.flip:
            views.append(self.trunk(images.flip(3)))
        views = torch.stack(views, 1)  # (B, V, C), or (B, V, C, H, W)
        return views if self.fine_tune == "last" else positions_of(views)

    @property
    def trunk(self):
        """The part of the CNN whose outputs `forward_views` returns: all but a trained last stage.

        Without a trained last stage, the whole CNN.
        """
        return self.stages[0] if self.fine_tune == "last" else self.backbone

    def forward_last_stage(self, views):
        """The maps (B, V, C, H, W) of `forward_views` -> (B, V, P, feature_size)."""
        maps = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return positions_of(self.stages[1](maps).unflatten(0, views.shape[:2]))

    def project(self, features):
        """(B, P, feature_size) -> (B, embed_size), or (B, P, 2 * embed_size) if not pooled.

        Also takes the views of `forward_views`, whose features are averaged: (B, V, P,
        feature_size), or the maps (B, V, C, H, W) before a last stage that is trained.
        """
        if features.dim() == 5:
            features = self.forward_last_stage(features)
        if features.dim() == 4:
            features = features.mean(1)  # (B, P, C)
        if self.pooled:
            features = features.mean(1)  # (B, C)
        if self.no_image:
            features = torch.zeros_like(features)
        return self.norm(self.linear(self.dropout(features)))


def freeze_unused(network, output):
    """Exclude the parameters from training on which `output`, computed by `network`, does not
    depend: some networks of timm keep layers of their classifier.
    """
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def positions_of(views):
    """Outputs of a CNN, (B, V, C) or (B, V, C, H, W) -> (B, V, P, C).

    Of two views, the second one is that of the flipped image: its map is flipped back, so that
    positions are those of the image. A single view remains as it is, because the order of the
    positions has no effect on captions.
    """
    if views.dim() == 3:
        return views.unsqueeze(2)
    if views.size(1) == 2:
        views = torch.stack([views[:, 0], views[:, 1].flip(3)], 1)
    return views.flatten(3).transpose(2, 3)
