"""The last feature map (B, C, H, W) of classification networks of torchvision and timm."""

import torch
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names


class FeatureMap(nn.Module):
    """A network of torchvision up to the last operation whose output is a map (B, C, H, W).

    Raises ValueError if there is none for images of `image_size` pixels.
    """

    def __init__(self, network, name, image_size):
        super().__init__()
        try:
            nodes = get_graph_node_names(network)[1]
            with torch.no_grad():
                image = torch.zeros(1, 3, image_size, image_size)
                outputs = create_feature_extractor(network.eval(), nodes)(image)
            last = [node for node in nodes if _is_map(outputs[node])][-1]
            modules = dict(network.named_modules())
            after = [modules[n] for n in nodes[nodes.index(last) + 1 :] if n in modules]
            if any(list(module.parameters()) for module in after):
                raise ValueError("its last layers have no spatial output")
            self.extractor = create_feature_extractor(network, {last: "map"})
        except Exception as error:  # torch.fx raises nearly anything if it cannot trace a network
            raise ValueError(f"{name} has no feature map to extract ({error})") from error

    def forward(self, images):
        if self.extractor.training != self.training:  # torch.fx forgets the mode in a deep copy
            self.extractor.train(self.training)
        return self.extractor(images)["map"]  # (B, C, H, W)


class TimmNetwork(nn.Module):
    """A network of timm; its output is (B, C) if pooled, otherwise (B, C, H, W)."""

    def __init__(self, network, pooled):
        super().__init__()
        self.network, self.pooled = network, pooled

    def forward(self, images):
        if self.pooled:
            return self.network(images)  # (B, C)
        features = self.network.forward_features(images)
        prefix = getattr(self.network, "num_prefix_tokens", 0)
        return _as_map(features, prefix, self.network.num_features)


@fx.wrap  # torch.fx records the call and does not trace it: it depends on the shape
def _as_map(features, prefix, channels):
    """What timm's networks return as a map (B, C, H, W).

    features: (B, C, H, W), (B, H, W, C), or tokens (B, prefix + H * W, C) of a square.
    """
    if not isinstance(features, torch.Tensor):  # of several branches
        raise ValueError("this network of timm has no single feature map to extract")
    if features.dim() == 3:
        features = features[:, prefix:]
        features = features.unflatten(1, (round(features.size(1) ** 0.5), -1))
    return features if features.size(1) == channels else features.permute(0, 3, 1, 2)


def _is_map(output):
    return isinstance(output, torch.Tensor) and output.dim() == 4 and output.size(-1) > 1
