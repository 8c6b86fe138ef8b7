"""From the labels of a finished run to a :class:`CouplingMap`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sigmabranch.coupling.map import Axis, CouplingMap, Role, Space
from sigmabranch.coupling.units import Units, distinct, located, varying
from sigmabranch.errors import ConversionError

Key = tuple[str, int]
Reasons = list[tuple[Tensor, str]]


@dataclass
class Findings:
    """What the tracer writes down, in ids that may since have been declared equal.

    Attributes:
        watched: module -> (labels, shape) of each tensor it returned, None before it ran.
        weights: layer weight -> axis -> unit at each position.
        elements: elementwise parameter -> compact labels.
        roles: (layer weight, axis) -> what it does to its units.
        fixed: (units that cannot be dropped, why).
        inexact: (units that cannot be dropped exactly, why).
        counts: (module, attribute) -> the units that the attribute counts.
    """

    watched: dict[str, list[tuple[Tensor | None, torch.Size]] | None]
    weights: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    elements: dict[str, Tensor] = field(default_factory=dict)
    roles: dict[Key, Role] = field(default_factory=dict)
    fixed: Reasons = field(default_factory=list)
    inexact: Reasons = field(default_factory=list)
    counts: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def assemble(model: nn.Module, units: Units, findings: Findings) -> CouplingMap:
    """Number the units 1, 2, … in order of appearance and sort the findings by them."""
    vectors = {
        (name, axis): units.find(ids)
        for name, by_axis in findings.weights.items()
        for axis, ids in sorted(by_axis.items())
    }
    roles, fixed = dict(findings.roles), list(findings.fixed)
    for name, labels in findings.elements.items():
        channel = _channel_axis(units.compact(labels), model_tensor(model, name).shape)
        if channel is None:
            fixed.append((labels, f"{name} has no channel axis of its own"))
        else:
            vectors[name, channel.dim] = channel.units
            roles[name, channel.dim] = "scales"
    fixed += _unsaved(model, vectors) + _unmade(vectors, roles)
    number = _Numbering(units, vectors.values())
    vectors = {key: number(ids) for key, ids in vectors.items() if bool(ids.any())}
    aliases = _aliases(model)
    return CouplingMap(
        axes=_by_name(vectors, aliases),
        roles={
            (alias, axis): roles[name, axis] for name, axis in vectors for alias in aliases[name]
        },
        outputs={
            name: _output(name, found, lambda ids: number(units.compact(ids)))
            for name, found in findings.watched.items()
        },
        fixed=number.reasons(fixed),
        inexact=number.reasons(findings.inexact),
        counts={where: number(ids) for where, ids in findings.counts.items()},
        spaces=_spaces(vectors, roles),
    )


def model_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called ``name``."""
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


class _Numbering:
    """Canonical ids -> 1, 2, …; ids that no tensor carries -> 0."""

    def __init__(self, units: Units, vectors: Iterable[Tensor]) -> None:
        self._find = units.find
        self._known = distinct(vectors)

    def __call__(self, ids: Tensor) -> Tensor:
        position, known = located(self._find(ids), self._known)
        return torch.where(known, position + 1, 0)

    def reasons(self, found: Reasons) -> dict[int, str]:
        """Unit -> the first reason given for it."""
        result: dict[int, str] = {}
        for ids, why in found:
            for unit in distinct([self(ids)]).tolist():
                result.setdefault(unit, why)
        return result


def _channel_axis(labels: Tensor, shape: torch.Size) -> Axis | None:
    """The one dimension along which compact ``labels`` of a ``shape`` tensor change."""
    dims = varying(labels)
    if not dims and bool(labels.any()):
        # One unit throughout: unambiguous only where a single dimension is wide.
        dims = [dim for dim, size in enumerate(shape) if size > 1]
    if len(dims) != 1:
        return None
    return Axis(dims[0], labels.reshape(-1).expand(shape[dims[0]]).clone())


def _output(
    name: str,
    found: list[tuple[Tensor | None, torch.Size]] | None,
    number: Callable[[Tensor], Tensor],
) -> tuple[Axis | str | None, ...]:
    if found is None:
        raise ConversionError(f"watched module {name!r} did not run on the example input")
    return tuple(
        None if labels is None else _output_axis(name, number(labels), shape)
        for labels, shape in found
    )


def _output_axis(name: str, labels: Tensor, shape: torch.Size) -> Axis | str | None:
    if not bool(labels.any()):
        return None
    axis = _channel_axis(labels, shape)
    if axis is None:
        return (
            f"module {name!r} returns channels along more than one dimension of a tensor of shape "
            f"{tuple(shape)}: cut at another module"
        )
    return axis


def _unsaved(model: nn.Module, vectors: Mapping[Key, Tensor]) -> Reasons:
    saved = set(model.state_dict(keep_vars=True))
    return [
        (ids, f"{name} is not part of the state dict")
        for (name, _), ids in vectors.items()
        if name not in saved
    ]


def _unmade(vectors: Mapping[Key, Tensor], roles: Mapping[Key, Role]) -> Reasons:
    """Units of constants and tokens that no layer makes, such as relative coordinates."""
    made = distinct(ids for key, ids in vectors.items() if roles[key] == "makes")
    return [
        (ids[~located(ids, made)[1]], f"{name} is the only source of these channels")
        for (name, _), ids in vectors.items()
    ]


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name of each tensor -> all its names."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    return {group[0]: group for group in names.values()}


def _by_name(
    vectors: Mapping[Key, Tensor], aliases: Mapping[str, list[str]]
) -> dict[str, dict[int, Tensor]]:
    axes: dict[str, dict[int, Tensor]] = {}
    for (name, axis), ids in vectors.items():
        for alias in aliases[name]:
            axes.setdefault(alias, {})[axis] = ids
    return axes


def _spaces(vectors: Mapping[Key, Tensor], roles: Mapping[Key, Role]) -> tuple[Space, ...]:
    """Group the units that share an axis, directly or through others."""
    count = max((int(ids.max()) for ids in vectors.values()), default=0)
    groups = Units()
    groups.fresh(count)
    for ids in vectors.values():
        present = distinct([ids])
        groups.unite(present, present[:1])
    members: dict[int, list[Key]] = {}
    for key, ids in vectors.items():
        members.setdefault(int(groups.find(distinct([ids]))[0]), []).append(key)
    everyone = torch.arange(1, count + 1)
    home = groups.find(everyone)
    return tuple(
        Space(_maker(keys, roles), everyone[home == group], tuple(keys))
        for group, keys in sorted(members.items())
    )


def _maker(keys: list[Key], roles: Mapping[Key, Role]) -> str:
    # Not after a reader: its rows may be a space of their own.
    for role in ("makes", "scales"):
        names = [name for name, axis in keys if roles[name, axis] == role]
        if names:
            return names[0]
    return f"{keys[0][0]}:{keys[0][1]}"
