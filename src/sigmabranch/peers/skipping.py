"""What networks share that skip parts of a ResNet input by input.

Shapes: B batch, V classes.
"""

from __future__ import annotations

import copy
import math
from typing import Self, cast

import torch
from torch import Tensor, nn

from sigmabranch.backbones import ResNet, ResNetSpec, as_backbone
from sigmabranch.backbones.resnet import BasicBlock, Bottleneck
from sigmabranch.errors import ConfigError
from sigmabranch.peers.system import System
from sigmabranch.tasks import Task

Block = Bottleneck | BasicBlock


class SkippingNet(nn.Module):
    """A network that leaves work out for a single input, and masks the results of a batch.

    Attributes:
        all_open: every gate is 1 and nothing is left out: the dense network's logits, at the price
            of everything there is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all_open = False

    def opened(self) -> Self:
        """A copy with :attr:`all_open`, whose operations a counter can follow."""
        whole = copy.deepcopy(self).eval()
        whole.all_open = True
        return whole

    def skips(self, x: Tensor) -> bool:
        """Whether to leave work out for ``x``; a tracer must not see one input's choices."""
        return not (self.training or self.all_open or len(x) > 1 or torch.jit.is_tracing())


def residual_spec(system: str, task: Task) -> ResNetSpec:
    """The shape of the task's network, which must be a ResNet's.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(task.model, ResNetSpec):
        raise ConfigError(
            f"{system} gates the residual blocks of a ResNet, and the network of {task.name} is a "
            f"{task.model.family}: choose another task, or leave this system out"
        )
    return task.model


def residual_parts(model: nn.Module) -> tuple[nn.Sequential, list[Block], nn.Sequential]:
    """A ResNet's modules before its blocks, its blocks, and its pool and head.

    Raises:
        ConfigError: another network.
    """
    if not isinstance(model, ResNet):
        raise ConfigError(f"a {type(model).__name__} has no residual blocks to gate: use a ResNet")
    backbone = as_backbone(model)
    stem = [path for path in backbone.chain if path not in backbone.stages]
    stages = cast(list[nn.Sequential], backbone.modules(backbone.stages))
    blocks = [cast(Block, block) for stage in stages for block in stage]
    head = nn.Sequential(backbone.pool, *backbone.modules(backbone.head))
    return nn.Sequential(*backbone.modules(stem)), blocks, head


def check_weights(system: System, *names: str) -> None:
    """Raise :class:`ConfigError` where a field cannot be the weight of a loss."""
    for name in names:
        value = getattr(system, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"{system.name} {name} must be at least 0, got {value}")


def check_target(system: System, target: float) -> None:
    """Raise :class:`ConfigError` unless ``target`` is a share that gates can open."""
    if not 0 < target <= 1:
        raise ConfigError(f"{system.name} target must be above 0 and at most 1, got {target}")


def check_size(system: System, always: int, active_params: int) -> None:
    """Raise :class:`ConfigError` where closing every gate leaves more than is asked for."""
    if active_params <= always:
        raise ConfigError(
            f"{system.name} always reads {always:,} parameters, more than the {active_params:,} "
            "asked: leave it out, or compare with a larger tree"
        )
