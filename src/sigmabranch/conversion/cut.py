"""From chosen channels to a plan over the dense network's tensors, and the proof of a cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

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


class Cutter:
    """Cuts specializers and heads out of one dense network.

    Args:
        backbone: the dense network, in eval mode.
        levels: its trunk and levels.
        coupling: its channel couplings, with the outputs of trunk and levels watched.

    Raises:
        ConversionError: a level hands its input's channels through, so they cannot be cut alone.
    """

    def __init__(self, backbone: Backbone, levels: Levels, coupling: CouplingMap) -> None:
        self.backbone, self.levels, self.coupling = backbone, levels, coupling
        self.state = backbone.model.state_dict()
        self.outputs = levels.outputs()
        spaces = [coupling.space_of_output(path).name for path in self.outputs]
        for level, (before, after) in enumerate(pairwise(spaces)):
            if before == after:
                raise ConversionError(
                    f"{self.outputs[level + 1]} hands its input's channels through (an identity "
                    f"shortcut), so no level can begin at {levels.levels[level][0]}: "
                    "cut where the network changes its width"
                )

    def unit_of_channel(self, level: int) -> Tensor:
        """(C,) int64: which channels of a level's output stand or fall together (0: the trunk)."""
        unit_C = self.coupling.output_axis(self.outputs[level]).units
        return torch.unique(unit_C, return_inverse=True)[1]

    def inner(self, paths: Iterable[str], share: float) -> dict[str, list[int]]:
        """The strongest inner channels below ``paths`` by L1 norm, a ``share`` of each group.

        They do not depend on the branch (paper, section III-C: planes by L1 norm).
        """
        chosen = {}
        for space in self.coupling.inner_spaces(tuple(paths)):
            score = unit_scores_l1(self.coupling, self.state, space)
            chosen[space.name] = list(top_units(score, max(1, round(len(space) * share))))
        return chosen

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
            name: self.coupling.space(name).units[positions]
            for name, positions in self.inner(paths, share).items()
        }
        plan = plan_slices(self.backbone.model, self.coupling, keep).restrict(paths)
        section = self.backbone.section(paths, plan).eval()
        if example is not None:
            model = self.backbone.model
            verify_slice(model, paths, section, example, coupling=self.coupling, keep=keep)
        return section, plan

    def plan(self, lineage: Sequence[NodeChannels], paths: Iterable[str]) -> SlicePlan:
        """What to keep of the modules at ``paths``, given the channels chosen from level 1 down."""
        plan = plan_slices(self.backbone.model, self.coupling, self._keep(lineage))
        return plan.restrict(tuple(paths))

    def verify(
        self,
        section: nn.Module,
        lineage: Sequence[NodeChannels],
        levels: Sequence[int],
        example: Tensor,
    ) -> float:
        """Relative error of a cut section against the masked dense network.

        Raises:
            ConversionError: it exceeds what rounding explains.
        """
        entry = self.outputs[levels[0] - 1]
        feature = example
        for path in self.backbone.chain[: self.backbone.chain.index(entry) + 1]:
            feature = self.backbone.model.get_submodule(path)(feature)
        return verify_slice(
            self.backbone.model,
            [path for level in levels for path in self.levels.levels[level - 1]],
            section,
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
        """Space → units kept."""
        keep: dict[Space | str, Tensor] = {}
        for channels in lineage:
            unit_C = self.coupling.output_axis(channels.stage).units
            name = self.coupling.space_of_output(channels.stage).name
            keep[name] = unit_C[channels.kept].unique()
            for inner, positions in channels.inner.items():
                keep[inner] = self.coupling.space(inner).units[positions]
        return keep
