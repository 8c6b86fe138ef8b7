"""What a trace found: which positions of which tensors belong to which unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sigmabranch.coupling.units import located
from sigmabranch.errors import ConversionError, UnsupportedOperation

#: What a tensor does to the units along one of its axes. ``makes``: rows of a convolution or linear
#: layer. ``scales``: biases, norm affines and statistics, layer scales. ``reads``: columns of the
#: consumers.
Role = Literal["makes", "scales", "reads"]


#: What attention modules call the number of their heads, and the number of all heads' channels.
HEADS = ("num_heads", "heads", "n_heads", "nhead", "num_attention_heads")
HEAD_CHANNELS = ("attn_dim", "inner_dim", "all_head_dim", "all_head_size")
#: What modules call the number of channels that they split into equal parts, or that of a part.
PARTS = ("width", "in_channels", "expand_chs", "split_size")


class Axis(NamedTuple):
    """The channel axis of one activation: its dimension and the unit at each position."""

    dim: int
    units: Tensor


@dataclass(frozen=True, eq=False)
class Space:
    """Units that appear side by side in some axis, such as the width of a residual stage.

    Attributes:
        name: the first tensor that makes these units, e.g. ``"layer3.0.conv3.weight"``.
        units: their ids, int64 ascending.
        tensors: the (tensor name, axis) pairs that carry them, in order of use.
    """

    name: str
    units: Tensor
    tensors: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.units)


@dataclass(frozen=True, eq=False)
class CouplingMap:
    """For every axis of every parameter and buffer: the unit at each position.

    Unit 0 is no unit: that position always stays. Equal ids anywhere stand or fall together.

    Attributes:
        axes: tensor name -> axis -> unit ids, int64, one per position. Axes without units are
            absent. Tied tensors appear under all their names.
        roles: (tensor name, axis) -> what the tensor does to those units.
        outputs: watched module path -> for each tensor of its flattened output its channel axis,
            None where it has no units, or why the axis cannot be told.
        fixed: unit -> why it cannot be dropped.
        inexact: unit -> why dropping it does more than remove it (layer norm statistics, …).
        counts: (module path, attribute) -> the units that an integer attribute counts, one for each
            that it adds up: the heads of an attention module, the channels of a part.
        spaces: the units, grouped by the axes they share, in order of first use.
        per_input: module paths whose first argument has one entry for each of the network's inputs
            along its first dimension; not so with windows, and with what no input decides.
    """

    axes: Mapping[str, Mapping[int, Tensor]]
    roles: Mapping[tuple[str, int], Role]
    outputs: Mapping[str, tuple[Axis | str | None, ...]]
    fixed: Mapping[int, str]
    inexact: Mapping[int, str]
    counts: Mapping[tuple[str, str], Tensor]
    spaces: tuple[Space, ...]
    per_input: frozenset[str] = frozenset()

    def space(self, name: str) -> Space:
        """The space called ``name``.

        Raises:
            ConversionError: there is none.
        """
        if name in self._by_name:
            return self._by_name[name]
        raise ConversionError(f"no channels are called {name!r}: choose a name from map.spaces")

    @cached_property
    def _by_name(self) -> Mapping[str, Space]:
        parts = [part for space in self.spaces for part in self.parts[space.name]]
        return {space.name: space for space in (*parts, *self.spaces)}

    @cached_property
    def parts(self) -> Mapping[str, tuple[Space, ...]]:
        """Space → its units grouped further, by the axes that carry them and how often.

        All units of a part cost the same. Where several layers make a part each of what others
        read, as in dense blocks, there are several parts, with names of their own.
        """
        taken = {space.name for space in self.spaces}
        return {space.name: tuple(self._parted(space, taken)) for space in self.spaces}

    def _parted(self, space: Space, taken: set[str]) -> Iterator[Space]:
        counts = torch.stack([self._occurrences(key, space) for key in space.tensors])
        kinds, kind_U = torch.unique(counts, dim=1, return_inverse=True)
        if kinds.shape[1] == 1:
            yield space
            return
        for kind in range(kinds.shape[1]):
            keys = [
                key for key, count in zip(space.tensors, kinds[:, kind], strict=True) if count > 0
            ]
            made = [key[0] for key in keys if self.roles[key] == "makes"]
            name = unused(made[0] if made else keys[0][0], taken)
            yield Space(name, space.units[kind_U == kind], tuple(keys))

    def _occurrences(self, key: tuple[str, int], space: Space) -> Tensor:
        """How often each unit of ``space`` stands along an axis."""
        units = self.axes[key[0]][key[1]]
        position, known = located(units, space.units)
        return torch.bincount(position[known], minlength=len(space))

    def space_with(self, units: Tensor) -> Space:
        """The space that holds all of ``units``.

        Raises:
            ConversionError: there is none.
        """
        for space in self.spaces:
            if len(units) and bool(torch.isin(units, space.units).all()):
                return space
        raise ConversionError("these units do not belong to one set of channels")

    def is_heads(self, space: Space) -> bool:
        """Whether the units of ``space`` are attention heads."""
        return any(
            attribute not in PARTS and bool(torch.isin(units, space.units).any())
            for (_, attribute), units in self.counts.items()
        )

    def output_axis(self, module: str) -> Axis:
        """The channel axis of the one tensor with units that the watched ``module`` returns.

        Raises:
            ConversionError: the module was not watched, or returns none or several.
            UnsupportedOperation: the axis cannot be told.
        """
        axes = [axis for axis in self.output_axes(module) if axis is not None]
        if len(axes) != 1:
            raise ConversionError(
                f"module {module!r} returns {len(axes)} tensors with channels that can be cut; "
                "cut where there is exactly one"
            )
        return axes[0]

    def output_axes(self, module: str) -> list[Axis | None]:
        """The channel axis of each tensor that the watched ``module`` returns; raises as above."""
        if module not in self.outputs:
            raise ConversionError(f"module {module!r} was not watched: name it when tracing")
        axes: list[Axis | None] = []
        for axis in self.outputs[module]:
            if isinstance(axis, str):
                raise UnsupportedOperation(axis)
            axes.append(axis)
        return axes

    def space_of_output(self, module: str) -> Space:
        """The space of the channels that the watched ``module`` returns."""
        units = self.output_axis(module).units
        return self.space_with(units[units > 0])

    def inner_spaces(
        self, prefixes: Sequence[str], outputs: Sequence[str] | None = None
    ) -> list[Space]:
        """Spaces that live wholly under the module paths ``prefixes`` and may be cut freely.

        A space with a fixed unit, or one that a module of ``outputs`` hands on, is left out.

        Args:
            prefixes: module paths.
            outputs: watched modules; all of them if None.
        """
        handed_on = self.outputs if outputs is None else outputs
        visible = {
            unit
            for name in handed_on
            for axis in self.outputs[name]
            if isinstance(axis, Axis)
            for unit in axis.units.tolist()
        }
        return [
            part
            for space in self.spaces
            for part in self.parts[space.name]
            if all(is_under(name, prefixes) for name, _ in part.tensors)
            and visible.isdisjoint(units := part.units.tolist())
            and self.fixed.keys().isdisjoint(units)
        ]


def unused(name: str, taken: set[str]) -> str:
    """``name``, numbered if it is taken; it is taken from now on."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}#{number}"
    taken.add(found)
    return found


def is_under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted ``name`` is one of ``prefixes`` or lies below one; "" is above all."""
    return any(not prefix or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
