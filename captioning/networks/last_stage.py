"""A network divided in two: a trunk, and the last stage, which can be trained alone.

trunk, last_stage = split_last_stage(build_backbone("resnet50", "DEFAULT"), "resnet50", 224)
last_stage(trunk(images))    # what the whole network returns; trunk(images) is (B, 1024, 14, 14)
"""

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

from captioning.networks.backbones import as_map

MAX_RATIO = 9  # of the areas of the map before the last stage and of the last map; usually 4


def split_last_stage(network, name, image_size) -> tuple[nn.Module, nn.Module]:
    """(trunk, last_stage) of a network in eval mode: last_stage(trunk(images)) == network(images).

    The last stage is what reduces the resolution of the feature map for the last time, with what
    follows: `layer4` of a ResNet, the blocks from `features.14` on of MobileNetV2. Both share the
    parameters of `network` and compute what it does in eval mode: without dropout, and with the
    running statistics of BatchNorm.

    Raises ValueError for a network without such a stage, such as a vision transformer, or one
    that torch.fx cannot trace.
    """
    try:
        graph = _Tracer(autowrap_functions=(as_map,)).trace(network.eval())
        with torch.no_grad():
            whole = fx.GraphModule(network, graph)
            ShapeProp(whole).propagate(torch.zeros(1, 3, image_size, image_size))
        cut = _find_cut(network, list(graph.nodes))
    except Exception as error:  # torch.fx raises nearly anything if it cannot trace a network
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{name} has no last stage that can be trained alone ({reason}); use fine_tune all, "
            "or another backbone"
        ) from None
    trunk, last_stage = _subgraphs(network, graph, cut)
    for name, layer in list(last_stage.named_modules()):
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
            parent, _, child = name.rpartition(".")
            setattr(last_stage.get_submodule(parent), child, _InFloat32(layer))
    return trunk, last_stage


class _InFloat32(nn.Module):
    """A depthwise convolution that is not computed in bfloat16 on a CPU, also within `autocast`.

    There, with kernels larger than 3x3 or a stride of 2, PyTorch's gradients take 3 to 80 times as
    long in bfloat16 as in float32.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if x.device.type != "cpu":
            return self.layer(x)
        with torch.autocast("cpu", enabled=False):
            return self.layer(x.to(self.layer.weight.dtype))


class _Tracer(fx.Tracer):
    """Modules without submodules are one node each, and so is a BatchNorm (timm's contain more)."""

    def is_leaf_module(self, module, name):
        alone = isinstance(module, _BatchNorm) or not list(module.children())
        return alone or super().is_leaf_module(module, name)


def _find_cut(network, nodes):
    """The node after which the last stage begins; `nodes` have the shapes of their outputs.

    Its output is a map on which all that follows depends alone: no skip connection passes it by.
    Of these maps with the resolution before the last one, it is the last before the number of
    channels grows within the block that reduces the resolution.
    """
    index = {node: i for i, node in enumerate(nodes)}
    shapes = [getattr(node.meta.get("tensor_meta"), "shape", ()) for node in nodes]
    area = [
        s[2] * s[3] if len(s) == 4 and s[2] == s[3] > 1 and n.op != "placeholder" else 0
        for n, s in zip(nodes, shapes, strict=True)
    ]
    final_weights = max(i for i, node in enumerate(nodes) if _has_parameters(network, node))
    cuts, last_use = [], 0  # the index of the last node that uses an output of the nodes so far
    for i, node in enumerate(nodes):
        if area[i] and last_use <= i:
            cuts.append(i)
        if node.op != "get_attr":
            last_use = max([last_use, *(index[user] for user in node.users)])
    ratio = {i: area[i] / area[cuts[-1]] for i in cuts if i < final_weights}
    cuts = [i for i in ratio if 1 < ratio[i] < MAX_RATIO]
    if not cuts:
        raise ValueError("no stage halves the resolution of its feature map")
    cuts = [i for i in cuts if area[i] == area[cuts[-1]]]
    best = cuts[-1]
    for i in reversed(cuts):
        if shapes[i].numel() > shapes[best].numel():
            break
        if shapes[i].numel() < shapes[best].numel():
            best = i
    return nodes[best]


def _has_parameters(network, node):
    return node.op == "call_module" and bool([*network.get_submodule(node.target).parameters()])


def _subgraphs(network, graph, cut):
    """Two modules: the graph up to the node `cut`, and what follows."""
    nodes = list(graph.nodes)
    first, second = nodes[: nodes.index(cut) + 1], nodes[nodes.index(cut) + 1 :]
    trunk, last_stage = fx.Graph(), fx.Graph()
    copies = [{}, {cut: last_stage.placeholder("maps")}]
    for part, own, copied in ((trunk, first, copies[0]), (last_stage, second, copies[1])):
        for node in nodes:
            used = node.op == "get_attr" and any(user in own for user in node.users)
            if used or (node in own and node.op != "get_attr"):
                copied[node] = part.node_copy(node, copied.__getitem__)
    trunk.output(copies[0][cut])
    return fx.GraphModule(network, trunk), fx.GraphModule(network, last_stage)
