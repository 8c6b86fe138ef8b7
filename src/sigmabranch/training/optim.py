"""How the weights move: parameter groups, optimizer, learning-rate schedule, moving average."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sigmabranch.training.recipe import Recipe

MIN_NODE_PROB = 1e-3


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over the parameters of ``model``, which is already on its device.

    Parameters of fewer than two dimensions (biases, norms) are not decayed unless the recipe asks
    for it; neither are those that ``model.no_weight_decay()`` names, if it has that method.
    """
    exempt = set(getattr(model, "no_weight_decay", tuple)())
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = name not in exempt and (recipe.decay_norm_and_bias or parameter.ndim >= 2)
            (decayed if decay else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    if recipe.optimizer == "adam":
        return Adam(groups, lr=recipe.lr, betas=recipe.betas, fused=fused)
    nesterov = recipe.momentum > 0
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=fused)


def build_schedule(optimizer: Optimizer, recipe: Recipe, steps_per_epoch: int) -> LambdaLR:
    """Learning rate per optimizer step, in closed form so that it cannot drift."""
    return LambdaLR(optimizer, lambda step: lr_factor(recipe, step, steps_per_epoch))


def lr_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Share of the peak learning rate that optimizer step ``step`` (from 0) takes."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if recipe.schedule == "cosine":
        left = recipe.epochs * steps_per_epoch - warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(left, 1.0))))
    if recipe.schedule == "step":
        return recipe.step_factor ** (step // (steps_per_epoch * recipe.step_epochs))
    return 1.0


def build_average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """Exponential moving average of weights and buffers, or None when the recipe keeps none."""
    if not recipe.ema_decay:
        return None
    blend = get_ema_multi_avg_fn(recipe.ema_decay)

    def average(means: Any, values: Any, count: Tensor | int) -> None:
        # torch would round averaged integers down, which ruins index tables and counters.
        if means[0].is_floating_point():
            blend(means, values, count)
        else:
            torch._foreach_copy_(means, values)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


class NodeScale:
    """Divides each node's gradient by the node's expected path probability.

    A node's probability is the sum of its leaves', so one small matrix turns the expectation of
    the leaves' into that of the nodes'; nothing is read back from the device.

    Shapes: M nodes (all but the root, whose probability is one), L leaves.

    Args:
        net: a ``SigmaBranchNet`` on its device.
        leaves: L.
        device: of the net.
    """

    def __init__(self, net: Any, leaves: int, device: torch.device) -> None:
        certain_LL = torch.eye(leaves).log().to(device)
        below = {node: log.exp() for node, log in net.node_log_prob(certain_LL).items()}
        below = {node: row_L for node, row_L in below.items() if not bool(row_L.all())}
        parameters = net.node_parameters()
        self._parameters = [parameters[node] for node in below]
        self._below_ML = torch.stack(list(below.values()))

    @torch.no_grad()
    def __call__(self, leaf_prob: Tensor) -> None:
        """Scale the gradients in place; ``leaf_prob`` is E[P_j] over the whole batch, (L,)."""
        scale_M = (self._below_ML @ leaf_prob).clamp_min(MIN_NODE_PROB).reciprocal()
        for scale, parameters in zip(scale_M, self._parameters, strict=True):
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, scale)
