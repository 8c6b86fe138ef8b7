"""From chosen channels to a plan over the dense network's tensors, and the proof of a cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sigmabranch.backbones import Backbone, Levels
from sigmabranch.conversion.record import NodeChannels
from sigmabranch.conversion.select import top_units
from sigmabranch.coupling import (
    CouplingMap,
    SlicePlan,
    Space,
    plan_slices,
    unit_scores_l1,
    verify_slice,
)
from sigmabranch.errors import ConversionError
from sigmabranch.tree import TreeSpec


class Cutter:
    """Cuts specializers and heads out of one dense network.

    Args:
        backbone: the dense network, in eval mode.
        levels: its trunk and levels.
        coupling: its channel couplings, with the outputs of trunk and levels watched.
        entry: how levels begin (:attr:`~sigmabranch.tree.TreeSpec.entry`).

    Raises:
        ConversionError: a level cannot begin in that way.
    """

    def __init__(
        self, backbone: Backbone, levels: Levels, coupling: CouplingMap, entry: str | None
    ) -> None:
        self.backbone, self.levels, self.coupling = backbone, levels, coupling
        self.state = backbone.model.state_dict()
        self.outputs = levels.outputs()
        self.entries = self._entries(entry)

    def _entries(self, entry: str | None) -> tuple[str, ...]:
        """How each level begins: one whose last layer makes all its channels anew can project."""
        spaces = [self.coupling.space_of_output(path).name for path in self.outputs]
        entries = []
        for level, (before, after) in enumerate(pairwise(spaces)):
            rigid = self._why_rigid(self.outputs[level + 1])
            stays = (
                before == after or rigid or self._is_output_put_together(self.outputs[level + 1])
            )
            if entry == "inner" or (stays and entry is None):
                entries.append("inner")
            elif rigid:
                raise ConversionError(
                    f"channels of {self.outputs[level + 1]} cannot be dropped ({rigid}): use "
                    "entry=inner"
                )
            elif before != after:
                entries.append("project")
            elif entry == "gather":
                self._check_gather(level)
                entries.append("gather")
            else:
                raise ConversionError(
                    f"{self.outputs[level + 1]} hands its input's channels through (an identity "
                    f"shortcut), so no level can project at {self.levels.levels[level][0]}: "
                    "cut where the network changes its width, or use entry=inner or entry=gather"
                )
        return tuple(entries)

    def _why_rigid(self, output: str) -> str | None:
        """Why channels of an output cannot be dropped, if they cannot."""
        units = self.coupling.output_axis(output).units.tolist()
        return next(
            (self.coupling.fixed[unit] for unit in units if unit in self.coupling.fixed), None
        )

    def _is_output_put_together(self, output: str) -> bool:
        units = self.coupling.output_axis(output).units.unique()
        return self._is_put_together(self.coupling.space_of_output(output), units)

    def _is_put_together(self, space: Space, units: Tensor) -> bool:
        """Whether several layers make a part each of ``units``, as in dense and inception blocks.

        A choice among all of them could leave a layer without any.
        """
        for name, axis in space.tensors:
            made = torch.isin(units, self.coupling.axes[name][axis])
            if self.coupling.roles[name, axis] == "makes" and bool(made.any() > made.all()):
                return True
        return False

    def _check_gather(self, level: int) -> None:
        before, after = (
            self.coupling.output_axis(path).units for path in self.outputs[level : level + 2]
        )
        if not torch.equal(before, after):
            raise ConversionError(
                f"{self.outputs[level + 1]} adds channels to those of its input, so none can be "
                "gathered from there alone: use entry=inner"
            )

    def unit_of_channel(self, level: int) -> Tensor:
        """(C,) int64: which channels of a level's output stand or fall together (0: the trunk)."""
        unit_C = self.coupling.output_axis(self.outputs[level]).units
        return torch.unique(unit_C, return_inverse=True)[1]

    def inner_kept(
        self, paths: Iterable[str], share: float, heads: float | None = None
    ) -> dict[str, int]:
        """How many units of each inner group below ``paths`` are kept.

        Args:
            paths: modules.
            share: of the channels of each group.
            heads: share of the attention heads; None keeps them all.
        """
        kept = {}
        for name, units, are_heads in self._inner_groups(tuple(paths)):
            part = heads if are_heads else share
            if part is not None:
                kept[name] = max(1, round(units * part))
        return kept

    @cache  # noqa: B019 (as short-lived as the cutter)
    def _inner_groups(self, paths: tuple[str, ...]) -> list[tuple[str, int, bool]]:
        """Name, units and whether they are heads of every inner group below ``paths``."""
        handed_on = (*self.outputs, self.backbone.head[-1], *self.backbone.whole)
        return [
            (space.name, len(space), self.coupling.is_heads(space))
            for space in self.coupling.inner_spaces(paths, handed_on)
        ]

    def inexact(self, tree: TreeSpec) -> tuple[str, ...]:
        """Why cuts of ``tree``, which has shares for every level, change what other channels do.

        One reason for each kind of operation, the first that is met.
        """
        cut = [
            self.coupling.output_axis(end).units
            for end, entry in zip(self.outputs[1:], self.entries, strict=True)
            if entry != "inner"
        ]
        for level, share in enumerate(tree.shares or ()):
            heads = tree.heads[level] if tree.heads else None
            for name in self.inner_kept(self.levels.levels[level], share, heads):
                cut.append(self.coupling.space(name).units)
        found: dict[str, str] = {}
        for unit in torch.cat(cut).unique().tolist() if cut else ():
            if unit in self.coupling.inexact:
                reason = self.coupling.inexact[unit]
                found.setdefault(reason.split()[0], reason)
        return tuple(found.values())

    def strongest(self, group: str, count: int) -> list[int]:
        """The strongest units of an inner group by L1 norm (paper, section III-C, for planes)."""
        score_U = unit_scores_l1(self.coupling, self.state, self.coupling.space(group))
        return list(top_units(score_U, count))

    def trunk(self, share: float, example: Tensor | None) -> tuple[nn.Sequential, SlicePlan]:
        """The trunk with a share of the channels that do not leave it, and its plan.

        Args:
            share: of each group of channels, the strongest by L1 norm.
            example: an input to check the cut on; None checks nothing.

        Raises:
            ConversionError: it differs from the masked dense trunk by more than rounding explains.
        """
        paths = self.levels.trunk
        keep: dict[Space | str, Tensor] = {
            name: self.coupling.space(name).units[self.strongest(name, count)]
            for name, count in self.inner_kept(paths, share).items()
        }
        plan = plan_slices(self.backbone.model, self.coupling, keep).restrict(paths)
        section = self.backbone.section(paths, plan).eval()
        if example is not None:
            model = self.backbone.model
            verify_slice(model, paths, section, example, coupling=self.coupling, keep=keep)
        return section, plan

    def plan(
        self,
        lineage: Sequence[NodeChannels],
        paths: Iterable[str],
        gather: tuple[int, Tensor] | None = None,
    ) -> SlicePlan:
        """What to keep of the modules at ``paths``, given the channels chosen from level 1 down."""
        plan = plan_slices(self.backbone.model, self.coupling, self._keep(lineage))
        return replace(plan.restrict(tuple(paths)), gather=gather)

    def gather(self, lineage: Sequence[NodeChannels], level: int) -> tuple[int, Tensor] | None:
        """Where a level gathers: its input's channel dimension, and which positions it takes.

        Args:
            lineage: the channels chosen from level 1 down to ``level``.
            level: the first that the specializer runs.
        """
        if self.entries[level - 1] != "gather":
            return None
        given = torch.arange(len(self.unit_of_channel(level)))
        if level > 1:
            given = torch.tensor(lineage[level - 2].kept)
        taken = torch.isin(given, torch.tensor(lineage[level - 1].kept))
        return self.coupling.output_axis(self.outputs[level]).dim, taken.nonzero().flatten()

    def verify(
        self,
        section: nn.Module,
        lineage: Sequence[NodeChannels],
        levels: Sequence[int],
        example: Tensor,
    ) -> float:
        """Relative error of a cut section against the masked dense network.

        Raises:
            ConversionError: it exceeds what rounding explains, or the section writes into what it
                is given.
        """
        entry = self.outputs[levels[0] - 1]
        feature = example
        for path in self.backbone.chain[: self.backbone.chain.index(entry) + 1]:
            feature = self.backbone.model.get_submodule(path)(feature)
        return verify_slice(
            self.backbone.model,
            [path for level in levels for path in self.levels.levels[level - 1]],
            _ReadOnly(section, self.levels.levels[levels[0] - 1][0]),
            feature,
            coupling=self.coupling,
            keep=self._keep(lineage),
            entry=entry,
        )

    def verify_head(
        self, head: nn.Module, lineage: Sequence[NodeChannels], pooled: Tensor
    ) -> float:
        """The same for a cut head, given what enters the dense one: (B, C) pooled features."""
        return verify_slice(
            self.backbone.model,
            self.backbone.head,
            head,
            pooled,
            coupling=self.coupling,
            keep=self._keep(lineage),
            entry=self.outputs[-1],
        )

    def _keep(self, lineage: Sequence[NodeChannels]) -> dict[Space | str, Tensor]:
        """Space → units kept.

        A level may end with a part of its space, as where a dense block adds to its input; the
        others stay. Of a residual stream every level takes away more.
        """
        keep: dict[Space | str, Tensor] = {}
        for channels in lineage:
            unit_C = self.coupling.output_axis(channels.stage).units
            space = self.coupling.space_of_output(channels.stage)
            left = keep.get(space.name, space.units)
            gone = unit_C[~torch.isin(unit_C, unit_C[channels.kept])]
            keep[space.name] = left[~torch.isin(left, gone)]
            for inner, positions in channels.inner.items():
                keep[inner] = self.coupling.space(inner).units[positions]
        return keep


class _ReadOnly(nn.Module):
    """Runs a section, and refuses one that writes into what it is given: its siblings read that."""

    def __init__(self, section: nn.Module, begins: str) -> None:
        super().__init__()
        self.section, self.begins = section, begins

    def forward(self, feature: Any) -> Any:
        given = [leaf for leaf in pytree.tree_leaves(feature) if isinstance(leaf, Tensor)]
        before = [tensor._version for tensor in given]
        output = self.section(feature)
        if before != [tensor._version for tensor in given]:
            raise ConversionError(
                f"{self.begins} changes its input in place, which several branches would read: "
                "write it without the in-place operation, or cut elsewhere"
            )
        return output
