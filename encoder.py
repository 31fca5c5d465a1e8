"""The encoder: a pre-trained CNN without its classifier, and a trainable linear layer."""

import torch
from torch import nn

from backbones import build_backbone, input_settings, is_quantized
from config import ModelConfig
from layers import Dropout

DEFAULTS = ModelConfig


class EncoderCNN(nn.Module):
    """A pre-trained CNN without its classifier, followed by a trainable linear layer.

    Arguments are those of `ModelConfig`, and:

    weights: torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or None.
    pooled: return one embedding per image; otherwise, for `AttentionDecoder`, a key and a value for
        every position of the last feature map, each of embed_size.

    Unless `fine_tune` is set, the CNN is frozen: it has no gradients and stays in eval mode
    whatever `train()` is called with, so that BatchNorm neither uses nor updates batch statistics.

    Raises ValueError for an unknown backbone or weights that do not fit, ConnectionError if the
    weights cannot be downloaded.
    """

    def __init__(self, embed_size=DEFAULTS.embed_size, backbone=DEFAULTS.backbone,
                 weights="DEFAULT", fine_tune=DEFAULTS.fine_tune, image_size=DEFAULTS.image_size,
                 flip=DEFAULTS.flip, no_image=DEFAULTS.no_image, precision=DEFAULTS.precision,
                 image_norm=DEFAULTS.image_norm, feature_dropout=DEFAULTS.feature_dropout,
                 pooled=True):  # fmt: skip
        super().__init__()
        network = build_backbone(backbone, weights, pooled, image_size)
        # Convolutions are fastest in channels-last memory format, on CPUs and GPUs.
        self.backbone = network.to(memory_format=torch.channels_last).requires_grad_(fine_tune)
        self.fine_tune, self.flip, self.no_image = fine_tune, flip, no_image
        self.precision, self.pooled, self.quantized = precision, pooled, is_quantized(backbone)
        if fine_tune and self.quantized:
            raise ValueError(f"{backbone} computes in int8 and cannot be fine-tuned")
        self.image_size = image_size = input_settings(backbone, image_size)["image_size"]
        try:
            with torch.no_grad():
                images = torch.zeros(1, 3, image_size, image_size)
                self.feature_size = self.eval().forward_features(images).size(2)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"{backbone} rejects images of size {image_size}: {error}") from None
        output_size = embed_size if pooled else 2 * embed_size
        self.dropout = Dropout(feature_dropout)
        self.linear = nn.Linear(self.feature_size, output_size)
        self.norm = nn.LayerNorm(output_size) if image_norm else nn.Identity()
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if not self.fine_tune:
            self.backbone.eval()
        return self

    def forward(self, images):
        """(B, 3, H, W) -> (B, embed_size), or (B, P, 2 * embed_size) if not pooled."""
        return self.project(self.forward_features(images))

    def forward_features(self, images):
        """(B, 3, H, W) -> (B, P, feature_size), the mean of the views of `forward_views`.

        P is 1 if pooled, otherwise the number of positions in the last feature map. With a frozen
        CNN the features are constant, and can be computed once per image (features.py).
        """
        return self.forward_views(images).mean(1)

    def forward_views(self, images):
        """(B, 3, H, W) -> (B, V, P, feature_size) of each image and, with `flip`, its flip: V = 2.

        The map of the flipped image is flipped back, so that positions are those of the image.
        """
        if self.quantized and images.device.type != "cpu":
            raise ValueError("a quantized backbone runs on the CPU only (use --device cpu)")
        views = [self.backbone(images)]  # (B, C), or (B, C, H, W)
        if self.flip:
            flipped = self.backbone(images.flip(3))
            views.append(flipped if self.pooled else flipped.flip(3))
        return torch.stack([view.flatten(2) if view.dim() > 2 else view.unsqueeze(2)
                            for view in views], 1).transpose(2, 3)  # fmt: skip

    def project(self, features):
        """(B, P, feature_size) -> (B, embed_size), or (B, P, 2 * embed_size) if not pooled."""
        if self.pooled:
            features = features.mean(1)  # (B, C)
        if self.no_image:
            features = torch.zeros_like(features)
        return self.norm(self.linear(self.dropout(features)))
