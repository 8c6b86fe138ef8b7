"""From the units that are kept to a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sigmabranch.coupling.map import CouplingMap, Space
from sigmabranch.coupling.plan import SlicePlan, Value, fingerprint
from sigmabranch.coupling.units import located
from sigmabranch.errors import ConversionError

Keep: TypeAlias = Mapping[Space | str, Tensor]


def plan_slices(model: nn.Module, coupling: CouplingMap, keep: Keep) -> SlicePlan:
    """The plan that keeps the given units.

    Args:
        model: the network that was traced.
        coupling: its map.
        keep: space (or its name) -> int64 ids of the units to keep, in any order. Spaces that are
            not mentioned are kept whole.

    Raises:
        ConversionError: a unit is foreign or cannot be dropped, or nothing would be left.
    """
    dropped = dropped_units(coupling, keep)
    positions: dict[str, dict[int, Tensor]] = {}
    for name, axes in coupling.axes.items():
        for axis, units in axes.items():
            stays = ~located(units, dropped)[1]
            if not bool(stays.any()):
                raise ConversionError(f"nothing is left of {name} along axis {axis}: keep some")
            if not bool(stays.all()):
                positions.setdefault(name, {})[axis] = stays.nonzero().flatten()
    return SlicePlan(
        keep=positions,
        edits=_merged(_edits(model, positions), _recounted(coupling, dropped)),
        source=fingerprint(model.state_dict()),
    )


def dropped_units(coupling: CouplingMap, keep: Keep) -> Tensor:
    """The units that ``keep`` leaves out, int64 ascending.

    Raises:
        ConversionError: a unit is foreign to its space, or one that is fixed would be dropped.
    """
    dropped = [torch.empty(0, dtype=torch.int64)]
    for chosen, kept in keep.items():
        space = chosen if isinstance(chosen, Space) else coupling.space(chosen)
        units = kept.cpu()
        foreign = units[~located(units, space.units)[1]]
        if len(foreign):
            raise ConversionError(f"unit {int(foreign[0])} is not one of {space.name}")
        gone = space.units[~torch.isin(space.units, units)]
        for unit in gone.tolist():
            if unit in coupling.fixed:
                raise ConversionError(
                    f"channels of {space.name} cannot be dropped: {coupling.fixed[unit]}"
                )
        dropped.append(gone)
    return torch.unique(torch.cat(dropped))


def _merged(*edits: Iterable[tuple[str, dict[str, Value]]]) -> dict[str, dict[str, Value]]:
    merged: dict[str, dict[str, Value]] = {}
    for path, edit in chain(*edits):
        merged.setdefault(path, {}).update(edit)
    return merged


def _recounted(coupling: CouplingMap, dropped: Tensor) -> Iterator[tuple[str, dict[str, Value]]]:
    """Attributes that count units, where units are dropped."""
    for (path, attribute), units in coupling.counts.items():
        gone = int(located(units, dropped)[1].sum())
        if gone:
            yield path, {attribute: len(units) - gone}


def _edits(
    model: nn.Module, positions: Mapping[str, Mapping[int, Tensor]]
) -> Iterator[tuple[str, dict[str, Value]]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute in ("weight", "running_mean"):
            name = f"{path}.{attribute}" if path else attribute
            if name in positions:
                kept = {axis: len(index) for axis, index in positions[name].items()}
                shape = getattr(module, attribute).shape
                edit = _changes(module, [kept.get(axis, n) for axis, n in enumerate(shape)])
                if edit:
                    yield path, edit
                break
        yield from _written_shape(path, module, positions)


def _written_shape(
    path: str, module: nn.Module, positions: Mapping[str, Mapping[int, Tensor]]
) -> Iterator[tuple[str, dict[str, Value]]]:
    """The attribute ``shape`` of a module that views its vector of scales in that shape."""
    shape = vars(module).get("shape")
    for name, vector in module.named_parameters(path, recurse=False):
        if name in positions and isinstance(shape, tuple) and vector.shape == (max(shape),):
            left = len(positions[name][0])
            yield path, {"shape": tuple(left if size > 1 else 1 for size in shape)}


def _changes(module: nn.Module, shape: list[int]) -> dict[str, Value]:
    """The attributes of ``module`` that change when its weight gets ``shape``."""
    values: dict[str, Value] = {}
    if isinstance(module, nn.modules.conv._ConvNd):
        values = _convolution_attributes(module, shape)
    elif isinstance(module, nn.Linear):
        values = {"in_features": shape[1], "out_features": shape[0]}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        values = {"num_features": shape[0]}
    elif isinstance(module, nn.GroupNorm):
        values = {"num_channels": shape[0]}
    elif isinstance(module, nn.Embedding):
        values = {"embedding_dim": shape[1]}
    elif isinstance(module, nn.PReLU):
        values = {"num_parameters": shape[0]}
    elif hasattr(module, "normalized_shape"):
        values = {"normalized_shape": tuple(shape)}
    return {key: value for key, value in values.items() if getattr(module, key) != value}


def _convolution_attributes(module: nn.modules.conv._ConvNd, shape: list[int]) -> dict[str, Value]:
    rows, columns = (shape[1], shape[0]) if module.transposed else (shape[0], shape[1])
    depthwise = 1 < module.groups == module.in_channels
    multiplier = module.out_channels // module.groups
    groups = rows // multiplier if depthwise else module.groups
    return {
        "in_channels": groups if depthwise else columns * module.groups,
        "out_channels": rows,
        "groups": groups,
    }
