"""What can be removed of one shape of network, and the cut that removes it."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from sigmabranch.backbones import ResNetSpec
from sigmabranch.coupling import CouplingMap, SlicePlan, Space, plan_slices, trace
from sigmabranch.peers.filters import FilterGroup, Kept

# Couplings do not depend on an image's size, so they are traced on a small one.
_TRACED_SIDE = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """What can be removed of one shape of network.

    Attributes:
        model: a network of that shape; its weights do not matter.
        coupling: its map.
        groups: disjoint, in the network's order.
    """

    model: nn.Module
    coupling: CouplingMap
    groups: Sequence[FilterGroup]

    def size(self, group: FilterGroup) -> int:
        """Filters of each of the group's convolutions."""
        return len(self.coupling.axes[f"{group.name}.weight"][0])

    def params(self, counts: Mapping[str, int]) -> int:
        """Parameters of what is left when so many filters of each group stay."""
        return sum(
            math.prod(
                counts[self._along[name, axis]] if (name, axis) in self._along else side
                for axis, side in enumerate(parameter.shape)
            )
            for name, parameter in self.model.named_parameters()
        )

    @cached_property
    def _along(self) -> dict[tuple[str, int], str]:
        """(Parameter, axis) → the group whose filters lie along it."""
        first = {
            int(self.coupling.axes[f"{group.name}.weight"][0][0]): group.name
            for group in self.groups
            if group.scattered is None
        }
        along = {
            (tensor, axis): first[int(units[0])]
            for tensor, axes in self.coupling.axes.items()
            for axis, units in axes.items()
            if int(units[0]) in first
        }
        for group in self.groups:
            if group.scattered is not None:
                along |= {(tensor, 0): group.name for tensor in _own_tensors(group)}
        return along

    def plan(self, kept: Kept) -> SlicePlan:
        """The cut that leaves the filters ``kept``; whole where a group is not mentioned."""
        groups = [group for group in self.groups if group.name in kept]
        keep: dict[Space | str, Tensor] = {}
        for group in groups:
            if not group.scattered:
                units = self.coupling.axes[f"{group.name}.weight"][0]
                keep[self.coupling.space_with(units)] = units[kept[group.name].cpu()]
        plan = plan_slices(self.model, self.coupling, keep)
        for group in groups:
            if group.scattered:
                plan = plan.then(_rows_alone(group, kept[group.name].cpu(), plan.source))
        return plan

    def cut(self, network: nn.Module, kept: Kept) -> nn.Module:
        """A copy of ``network`` with only the filters ``kept``."""
        small = copy.deepcopy(network)
        self.plan(kept).reshape(small)
        for group in self.groups:
            positions = kept.get(group.name)
            if group.scattered and positions is not None and len(positions) < self.size(group):
                _fill_up(small, group, positions, self.size(group))
        # It names the shape of the network before the cut.
        small.__dict__.pop("skeleton_source", None)
        return small


class Scatter(nn.Module):
    """Puts channels back to where they were in the full width and leaves zeros elsewhere.

    Args:
        positions: of the channels, (C,).
        width: channels that come out.
    """

    positions: Tensor

    def __init__(self, positions: Tensor, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("positions", positions.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, width, H, W)."""
        full = x.new_zeros(x.shape[0], self.width, *x.shape[2:])
        return full.index_copy(1, self.positions, x)


@lru_cache(maxsize=8)
def anatomy(spec: ResNetSpec) -> tuple[nn.Module, CouplingMap]:
    """A network of this shape without memory, and its couplings."""
    model = spec.build()
    coupling = trace(model, torch.zeros(1, spec.in_channels, _TRACED_SIDE, _TRACED_SIDE))
    return model.to("meta"), coupling


def _own_tensors(group: FilterGroup) -> list[str]:
    """The tensors of which the filters of a scattered group are rows."""
    tensors = [f"{conv}.weight" for conv in group.convs]
    for norm in group.norms if group.scattered == "norm" else ():
        tensors += [f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    return tensors


def _rows_alone(group: FilterGroup, positions: Tensor, source: str) -> SlicePlan:
    """Cut filters without those who read them."""
    edits: dict[str, dict[str, int | tuple[int, ...]]] = {
        conv: {"out_channels": len(positions)} for conv in group.convs
    }
    if group.scattered == "norm":
        edits |= {norm: {"num_features": len(positions)} for norm in group.norms}
    keep = {name: {0: positions} for name in _own_tensors(group)}
    return SlicePlan(keep=keep, edits=edits, source=source)


def _fill_up(network: nn.Module, group: FilterGroup, positions: Tensor, width: int) -> None:
    """Put a :class:`Scatter` behind what the group says."""
    for path in group.norms if group.scattered == "norm" else group.convs:
        owner, _, leaf = path.rpartition(".")
        module = network.get_submodule(path)
        scatter = Scatter(positions.to(next(module.parameters()).device), width)
        filled = nn.Sequential(OrderedDict(narrow=module, scatter=scatter))
        setattr(network.get_submodule(owner), leaf, filled)
