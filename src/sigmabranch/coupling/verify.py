"""Prove a cut: the sliced section computes what the dense one computes with channels masked.

A dropped channel can be masked in two places. At its source: everything that makes it is zero, rows
of convolutions and linear layers, biases, norm affines. Or at its readers: the columns that read it
are zero. Either way the other side keeps its values, so a wrong index on any side shows. Both agree
where operations in between map zero to zero; a sigmoid does not, so there only the readers can be
masked; and a product of two activations reads without columns, so there only the source can.

Everything runs in fp64 on the CPU: rounding and reduced-precision kernels cannot hide an error or
feign one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sigmabranch.coupling.cut import Keep, dropped_units
from sigmabranch.coupling.map import Axis, CouplingMap, Role
from sigmabranch.coupling.trace import evaluating
from sigmabranch.errors import ConversionError

#: Largest accepted error relative to the largest output of the masked dense section.
TOLERANCE = 1e-5


#: Roles of the tensors that are zeroed to mask a unit where it is made, and where it is read.
SOURCE: tuple[Role, ...] = ("makes", "scales")
READERS: tuple[Role, ...] = ("reads",)


def masked_state(
    state: Mapping[str, Tensor], coupling: CouplingMap, keep: Keep, roles: Sequence[Role] = SOURCE
) -> dict[str, Tensor]:
    """The dense state in which the units that ``keep`` leaves out are silent.

    Tensors that change are copies, the others are those of ``state``.

    Args:
        state: tensors of the traced network, all or some.
        coupling: its map.
        keep: what is kept, as given to :func:`~sigmabranch.coupling.plan_slices`.
        roles: which tensors are zeroed at the positions of the dropped units.
    """
    dropped = dropped_units(coupling, keep)
    masked = dict(state)
    for name in coupling.axes.keys() & state.keys():
        for axis, units in coupling.axes[name].items():
            silent = torch.isin(units, dropped)
            if coupling.roles[name, axis] in roles and bool(silent.any()):
                where = silent.nonzero().flatten().to(masked[name].device)
                masked[name] = masked[name].detach().index_fill(axis, where, 0)
    return masked


def verify_slice(
    dense: nn.Module,
    paths: Sequence[str],
    sliced: nn.Module,
    feature: Any,
    *,
    coupling: CouplingMap,
    keep: Keep,
    entry: str | None = None,
) -> float:
    """Compare a sliced section with the same section of the masked dense network.

    Args:
        dense: the traced network, unchanged.
        paths: its modules that make up the section, in the order they are applied; the last one
            must have been watched by the trace.
        sliced: the section after slicing: one module, from feature to feature.
        feature: what enters the section in the dense network (tensor or pytree, dense width).
        coupling: the map of ``dense``.
        keep: what was kept, as given to :func:`~sigmabranch.coupling.plan_slices`; it includes the
            channels that enter the section if those were cut.
        entry: watched module that returns ``feature``; None if nothing of it was cut.

    Returns:
        The largest error, relative to the largest magnitude of the dense output.

    Raises:
        ConversionError: the sliced section does not run, gives other shapes, or is off by more than
            :data:`TOLERANCE` although no dropped unit is marked inexact.
    """
    dropped = dropped_units(coupling, keep)
    entry_axes = [] if entry is None else coupling.output_axes(entry)
    exit_axes = coupling.output_axes(paths[-1])
    where = ", ".join(path or type(dense).__name__ for path in paths)
    feature = pytree.tree_map_only(Tensor, _precise_tensor, feature)
    muted, gathered = (_on_channels(act, feature, entry_axes, dropped) for act in (_mute, _gather))
    with torch.no_grad(), evaluating(dense, sliced):
        found = _run_sliced(sliced, gathered, where)
        for roles in (SOURCE, READERS):
            given = pytree.tree_map_only(Tensor, Tensor.clone, muted)  # it may work in place
            expected = _run_masked(dense, paths, given, coupling, keep, roles)
            expected = _on_channels(_gather, expected, exit_axes, dropped)
            error = _relative_error(found, expected, where)
            if error <= TOLERANCE:
                return error
    if coupling.inexact.keys().isdisjoint(dropped.tolist()):
        raise ConversionError(
            f"sliced {where} differs from the masked dense network by {error:.1e} relative "
            f"(at most {TOLERANCE:.0e}): these channels cannot be cut exactly"
        )
    return error


def _run_masked(
    dense: nn.Module,
    paths: Sequence[str],
    feature: Any,
    coupling: CouplingMap,
    keep: Keep,
    roles: Sequence[Role],
) -> Any:
    for path in paths:
        module = _precise(dense.get_submodule(path))
        prefix = f"{path}." if path else ""
        state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
        masked = masked_state(state, coupling, keep, roles)
        module.load_state_dict({name.removeprefix(prefix): t for name, t in masked.items()})
        feature = module(feature)
    return feature


def _run_sliced(sliced: nn.Module, feature: Any, where: str) -> Any:
    try:
        return _precise(sliced)(feature)
    except ConversionError:
        raise
    except Exception as error:  # the forward is foreign code and may fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"sliced {where} does not run ({reason}): a size is written into its forward"
        ) from error


def _precise(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu().double()


def _precise_tensor(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def _on_channels(
    act: Callable[[Tensor, int, Tensor], Tensor],
    feature: Any,
    axes: Sequence[Axis | None],
    dropped: Tensor,
) -> Any:
    """Apply ``act(tensor, channel dimension, dropped mask)`` to every tensor that has channels."""
    leaves, structure = pytree.tree_flatten(feature)
    remaining = iter(axes)
    for number, leaf in enumerate(leaves):
        axis = next(remaining, None) if isinstance(leaf, Tensor) else None
        if axis is not None:
            leaves[number] = act(leaf, axis.dim, torch.isin(axis.units, dropped))
    return pytree.tree_unflatten(leaves, structure)


def _mute(tensor: Tensor, dim: int, gone: Tensor) -> Tensor:
    return tensor.index_fill(dim, gone.nonzero().flatten(), 0)


def _gather(tensor: Tensor, dim: int, gone: Tensor) -> Tensor:
    return tensor.index_select(dim, (~gone).nonzero().flatten())


def _relative_error(found: Any, expected: Any, where: str) -> float:
    errors: list[Tensor] = []
    if pytree.tree_structure(found) != pytree.tree_structure(expected):
        raise ConversionError(f"sliced {where} returns another structure than the dense section")
    for ours, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if not isinstance(theirs, Tensor):
            continue
        if ours.shape != theirs.shape:
            raise ConversionError(
                f"sliced {where} returns shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
            )
        difference, scale = (ours - theirs).double().abs().max(), theirs.double().abs().max()
        errors.append(difference / scale if scale else difference)
    # Tensor maximum, because Python's would drop a NaN.
    return float(torch.stack(errors).max()) if errors else 0.0
