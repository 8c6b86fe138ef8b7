"""Which channels of every level a node's children keep (paper, section III-C, phases 2 and 4).

Shapes: B batch, K clusters, C channels, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sigmabranch.backbones import Backbone, Levels
from sigmabranch.conversion.activations import DenseActivations, unit_means
from sigmabranch.conversion.cut import Cutter
from sigmabranch.conversion.record import ConversionSpec, NodeChannels
from sigmabranch.conversion.select import (
    Selection,
    select_at_random,
    select_by_activation,
    select_evenly,
    top_units,
)
from sigmabranch.coupling import CouplingMap, Space
from sigmabranch.errors import ConfigError
from sigmabranch.tree import TreeSpec

#: What was measured (:class:`DenseActivations`) → (K, C or U) means over a node's clusters.
Means = Mapping[str, Tensor]


class ChannelChoice:
    """Sizes of all levels, and the choice of channels from what they do.

    Args:
        backbone: the dense network, in eval mode.
        levels: its trunk and levels.
        coupling: its channel couplings, with the outputs of trunk and levels watched.
        tree: the tree.
        spec: how to choose.

    Attributes:
        widths: output channels per level.
        shares: share of the inner channels kept per level.

    Raises:
        ConfigError: widths that the network does not have, or cannot give.
        ConversionError: a level cannot begin as the tree asks.
    """

    def __init__(
        self,
        backbone: Backbone,
        levels: Levels,
        coupling: CouplingMap,
        tree: TreeSpec,
        spec: ConversionSpec,
    ) -> None:
        self.backbone, self.levels, self.tree, self.spec = backbone, levels, tree, spec
        self.cutter = Cutter(backbone, levels, coupling, tree.entry)
        self.entries, self.outputs = self.cutter.entries, levels.outputs()
        source = [len(self.cutter.unit_of_channel(level)) for level in range(1, tree.depth + 1)]
        self.widths = self._widths(source)
        self.shares = tree.shares or tuple(
            1 / tree.parallel(level) if entry == "inner" else width / full
            for level, (entry, width, full) in enumerate(
                zip(self.entries, self.widths, source, strict=True), start=1
            )
        )

    def _widths(self, source: Sequence[int]) -> tuple[int, ...]:
        wanted = self.tree.level_widths(source)
        widths = []
        for level, entry in enumerate(self.entries, start=1):
            width, full = wanted[level - 1], source[level - 1]
            if entry == "inner" and self.tree.widths and width < full:
                raise ConfigError(
                    f"tree level {level} keeps all its {full} channels and cuts inside its blocks "
                    "only: give shares, not widths, or entry=gather"
                )
            widths.append(full if entry == "inner" else width)
        return tuple(widths)

    def inner_kept(self, level: int) -> dict[str, int]:
        """How many units of each inner group a node of that level keeps; the head's, too."""
        paths = self.levels.levels[level - 1]
        paths += self.backbone.head if level == self.tree.depth else ()
        heads = self.tree.heads[level - 1] if self.tree.heads else None
        return self.cutter.inner_kept(paths, self.shares[level - 1], heads)

    def units_kept(self, level: int) -> int:
        """How many units a node of that level keeps; a unit is one channel or several tied ones."""
        units = len(self._units(level))
        return max(1, self.widths[level - 1] * units // len(self.cutter.unit_of_channel(level)))

    def _units(self, level: int) -> tuple[int, ...]:
        return tuple(range(int(self.cutter.unit_of_channel(level).max()) + 1))

    # Measuring.

    @cached_property
    def activations(self) -> DenseActivations:
        """Measures the levels' outputs and the inner groups that are chosen by activation."""
        groups: list[Space] = []
        for level, entry in enumerate(self.entries, start=1):
            how = self.spec.inner or ("activation" if entry == "inner" else "norm")
            if how == "activation" and self.spec.channels in ("activation", "average"):
                groups += map(self.cutter.coupling.space, self.inner_kept(level))
        return DenseActivations(self.backbone, self.levels, self.cutter.coupling, groups)

    def measured(self, first: int, last: int) -> dict[str, int]:
        """What is measured of the levels ``first`` to ``last``: name → how many numbers."""
        sizes = {}
        for level in range(first, last + 1):
            sizes[self.outputs[level]] = len(self.cutter.unit_of_channel(level))
            for name in self.inner_kept(level).keys() & self.activations.inner:
                sizes[name] = len(self.cutter.coupling.space(name))
        return dict(sorted(sizes.items()))  # the same order in every process

    # Choosing.

    def for_children(
        self,
        branches: int,
        levels: range,
        means: Means,
        given: Sequence[int] | None,
        generator: Callable[[int], torch.Generator],
    ) -> list[list[NodeChannels]]:
        """Each branch's channels, level by level.

        Branches that share filters hold the same channels: those that do most on average over the
        clusters, each counting alike.

        Args:
            branches: K.
            levels: those below the node.
            means: what the channels do over each cluster; unused where they are drawn or spaced.
            given: of a residual stream, the channels that the node has; None for all.
            generator: level → randomness.
        """
        if self.tree.sharing:
            alike = {name: mean.mean(0, keepdim=True) for name, mean in means.items()}
            return [
                self._for_branches(1, levels, alike, given, generator)[0] for _ in range(branches)
            ]
        return self._for_branches(branches, levels, means, given, generator)

    def _for_branches(
        self,
        branches: int,
        levels: range,
        means: Means,
        given: Sequence[int] | None,
        generator: Callable[[int], torch.Generator],
    ) -> list[list[NodeChannels]]:
        chosen: dict[int, list[Selection]] = {}
        for level in levels:
            # A leaf runs several levels: what it has gathered once is all that it has.
            again = level > levels[0] and self.entries[level - 1] == "gather"
            chosen[level] = (
                chosen[level - 1]
                if again
                else self._selections(branches, level, means, given, generator)
            )
        return [
            [
                self._channels(
                    level, chosen[level][branch], self._inside(branches, branch, level, means)
                )
                for level in levels
            ]
            for branch in range(branches)
        ]

    def _selections(
        self,
        branches: int,
        level: int,
        means: Means,
        given: Sequence[int] | None,
        generator: Callable[[int], torch.Generator],
    ) -> list[Selection]:
        """All branches' units of one level's outputs."""
        candidates, unit_C = self._units(level), self.cutter.unit_of_channel(level)
        if self.entries[level - 1] == "inner":
            return [Selection(shared=candidates, specific=())] * branches
        if self.entries[level - 1] == "gather" and given is not None:
            candidates = tuple(unit_C[list(given)].unique().tolist())
        width = min(self.units_kept(level), len(candidates))
        if self.spec.channels == "random":
            found = select_at_random(len(candidates), width, generator(level), branches)
        elif self.spec.channels == "uniform":
            found = select_evenly(len(candidates), width, branches)
        else:
            mean_KU = unit_means(means[self.outputs[level]], unit_C)[:, candidates]
            found = (
                [Selection(shared=top_units(mean_KU[0], width), specific=())]
                if branches == 1
                else select_by_activation(mean_KU, width, self.spec.shared_fraction)
            )
        return [selection.among(candidates) for selection in found]

    def _inside(self, branches: int, branch: int, level: int, means: Means) -> dict[str, list[int]]:
        """A branch's inner channels: first tensor of each group → positions kept."""
        chosen = {}
        for name, count in self.inner_kept(level).items():
            if name not in means:
                chosen[name] = self.cutter.strongest(name, count)
            elif branches == 1:
                chosen[name] = list(top_units(means[name][0], count))
            else:
                best = select_by_activation(means[name], count, self.spec.shared_fraction)
                chosen[name] = list(best[branch].kept)
        return chosen

    def on_average(self, means: Means) -> list[NodeChannels]:
        """The channels of every level that do most over all samples: one path for all inputs."""
        lineage: list[NodeChannels] = []
        for level in range(1, self.tree.depth + 1):
            if not lineage or self.entries[level - 1] != "gather":
                mean_KU = unit_means(means[self.outputs[level]], self.cutter.unit_of_channel(level))
                kept = top_units(mean_KU[0], self.units_kept(level))
            selection = Selection(shared=kept, specific=())
            lineage.append(self._channels(level, selection, self._inside(1, 0, level, means)))
        return lineage

    def _channels(
        self, level: int, selection: Selection, inner: dict[str, list[int]]
    ) -> NodeChannels:
        """Units to channels of the dense network."""
        unit_C = self.cutter.unit_of_channel(level)
        return NodeChannels(
            stage=self.outputs[level],
            shared=_positions(unit_C, selection.shared),
            specific=_positions(unit_C, selection.specific),
            kept=_positions(unit_C, selection.kept),
            inner=inner,
        )


def _positions(unit_C: Tensor, units: Sequence[int]) -> list[int]:
    chosen_C = torch.isin(unit_C.cpu(), torch.tensor(units, dtype=torch.int64))
    return chosen_C.nonzero().flatten().tolist()
