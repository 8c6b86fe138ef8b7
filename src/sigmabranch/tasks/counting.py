"""Counting a task's networks without data or training."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.conversion import blueprint
from sigmabranch.data import input_shape
from sigmabranch.measure import cost
from sigmabranch.net import SigmaBranchNet
from sigmabranch.tasks.task import Task

# Couplings do not depend on an image's size, so they are traced on a small one.
_TRACED_SIDE = 64


def count_task(task: Task) -> dict[str, Any]:
    """Cost of a task's dense and branched networks, built with meaningless weights.

    Raises:
        ConfigError: the tree does not fit the network.
        MissingDependency: fvcore is not installed.
    """
    dense, net = sketch(task)
    return cost(net, example(task), dense=dense)


def sketch(task: Task) -> tuple[nn.Module, SigmaBranchNet]:
    """A task's dense and branched networks with meaningless weights.

    Raises:
        ConfigError: the tree does not fit the network.
        ConversionError: the network cannot be cut there.
    """
    # Shapes depend on these alone; the rest has its defaults, so that one sketch serves many.
    return copy.deepcopy(
        _sketch(Task(name="", summary="", data=task.data, model=task.model, tree=task.tree))
    )


@lru_cache(maxsize=2)
def _sketch(task: Task) -> tuple[nn.Module, SigmaBranchNet]:
    dense, blank = task.model.build().eval(), example(task)
    if blank.ndim == 4:
        blank = blank[..., :_TRACED_SIDE, :_TRACED_SIDE]
    return dense, blueprint(dense, blank, task.tree)


def count_net(net: nn.Module, task: Task) -> dict[str, Any]:
    """Cost of an existing network beside the dense one of its task."""
    return cost(net, example(task), dense=task.model.build().eval())


def example(task: Task) -> Tensor:
    """One blank input of a task: (1, ...).

    Raises:
        DataError: the task's data do not fit its network.
    """
    shape = input_shape(task.data.name, task.data.image_size)
    task.model.check_input(shape)
    return torch.zeros(1, *shape)
