"""Which channels must stay because their number is written into a forward.

Labels tell what a cut does to weights, not whether a forward still runs: it may view a feature in
sizes that were plain numbers when the network was built. So the network is run with one unit less
of every group, and with half of them. Where it stops, its modules are run alone, the innermost
first, until the groups are found without which everything else runs; these are kept whole.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sigmabranch.coupling.cut import dropped_units, plan_slices
from sigmabranch.coupling.map import Axis, CouplingMap, Space, is_under
from sigmabranch.coupling.plan import SlicePlan
from sigmabranch.coupling.units import located

#: How the reason of a channel that stays for a forward begins; the module's path follows.
WRITTEN = "their number is written into the forward of "


@dataclass(frozen=True, slots=True)
class Given:
    """What a module was called with, and the channel axis of each tensor among it."""

    arguments: tuple[Any, ...]
    named: Mapping[str, Any] = field(default_factory=dict)
    axes: Sequence[Axis | str | None] = ()

    def without(self, dropped: Tensor) -> Given:
        """The same without the dropped units."""
        leaves, structure = pytree.tree_flatten((self.arguments, dict(self.named)))
        axes = iter(self.axes)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                axis = next(axes, None)
                leaves[number] = _without(leaf, axis, dropped) if isinstance(axis, Axis) else leaf
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return Given(*pytree.tree_unflatten(leaves, structure))

    @property
    def units(self) -> Tensor:
        """Of all axes."""
        known = [axis.units for axis in self.axes if isinstance(axis, Axis)]
        return torch.cat(known) if known else torch.empty(0, dtype=torch.int64)


def _without(tensor: Tensor, axis: Axis, dropped: Tensor) -> Tensor:
    stays = (~located(axis.units, dropped)[1]).nonzero().flatten()
    return tensor.index_select(axis.dim, stays.to(tensor.device))


def is_written(module: nn.Module) -> bool:
    """Whether a forward is somebody's own and may hold sizes; torch's layers are edited."""
    return not type(module).__module__.startswith("torch.nn.modules") or isinstance(
        module, nn.MultiheadAttention
    )


def written_sizes(
    model: nn.Module, given: Mapping[str, Given], coupling: CouplingMap
) -> dict[int, str]:
    """Unit → why it cannot be dropped: without some of its kind the network does not run.

    Args:
        model: the traced network, in eval mode; it is the same afterwards.
        given: module path → what it was called with, for all that :func:`is_written`; of the
            network itself at least.
        coupling: its map so far.
    """
    trial = _Trial(model, given, coupling)
    trial.settle("")
    return {
        unit: WRITTEN + (where or type(model).__name__)
        for group, where in trial.refused.items()
        for unit in group.units.tolist()
    }


class _Trial:
    """Runs modules without some units; ``refused`` are the groups that stay, and where."""

    def __init__(self, model: nn.Module, given: Mapping[str, Given], coupling: CouplingMap) -> None:
        self._model, self._given, self._coupling = model, given, coupling
        self._groups = [
            part
            for space in coupling.spaces
            for part in coupling.parts[space.name]
            if len(part) > 1 and coupling.fixed.keys().isdisjoint(part.units.tolist())
        ]
        self.refused: dict[Space, str] = {}

    def settle(self, path: str) -> None:
        """Refuse groups until the module at ``path`` runs without a part of any other."""
        there = _Section(self._model, path, self._given[path], self._coupling)
        groups = self._left(there)
        if there.runs_without(groups) or not there.runs_without([]):
            return
        for inner in self._written_below(path):
            self.settle(inner)
        for group in _culprits(there, self._left(there)):
            self.refused[group] = path

    def _left(self, there: _Section) -> list[Space]:
        return [group for group in self._groups if group not in self.refused and there.sees(group)]

    def _written_below(self, path: str) -> list[str]:
        """The next modules inwards whose forward is somebody's own."""
        below = [name for name in self._given if _encloses(path, name)]
        return [name for name in below if not any(_encloses(other, name) for other in below)]


def _encloses(path: str, name: str) -> bool:
    return name != path and is_under(name, [path])


def _culprits(there: _Section, groups: Sequence[Space]) -> Iterator[Space]:
    """Groups that must stay whole for all others to be cut."""
    cut: list[Space] = []
    waiting = [list(groups)]
    while waiting:
        some = waiting.pop()
        if not some or there.runs_without([*cut, *some]):
            cut += some
        elif len(some) == 1:
            yield some[0]
        else:
            half = len(some) // 2
            waiting += [some[half:], some[:half]]


class _Section:
    """One module of the network, by itself."""

    def __init__(self, model: nn.Module, path: str, given: Given, coupling: CouplingMap) -> None:
        self._model, self._path, self._given = model, path, given
        self._module = model.get_submodule(path)
        self._coupling = replace(
            coupling,
            axes={name: axes for name, axes in coupling.axes.items() if is_under(name, [path])},
            counts={key: ids for key, ids in coupling.counts.items() if is_under(key[0], [path])},
        )
        units = [ids for axes in self._coupling.axes.values() for ids in axes.values()]
        self._units = torch.cat([given.units, *units]).unique()

    def sees(self, group: Space) -> bool:
        """Whether the group's units are in the module's weights or in what it is given."""
        return bool(located(group.units, self._units)[1].any())

    def runs_without(self, groups: Sequence[Space]) -> bool:
        """Whether the forward runs without one unit of each group, and without half of them."""
        return all(
            self._runs({group: group.units[-left(len(group)) :] for group in groups})
            for left in (_all_but_one, _half)
        )

    def _runs(self, keep: Mapping[Space | str, Tensor]) -> bool:
        plan = plan_slices(self._model, self._coupling, keep).restrict([self._path])
        given = self._given.without(dropped_units(self._coupling, keep))
        with _cut(self._model, plan):
            try:
                with unheard():
                    self._module(*given.arguments, **given.named)
            except Exception:  # the forward is foreign code and may fail in any way
                return False
        return True


def _all_but_one(units: int) -> int:
    return units - 1


def _half(units: int) -> int:
    return units // 2


@contextmanager
def unheard() -> Iterator[None]:
    """Keep to ourselves what fx tells on stderr of a forward that fails."""
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _cut(model: nn.Module, plan: SlicePlan) -> Iterator[None]:
    """Cut a network in place, and give it its own tensors and attributes back afterwards."""
    names = [name.rpartition(".")[::2] for name in plan.keep]
    names += [(path, attribute) for path, edit in plan.edits.items() for attribute in edit]
    own = [
        (module := model.get_submodule(path), name, getattr(module, name)) for path, name in names
    ]
    try:
        plan.reshape(model)
        yield
    finally:
        for module, name, value in own:
            setattr(module, name, value)
