"""Sigma-Branch itself as a row of the comparison, and its ablations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from sigmabranch.backbones import as_backbone
from sigmabranch.errors import ConfigError
from sigmabranch.measure import count_parameters
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.sizing import active_params, at_share, check_share
from sigmabranch.peers.system import System, Trained
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import sketch
from sigmabranch.tree import TreeSpec

# What a row may change without leaving the table's recipe: the method, not the training.
_OWN = ("tree", "conversion")
_METHOD = (
    "resp_weight", "resp_weight_end", "resp_temperature", "resp_temperature_end", "resp_prior",
    "class_target", "balance_weight", "node_grad_scale", "share_first",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SigmaBranch(System):
    """The branched network of the task, with some settings changed.

    Attributes:
        settings: as ``--set`` takes them, of the sections tree, conversion and finetune.
        active_share: parameters of one path over those of the dense network; the widths of the
            tree's levels are solved for it. None leaves them as they are.
        trunk_left: modules of the trunk that are still to run when all routers have decided, which
            sets ``tree.decide_after`` whatever the network calls them. None leaves it as it is.
        same_size: solve the widths for as large a path as without the settings.
    """

    name: ClassVar[str] = "sigma-branch"
    summary: ClassVar[str] = "this library's branched network"

    settings: tuple[str, ...] = ()
    active_share: float | None = None
    trunk_left: int | None = None
    same_size: bool = False

    def __post_init__(self) -> None:
        check_share(self.active_share)
        if self.trunk_left is not None and self.trunk_left < 0:
            raise ConfigError(f"trunk_left must be at least 0, got {self.trunk_left}")
        if self.same_size and self.active_share is not None:
            raise ConfigError("same_size and active_share both say how large a path is: set one")

    def task(self, task: Task) -> Task:
        """``task`` with this row's settings.

        Raises:
            ConfigError: a setting that does not exist, or of the data or the dense network; or a
                trunk that is shorter than ``trunk_left``.
        """
        changed = task.with_settings(self.settings)
        if self.trunk_left is not None:
            changed = replace(changed, tree=_decided_before(changed, self.trunk_left))
        changed = at_share(changed, self.active_share)
        if self.same_size:
            share = active_params(task) / count_parameters([task.model.build()])
            changed = at_share(changed, share)
        if (changed.data, changed.model, changed.dense) != (task.data, task.model, task.dense):
            raise ConfigError(
                "sigma-branch settings may change tree, conversion and finetune only: all rows "
                f"share data and source network, got {', '.join(self.settings)}"
            )
        return changed

    def check(self, task: Task) -> None:
        """The tree must fit the network, and the settings change something."""
        if self != type(self)() and self.task(task) == task:
            raise ConfigError(
                f"{task.name} is set like that already, so the row would be sigma-branch again: "
                "leave it out"
            )
        sketch(self.task(task))

    def sketch(self, task: Task) -> nn.Module:
        """A branched network of the right shapes."""
        return sketch(self.task(task))[1]

    def run(self, bench: Bench) -> Trained:
        """Convert the source network and fine-tune it."""
        task = self.task(bench.task)
        chain = bench.chain if task == bench.task else bench.chain.variant(task, bench.folder)
        network = chain.branched()
        return Trained(
            network=network,
            recipe=task.finetune,
            epochs=task.dense.epochs + task.finetune.epochs,
            mark=self._mark(bench.task, task),
            notes={"converted": chain.accuracy(chain.converted())["top1"]},
        )

    def _mark(self, table: Task, own: Task) -> str:
        """Settings of the training that no other row has."""
        before, after = table.finetune.to_dict(), own.finetune.to_dict()
        changed = {
            name: value
            for name, value in after.items()
            if value != before[name] and name not in _METHOD
        }
        return _written(changed)


def _decided_before(task: Task, left: int) -> TreeSpec:
    """The task's tree, decided so many modules before its trunk ends."""
    with torch.device("meta"):
        backbone = as_backbone(task.model.build())
    trunk = backbone.levels(task.tree.depth, task.tree.cuts).trunk
    if left >= len(trunk):
        raise ConfigError(
            f"trunk_left is {left}, but the trunk has {len(trunk)} modules: choose a smaller one"
        )
    return replace(task.tree, decide_after=trunk[-1 - left])


def _written(changed: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changed.items())
