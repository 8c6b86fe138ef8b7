"""Base of the systems that remove filters of a ResNet at a rate."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sigmabranch.backbones import ResNetSpec
from sigmabranch.coupling import CouplingMap
from sigmabranch.errors import ConfigError
from sigmabranch.peers.filters import FilterGroup, coupled_groups
from sigmabranch.peers.layout import Layout, anatomy
from sigmabranch.peers.system import System
from sigmabranch.tasks import Task

# Rates are searched in steps of one part in so many.
_RATE_STEPS = 10_000


@dataclass(frozen=True, kw_only=True)
class FilterPruning(System):
    """Base of the systems that remove filters at a rate.

    A subclass has a field ``rate`` and says which groups there are and what a rate leaves of each.
    """

    sized_by: ClassVar[tuple[str, ...]] = ("rate",)

    def groups(self, model: nn.Module, coupling: CouplingMap) -> list[FilterGroup]:
        """What is removed together."""
        return coupled_groups(model, coupling)

    @abstractmethod
    def remaining(self, group: FilterGroup, size: int) -> int:
        """How many of ``size`` filters stay, below 1 where the setting would empty the layer."""

    def check(self, task: Task) -> None:
        """Refuse networks other than ResNets, and a setting that empties a layer."""
        self.counts(self.layout(task))

    def layout(self, task: Task) -> Layout:
        """What can be removed of the task's network.

        Raises:
            ConfigError: it is no ResNet.
        """
        if not isinstance(task.model, ResNetSpec):
            raise ConfigError(
                f"{self.name} prunes ResNets, and the network of {task.name} is a "
                f"{task.model.family}: choose another task or leave {self.name} out"
            )
        model, coupling = anatomy(task.model)
        return Layout(model=model, coupling=coupling, groups=self.groups(model, coupling))

    def counts(self, layout: Layout) -> dict[str, int]:
        """Group name → filters that stay of it.

        Raises:
            ConfigError: none would.
        """
        result = {}
        for group in layout.groups:
            size = layout.size(group)
            result[group.name] = self.remaining(group, size)
            if result[group.name] < 1:
                raise ConfigError(
                    f"{self.name} would leave nothing of {group.name} with its {size} filters: "
                    "use a smaller rate"
                )
        return result

    def sketch(self, task: Task) -> nn.Module:
        """The network after the cut: the first filters of each layer, as many as would stay."""
        layout = self.layout(task)
        first = {name: torch.arange(count) for name, count in self.counts(layout).items()}
        return layout.cut(task.model.build(), first)

    def fitted(self, task: Task, active_params: int) -> Self:
        """The same system with the one rate whose network is nearest to ``active_params``."""
        layout = self.layout(task)

        @cache
        def params(step: int) -> int:
            system = self.changed({"rate": step / _RATE_STEPS})
            left = {g.name: max(1, system.remaining(g, layout.size(g))) for g in layout.groups}
            return layout.params(left)

        steps = range(_RATE_STEPS)
        step = bisect_left(steps, -active_params, key=lambda step: -params(step))
        if step == len(steps):
            raise ConfigError(
                f"{self.name} cannot make the network of {task.name} as small as "
                f"{active_params:,} parameters: the smallest has {params(step - 1):,}"
            )
        near = min({max(0, step - 1), step}, key=lambda step: abs(params(step) - active_params))
        system = self.changed({"rate": near / _RATE_STEPS})
        system.check(task)
        return system

    def details(self, network: nn.Module, task: Task) -> dict[str, Any]:
        """``filters`` and how many stay, those of coupled convolutions counted once."""
        layout = self.layout(task)
        return {
            "filters": sum(map(layout.size, layout.groups)),
            "filters_kept": sum(self.counts(layout).values()),
        }


def positions_of_best(order: Tensor, count: int) -> Tensor:
    """The last ``count`` of an ascending ``order``, as ascending positions on the CPU."""
    return order[len(order) - count :].sort().values.cpu()


def kept_per_group(kept: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """How many filters stay of each group, for a row's notes."""
    return {"filters_kept": {name: len(positions) for name, positions in kept.items()}}
