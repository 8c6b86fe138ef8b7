"""What a trace found: which positions of which tensors belong to which unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sigmabranch.errors import ConversionError, UnsupportedOperation

#: What a tensor does to the units along one of its axes. ``makes``: rows of a convolution or linear
#: layer. ``scales``: biases, norm affines and statistics, layer scales. ``reads``: columns of the
#: consumers.
Role = Literal["makes", "scales", "reads"]


#: What attention modules call the number of their heads, and the number of all heads' channels.
HEADS = ("num_heads", "heads", "n_heads", "nhead", "num_attention_heads")
HEAD_CHANNELS = ("attn_dim", "inner_dim", "all_head_dim", "all_head_size")


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
            that it adds up: the heads of an attention module.
        spaces: the units, grouped by the axes they share, in order of first use.
    """

    axes: Mapping[str, Mapping[int, Tensor]]
    roles: Mapping[tuple[str, int], Role]
    outputs: Mapping[str, tuple[Axis | str | None, ...]]
    fixed: Mapping[int, str]
    inexact: Mapping[int, str]
    counts: Mapping[tuple[str, str], Tensor]
    spaces: tuple[Space, ...]

    def space(self, name: str) -> Space:
        """The space called ``name``.

        Raises:
            ConversionError: there is none.
        """
        for space in self.spaces:
            if space.name == name:
                return space
        raise ConversionError(f"no channels are called {name!r}: choose a name from map.spaces")

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
        return any(bool(torch.isin(units, space.units).any()) for units in self.counts.values())

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
            space
            for space in self.spaces
            if all(is_under(name, prefixes) for name, _ in space.tensors)
            and visible.isdisjoint(units := space.units.tolist())
            and self.fixed.keys().isdisjoint(units)
        ]


def is_under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted ``name`` is one of ``prefixes`` or lies below one; "" is above all."""
    return any(not prefix or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
