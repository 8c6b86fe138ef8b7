"""Numbers per channel turned into numbers per unit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sigmabranch.coupling.map import CouplingMap, Space


def unit_scores_l1(coupling: CouplingMap, state: Mapping[str, Tensor], space: Space) -> Tensor:
    """Sum of absolute weights in the rows that make each unit (paper: L1 norm of the planes).

    Args:
        coupling: the map of the traced network.
        state: its tensors.
        space: the units to score.

    Returns:
        fp64, one score per unit in the order of ``space.units``.
    """
    scores = torch.zeros(len(space), dtype=torch.float64)
    for name, axis in space.tensors:
        if coupling.roles[name, axis] == "makes":
            rows = state[name].detach().double().abs().cpu().movedim(axis, 0).flatten(1).sum(1)
            _add(scores, space, coupling.axes[name][axis], rows)
    return scores


def channel_mean_to_unit(coupling: CouplingMap, module: str, mean_KC: Tensor) -> Tensor:
    """Average a statistic of a watched module's output channels over the channels of each unit.

    Args:
        coupling: the map of the traced network.
        module: path of the watched module.
        mean_KC: (..., C), one value per output channel.

    Returns:
        (..., U) in the order of ``coupling.space_of_output(module).units``; zero for units of that
        space which the output lacks.
    """
    units = coupling.output_axis(module).units.to(mean_KC.device)
    space = coupling.space_of_output(module)
    member = (units[:, None] == space.units.to(units.device)).to(mean_KC.dtype)
    return mean_KC @ (member / member.sum(0).clamp(min=1))


def _add(scores: Tensor, space: Space, units: Tensor, values: Tensor) -> None:
    """Add the value at each position to the score of its unit; others count nowhere."""
    real = torch.isin(units, space.units)
    scores.index_add_(0, torch.searchsorted(space.units, units[real]), values[real])
