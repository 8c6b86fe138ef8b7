"""From where the knobs of a search stand to a tree of known size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from sigmabranch.backbones import Backbone, as_backbone
from sigmabranch.conversion import Proposal, plan_budget, propose_tree
from sigmabranch.conversion.shards import Loader
from sigmabranch.errors import (
    ConfigError,
    ConversionError,
    MemoryExhausted,
    NumericError,
    SigmaBranchError,
    UnsupportedOperation,
)
from sigmabranch.search.space import Choice, Space
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example
from sigmabranch.tree import TreeSpec

#: What one tree may trip over without telling anything about others.
INFEASIBLE = (ConfigError, ConversionError, UnsupportedOperation, NumericError, MemoryExhausted)


def proposed(
    task: Task,
    dense: nn.Module,
    loader: Loader,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Proposal:
    """The tree that the data propose for a task, at most as deep as the task's own.

    Args:
        task: its tree says the rest; its conversion, whether nodes may have more than two branches.
        dense: the trained network.
        loader: (inputs, labels) batches without augmentation.
        seed: of whatever is drawn.
        progress: called with (what, samples done, samples in all).

    Raises:
        ConfigError, ConversionError, DataError, NumericError: see
            :func:`~sigmabranch.conversion.propose_tree`.
    """
    conversion = task.conversion
    # What balances clusters, or makes them of classes, knows two branches only.
    binary = conversion.balanced or conversion.clusters == "classes"
    return propose_tree(
        dense,
        loader,
        task.tree,
        max_depth=task.tree.depth,
        max_branches=2 if binary else 4,
        centred=conversion.centred,
        seed=seed,
        progress=progress,
    )


@dataclass(frozen=True, kw_only=True)
class Trees:
    """The trees of one task.

    Attributes:
        task: its network, and the tree and conversion that choices change.
        space: what they may be.
    """

    task: Task
    space: Space

    @cached_property
    def example(self) -> Tensor:
        """One blank input, (1, ...)."""
        return example(self.task)

    @cached_property
    def backbone(self) -> Backbone:
        """Where the task's network may be cut; its weights mean nothing."""
        return as_backbone(self.task.model.build().eval(), self.example)

    def cuts(self) -> list[tuple[str, ...]]:
        """The combinations of cuts at which balanced trees of the largest size are possible.

        Raises:
            ConfigError: there is none; the message gives a reason.
        """
        stages = [stage for stage in self.backbone.stages if self.backbone.chain.index(stage)]
        found: list[tuple[str, ...]] = []
        reason: SigmaBranchError | None = None
        for cuts in self.space.cuts(stages):
            for tree in self._smallest(cuts):
                try:
                    self._plan(tree, round(100 * self.space.active[1]))
                except INFEASIBLE as error:
                    reason = error
                else:
                    found.append(cuts)
                    break
        if not found:
            raise ConfigError(f"no tree of this space is possible: {reason}")
        return found

    def draft(
        self,
        choice: Choice,
        dense: nn.Module,
        loader: Loader,
        seed: int,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Task:
        """The task with the tree and conversion that a choice stands for.

        Args:
            choice: knob → where it stands.
            dense: the trained network, whose features give a tree its shape.
            loader: (inputs, labels) batches for that, without augmentation.
            seed: of whatever the shape draws.
            progress: called with (what, samples done, samples in all).

        Raises:
            ConfigError, ConversionError, UnsupportedOperation, NumericError: no such tree.
        """
        task = self.task
        conversion = replace(task.conversion, shared_fraction=choice["shared_fraction"])
        tree = self._template(tuple(choice["cuts"].split(",")), choice)
        task = replace(task, tree=tree, conversion=conversion)
        if choice["shape"] == "data":
            tree = proposed(task, dense, loader, seed, progress).tree
        return replace(task, tree=self._plan(tree, choice["active"]))

    def _plan(self, tree: TreeSpec, percent: int) -> TreeSpec:
        return plan_budget(self.backbone, self.example, f"{percent}%", tree).tree

    def _smallest(self, cuts: tuple[str, ...]) -> Iterator[TreeSpec]:
        """The trees at these cuts that are possible if any is, one for each way to begin levels."""
        for entry in self.space.entry or (self.task.tree.entry,):
            yield self._template(
                cuts, {"trunk_share": min(self.space.trunk_share), "entry": entry, "early": False}
            )

    def _template(self, cuts: tuple[str, ...], choice: Choice) -> TreeSpec:
        """The balanced tree at these cuts, its widths still open."""
        own = self.task.tree
        changed: dict[str, Any] = {
            name: choice[name] for name in ("entry", "projection_dim") if name in choice
        }
        if "early" in choice:
            trunk = self.backbone.levels(len(cuts), cuts).trunk
            changed["decide_after"] = trunk[-1] if choice["early"] else None
        share = choice["trunk_share"]
        return replace(
            own,
            leaves=TreeSpec.balanced(len(cuts)).leaves,
            cuts=cuts,
            widths=None,
            shares=None,
            heads=(1.0,) * len(cuts) if own.heads else None,
            trunk_share=None if share == 1 else share,
            **changed,
        )
