"""The optimizer, its learning rate, and one step."""

import math

import torch

from captioning.base.distributed import all_reduce_sum, rank_and_world_size


def optimizer_step(optimizer, targets, factor, grad_clip):
    """An optimizer step with the mean gradient over the targets of all ranks; returns its norm.

    targets: their number on this rank. factor: what the max_lr of each group is multiplied by.
    grad_clip: maximum norm.
    """
    _, world_size = rank_and_world_size()
    scale = world_size / all_reduce_sum(targets)  # DDP has averaged the gradients over the ranks
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is not None:  # some networks have unused layers
            parameter.grad.mul_(scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor
    optimizer.step()
    optimizer.zero_grad()
    return norm


def schedule(progress: float, shape="one-cycle") -> float:
    """One cycle (Smith & Topin, 2017): linear increase over a tenth of the run, cosine decay to 0.

    progress: 0 at the start of the run, 1 at its end. shape: "constant" returns 1 instead.
    Returns a factor between 0 and 1.
    """
    if shape == "constant":
        return 1.0
    progress = min(progress, 1.0)
    if progress < 0.1:
        return progress / 0.1
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def build_optimizer(model, config):
    """AdamW with two parameter groups: weight matrices decay; biases, embeddings, norms do not.

    If the CNN or a part of it is trained, it has two groups of its own.
    """
    trained, groups = [(n, p) for n, p in model.named_parameters() if p.requires_grad], []
    for of_cnn, rate in ((False, config.learning_rate), (True, config.backbone_learning_rate)):
        part = [(n, p) for n, p in trained if n.startswith("encoder.cnn.") == of_cnn]
        decaying = [p for n, p in part if p.dim() > 1 and "embedding" not in n]
        others = [p for n, p in part if p.dim() <= 1 or "embedding" in n]
        for parameters, decay in ((decaying, config.weight_decay), (others, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "max_lr": rate})
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
