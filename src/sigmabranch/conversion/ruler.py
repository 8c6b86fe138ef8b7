"""How large the paths of a tree would be, counted from a trace alone.

What a plan keeps of a tensor is a product over its axes, and what it keeps of an axis depends only
on how many units of one group are kept. So a table per axis answers for all widths at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sigmabranch.conversion.cut import Cutter
from sigmabranch.errors import ConversionError
from sigmabranch.tree import NodeId, TreeSpec

#: A group of units: the outputs of a level, or an inner group by its first tensor.
Group: TypeAlias = int | str


@dataclass(frozen=True, slots=True)
class Sizes:
    """What one path and the whole tree hold and do.

    Attributes:
        active_params: parameters of one path, its routers included; of the longest, if they differ.
        total_params: parameters of all nodes.
        macs: multiply-accumulates of one path's convolutions and linear layers, of the most if
            they differ; products of activations with each other, as in attention, are not counted.
    """

    active_params: int
    total_params: int
    macs: int


#: A tensor's axis, and which level's output it is cut with → what is left of it.
Tables: TypeAlias = "dict[tuple[str, int, int | None, str | None], _Axis]"


class Ruler:
    """Sizes of a tree's nodes as a function of the widths and shares.

    Args:
        cutter: the dense network with the levels of ``tree``.
        tree: the tree; its widths, shares and heads do not matter, but whether it cuts heads does.
        positions: weight → how many positions of the output it is applied at
            (:func:`applications`).
        tables: what rulers of the same network have counted already, and this one adds to.

    Raises:
        ConversionError: the tree decides after a module that its trunk lacks.
    """

    def __init__(
        self,
        cutter: Cutter,
        tree: TreeSpec,
        positions: dict[str, int],
        tables: Tables | None = None,
    ) -> None:
        self.cutter, self.tree, self.positions = cutter, tree, positions
        self._tables = {} if tables is None else tables
        self.units = [
            int(cutter.unit_of_channel(level).max()) + 1 for level in range(tree.depth + 1)
        ]
        self.channels = [len(cutter.unit_of_channel(level)) for level in range(tree.depth + 1)]
        self._space_of_unit = self._spaces()
        self._output_spaces = [cutter.coupling.space_of_output(end).name for end in cutter.outputs]
        backbone, levels = cutter.backbone, cutter.levels
        parts = enumerate((levels.trunk, *levels.levels))
        self._parts = [self._tensors(paths, level) for level, paths in parts]
        self._parts.append(self._tensors(backbone.head, tree.depth))
        self._early = self._read_early(tree.decide_after)

    def sizes(self, tree: TreeSpec) -> Sizes:
        """Sizes of ``tree``, which has widths and shares for every level."""
        cost = cache(partial(self._cost, tree))  # many nodes keep the same
        inner, leaves = set(tree.inner), set(tree.leaves)
        params: dict[NodeId, int] = {}
        macs: dict[NodeId, int] = {}
        for node in ((), *tree.specializers):
            outputs = self._outputs_kept(tree, node)
            parts = [cost(level, outputs[: level + 1]) for level in tree.levels_of(node)]
            if node in leaves:
                parts.append(cost(tree.depth + 1, outputs))
            params[node], macs[node] = map(sum, zip(*parts, strict=True))
            if node in inner:
                params[node] += self._router_params(tree, node, outputs)
        paths = [[leaf[:length] for length in range(len(leaf) + 1)] for leaf in tree.leaves]
        return Sizes(
            active_params=max(sum(params[node] for node in path) for path in paths),
            total_params=sum(params.values()),
            macs=max(sum(macs[node] for node in path) for path in paths),
        )

    def _outputs_kept(self, tree: TreeSpec, node: NodeId) -> tuple[int, ...]:
        """Units kept of the outputs of the trunk and of every level down to the node's last."""
        kept = [self.units[0]]
        for length in range(1, len(node) + 1):
            levels = tree.levels_of(node[:length])
            for level in levels:
                width = (tree.widths or ())[level - 1]
                wanted = max(1, width * self.units[level] // self.channels[level])
                if self.cutter.entries[level - 1] == "gather":
                    # There is no more than what came in, and a node gathers once.
                    wanted = min(wanted, kept[-1]) if level == levels[0] else kept[-1]
                kept.append(wanted)
        return tuple(kept)

    def _router_params(self, tree: TreeSpec, node: NodeId, outputs: tuple[int, ...]) -> int:
        """Projection, layer norm and gate of a router (paper, eq. 1)."""
        latent, branches = tree.projection_dim, len(tree.children(node))
        if self._early is not None:
            channels = self._early.left(self._kept(tree, 0, outputs[:1]))
        else:
            level = len(node)
            channels = outputs[level] * self.channels[level] // self.units[level]
        return latent * (channels + 1) + 2 * latent + branches * (latent + 1)

    # What is kept of an axis, by what is kept of its group.

    def _spaces(self) -> Tensor:
        """Unit → number of its space."""
        spaces = self.cutter.coupling.spaces
        last = max((int(space.units.max()) for space in spaces), default=0)
        table = torch.full((last + 1,), -1)
        for number, space in enumerate(spaces):
            table[space.units] = number
        return table

    def _kept(self, tree: TreeSpec, level: int, outputs: Sequence[int]) -> dict[Group, int]:
        """Units kept of every group that the modules of a level see."""
        kept: dict[Group, int] = dict(enumerate(outputs))
        if level:
            share = (tree.shares or ())[level - 1]
            heads = tree.heads[level - 1] if tree.heads else None
            paths = self.cutter.levels.levels[level - 1]
            paths += self.cutter.backbone.head if level == tree.depth else ()
            kept.update(self.cutter.inner_kept(paths, share, heads))
        elif tree.trunk_share is not None:
            kept.update(self.cutter.inner_kept(self.cutter.levels.trunk, tree.trunk_share))
        return kept

    def _read_early(self, after: str | None) -> _Axis | None:
        """The channels that all routers read where the tree decides inside the trunk."""
        if after is None:
            return None
        if after not in self.cutter.levels.trunk:
            raise ConversionError(
                f"tree decide_after={after!r} is no module of the trunk: choose from "
                f"{', '.join(self.cutter.levels.trunk)}"
            )
        units = self.cutter.coupling.output_axis(after).units
        return self._axis((after, 0), units, len(units), 0)

    def _tensors(self, paths: Sequence[str], level: int) -> list[tuple[str, list[_Axis]]]:
        """Every parameter of the modules at ``paths``, with the table of each of its axes."""
        tensors = []
        for path in paths:
            module = self.cutter.backbone.model.get_submodule(path)
            for name, parameter in module.named_parameters(path):
                axes = self.cutter.coupling.axes.get(name, {})
                tables = [
                    self._axis((name, dim), axes.get(dim), size, level)
                    for dim, size in enumerate(parameter.shape)
                ]
                tensors.append((name, tables))
        return tensors

    def _axis(self, at: tuple[str, int], units: Tensor | None, size: int, level: int) -> _Axis:
        if units is None or not bool((units > 0).any()):
            return _Axis(size, ())
        number = int(self._space_of_unit[units[units > 0][0]])
        space = self.cutter.coupling.spaces[number].name
        own = [before for before in range(level + 1) if self._output_spaces[before] == space]
        key = (*at, own[-1] if own else None, self.cutter.outputs[own[-1]] if own else None)
        if key not in self._tables:
            tables = [
                (group, _table(units, members)) for group, members in self._groups(space, *own[-1:])
            ]
            tables = [(group, table) for group, table in tables if table[-1]]
            self._tables[key] = _Axis(size - sum(table[-1] for _, table in tables), tuple(tables))
        return self._tables[key]

    @cache  # noqa: B019 (as short-lived as the ruler)
    def _groups(self, space: str, level: int | None = None) -> list[tuple[Group, Tensor]]:
        """The units of a space by what decides on them: the output of ``level``, then parts."""
        groups: list[tuple[Group, Tensor]] = [
            (part.name, part.units) for part in self.cutter.coupling.parts[space]
        ]
        if level is not None:
            ends = self.cutter.coupling.output_axis(self.cutter.outputs[level]).units.unique()
            groups = [(name, part[~torch.isin(part, ends)]) for name, part in groups]
            groups.insert(0, (level, ends))
        return [(group, members) for group, members in groups if len(members)]

    def _cost(self, tree: TreeSpec, level: int, outputs: tuple[int, ...]) -> tuple[int, int]:
        """Parameters and MACs of a level's modules; of the trunk at 0, of the head after all."""
        kept = self._kept(tree, min(level, tree.depth), outputs)
        params = macs = 0
        for name, axes in self._parts[level]:
            left = prod(axis.left(kept) for axis in axes)
            params += left
            macs += left * self.positions.get(name, 0)
        return params, macs


@dataclass(frozen=True, slots=True)
class _Axis:
    """Positions left of an axis by units left of its groups: ``always``, and a table for each."""

    always: int
    tables: tuple[tuple[Group, list[int]], ...]

    def left(self, kept: dict[Group, int]) -> int:
        return self.always + sum(table[kept.get(group, -1)] for group, table in self.tables)


def _table(units: Tensor, group: Tensor) -> list[int]:
    """Positions left when the first k units of a group are kept, for every k."""
    rank = torch.searchsorted(group, units).clamp(max=len(group) - 1)
    member = group[rank] == units
    counts = torch.bincount(rank[member], minlength=len(group)).cumsum(0)
    return [0, *counts.tolist()]


def applications(model: nn.Module, example: Tensor) -> dict[str, int]:
    """How many output positions each convolution's or linear layer's weight is applied at.

    Args:
        model: the dense network, in eval mode.
        example: one input, (1, ...).
    """
    found: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            note = partial(_note, found, f"{name}.weight", len(weight))
            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return found


def _note(
    found: dict[str, int], name: str, rows: int, module: nn.Module, given: Any, output: Any
) -> None:
    if isinstance(output, Tensor):
        found[name] = found.get(name, 0) + output.numel() // rows
