"""The part of the encoder that is pre-trained: a CNN without its classifier.

cnn = CNN("resnet50", weights="DEFAULT")
cnn(images)                                             # (B, 1, 2048), pooled
CNN("resnet50", weights="DEFAULT", pooled=False)(images)    # (B, 49, 2048), each position
"""

import copy

import torch
from torch import nn

from captioning.base.device import resolve_precision
from captioning.networks.backbones import build_backbone, input_settings, last_stage
from captioning.networks.fusion import fuse_batch_norm

FINE_TUNE = ("none", "last", "all")


class CNN(nn.Module):
    """A pre-trained network whose classifier is removed.

    backbone: a network of torchvision, "timm/NAME", or an nn.Module of one's own, which keeps its
        weights and returns (B, C), or with `pooled=False` a map (B, C, H, W). Its images have
        `image_size` pixels (224 by default) and ImageNet's normalization.
    weights: torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or None.
    pooled: one vector per image; otherwise one for each of the P positions of the last map.
    image_size: side of the square input in pixels; None: the network's own.
    flip: average the features of an image and of its horizontal flip.
    fine_tune: which part is trained.
        "none"  no part: it has no gradients
        "last"  the last stage of the network, without its BatchNorms
        "all"   the whole network, in train mode
    Unless the whole network is trained, it stays in eval mode whatever `train()` is called with, so
    that BatchNorm neither uses nor updates batch statistics.

    Raises ValueError for an unknown backbone, weights that do not fit, an image size that the
    network rejects, or a part that it does not have; ConnectionError if the weights cannot be
    downloaded.
    """

    def __init__(
        self,
        backbone,
        weights="DEFAULT",
        pooled=True,
        image_size=None,
        flip=False,
        fine_tune="none",
    ):
        super().__init__()
        if fine_tune not in FINE_TUNE:
            raise ValueError(f"unknown fine_tune {fine_tune!r}; choose from {', '.join(FINE_TUNE)}")
        network = build_backbone(backbone, weights, pooled, image_size)
        # Convolutions are fastest in channels-last memory format, on CPUs and GPUs.
        self.network = network.to(memory_format=torch.channels_last)
        self.flip, self.pooled, self.fine_tune = flip, pooled, fine_tune
        self.image_size = input_settings(backbone, image_size)["image_size"]
        self.network.requires_grad_(fine_tune == "all")
        if fine_tune == "last":
            for parameter in last_stage(self.network, backbone):
                parameter.requires_grad_(True)
        name = backbone if isinstance(backbone, str) else type(backbone).__name__
        self.feature_size = self.find_feature_size(name)
        self.train()

    @torch.no_grad()
    def find_feature_size(self, name) -> int:
        """C, from the output for an image. Raises ValueError if its shape is wrong."""
        size = self.image_size
        try:
            shape = self.eval().network(torch.zeros(1, 3, size, size)).shape
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"{name} rejects images of size {size}: {error}") from error
        positions = shape[2:].numel()
        if self.pooled and positions > 1:
            raise ValueError(f"{name} returns {tuple(shape)} for an image: pool it to (1, C)")
        if not self.pooled and (len(shape) != 4 or positions == 1):
            raise ValueError(
                f"{name} has no feature map for attention: its output for an image of size {size} "
                f"is {tuple(shape)}; use another backbone, or inject par"
            )
        return shape[1]

    def train(self, mode=True):
        return super().train(mode and self.fine_tune == "all")

    def forward(self, images):
        """(B, 3, H, W) -> (B, P, C), the mean of the views of each image.

        P is 1 if pooled, otherwise the number of positions in the last feature map.
        """
        return self.views(images).mean(1)

    def views(self, images):
        """(B, 3, H, W) -> (B, V, P, C), of each image and, with `flip`, of its flip: V = 2.

        Raises ValueError for images of integers, which have not been normalized.
        """
        if not images.is_floating_point():
            raise ValueError(
                f"the images are {images.dtype}, not normalized: convert them as `eval_transform` "
                "does (float32, divided by 255, minus the mean, divided by the deviation)"
            )
        images = images.to(next(self.network.parameters(), images).dtype)
        maps = [self.network(images)]
        if self.flip:
            flipped = self.network(images.flip(3))
            maps.append(flipped if self.pooled else flipped.flip(3))  # positions of the image
        # A pooled output is a map with one position.
        return torch.stack([x.unsqueeze(-1).flatten(2).transpose(1, 2) for x in maps], 1)

    def for_inference(self, precision="auto"):
        """A copy in eval mode that computes the same function faster, within `autocast`.

        In bfloat16, weights are converted here instead of by autocast in every batch: 7 % more
        images per second with ResNet50 on a CPU.
        """
        cnn = copy.deepcopy(self).eval()
        cnn.network = fuse_batch_norm(cnn.network)
        if resolve_precision(next(self.parameters()).device, precision) == "bfloat16":
            for layer in cnn.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.to(torch.bfloat16)
        return cnn
