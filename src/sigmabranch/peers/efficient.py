"""A modern small network of the same active size, from timm: what a user who may choose takes."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sigmabranch.backbones.timm import create_regnet
from sigmabranch.data import input_shape
from sigmabranch.errors import ConfigError
from sigmabranch.measure import count_parameters
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.sizing import active_params
from sigmabranch.peers.system import System, Trained
from sigmabranch.tasks import Task

# Images up to this side keep their last stages at an eighth of it.
_SMALL = 64
# Widths tried on either side of a guess.
_STEPS = 4
# A network that is this much larger or smaller says nothing about the tree.
_NEAR = 0.15


@dataclass(frozen=True, kw_only=True)
class Efficient(System):
    """A RegNetY (Radosavovic et al., 2020) whose widths are solved for the active size.

    Its widths come in steps of eight, so that its size is the nearest, not an equal one.
    """

    name: ClassVar[str] = "regnety"
    summary: ClassVar[str] = "a RegNetY of timm of about the same active size"

    def check(self, task: Task) -> None:
        """The task must be one of images, and timm installed."""
        if len(input_shape(task.data.name, task.data.image_size)) != 3:
            raise ConfigError("regnety takes images, not point clouds")
        goal, found = active_params(task), count_parameters([self.sketch(task)])
        if abs(found - goal) > _NEAR * goal:
            raise ConfigError(f"no RegNetY is near {goal:,} parameters: the nearest has {found:,}")

    def sketch(self, task: Task) -> nn.Module:
        """The network nearest to the tree's active size."""
        goal = active_params(task)

        # Parameters grow with the square of the widths, nearly.
        near = math.sqrt(goal / self._size(task, 1.0))
        with suppress(ConfigError):  # not all factors make four stages
            near *= math.sqrt(goal / self._size(task, near))
        sizes: dict[float, int] = {}
        for step in range(-_STEPS, _STEPS + 1):
            factor = near * 1.05**step
            with suppress(ConfigError):
                sizes[factor] = self._size(task, factor)
        if not sizes:
            raise ConfigError(f"no RegNetY is as small as {goal:,} parameters")
        return self._build(task, min(sizes, key=lambda factor: abs(sizes[factor] - goal)))

    def _size(self, task: Task, factor: float) -> int:
        try:
            with torch.device("meta"):
                return count_parameters([self._build(task, factor)])
        except NotImplementedError:  # PyTorch 2.11 lacks what timm computes the widths with there
            return count_parameters([self._build(task, factor)])

    def _build(self, task: Task, factor: float) -> nn.Module:
        channels, _, side = input_shape(task.data.name, task.data.image_size)
        return create_regnet(
            factor, classes=task.model.classes, channels=channels, small=side <= _SMALL
        )

    def run(self, bench: Bench) -> Trained:
        """Train it from scratch for as many epochs as the others have behind them."""
        with bench.seeded():
            network = self.sketch(bench.task)
        recipe = bench.scratch_recipe
        bench.train(network, recipe=recipe)
        mark = "from scratch in one schedule, another architecture"
        return Trained(network=network, recipe=recipe, epochs=recipe.epochs, mark=mark)
