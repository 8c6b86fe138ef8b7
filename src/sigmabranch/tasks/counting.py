"""Counting a task's networks without data or training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sigmabranch.backbones import ResNet
from sigmabranch.conversion import blueprint
from sigmabranch.measure import cost
from sigmabranch.net import SigmaBranchNet
from sigmabranch.tasks.task import Task

_SIZES = {"digits": 8, "cifar100": 32, "imagenet": 224}


def count_task(task: Task) -> dict[str, Any]:
    """Cost of a task's dense and branched networks, built with meaningless weights.

    Raises:
        ConfigError: the tree does not fit the network.
        MissingDependency: fvcore is not installed.
    """
    dense, net = sketch(task)
    return cost(net, example(task), dense=dense)


def sketch(task: Task) -> tuple[ResNet, SigmaBranchNet]:
    """A task's dense and branched networks with meaningless weights.

    Raises:
        ConfigError: the tree does not fit the network.
        ConversionError: the network cannot be cut there.
    """
    dense = ResNet(task.model).eval()
    # Couplings do not depend on the image size, so they are traced on a small one.
    size = min(64, image_size(task))
    blank = torch.zeros(1, task.model.in_channels, size, size)
    return dense, blueprint(dense, blank, task.tree)


def count_net(net: SigmaBranchNet, task: Task) -> dict[str, Any]:
    """Cost of an existing branched network beside the dense one of its task."""
    return cost(net, example(task), dense=ResNet(task.model).eval())


def example(task: Task) -> Tensor:
    """One blank input of a task: (1, C, H, W)."""
    size = image_size(task)
    return torch.zeros(1, task.model.in_channels, size, size)


def image_size(task: Task) -> int:
    """Side of a task's images in pixels."""
    return task.data.image_size or _SIZES[task.data.name]
