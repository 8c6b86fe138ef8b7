"""Which channels each branch keeps (paper, section III-C, phase 2).

Shapes: K = 2 branches, C source channels (units, where channels are tied together).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """One branch's channels, as ascending positions among the C source channels.

    Attributes:
        shared: strong in both clusters; the same for both branches.
        specific: strong in this branch's cluster relative to the other's.
    """

    shared: tuple[int, ...]
    specific: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """Shared and specific together, in the dense network's order."""
        return tuple(sorted((*self.shared, *self.specific)))


def select_by_activation(mean_KC: Tensor, width: int, shared_fraction: float) -> list[Selection]:
    """Shared channels by the smaller of the two means, the rest by their difference.

    With k = round(ρ·width), the shared set is the top k of min(a_0, a_1); branch k adds, from the
    others, the top width − k of a_k − a_(other).

    Args:
        mean_KC: (2, C), mean pooled activation of each channel over each cluster.
        width: channels per branch, at most C.
        shared_fraction: ρ.
    """
    count = round(shared_fraction * width)
    shared = _top(mean_KC.amin(0), count)
    contrast_C = mean_KC[0] - mean_KC[1]
    contrast_C[shared] = -torch.inf
    other_C = mean_KC[1] - mean_KC[0]
    other_C[shared] = -torch.inf
    return [
        Selection(shared=_ascending(shared), specific=_ascending(_top(score_C, width - count)))
        for score_C in (contrast_C, other_C)
    ]


def select_at_random(channels: int, width: int, generator: torch.Generator) -> list[Selection]:
    """Two uniform draws of ``width`` channels: the paper's ablation "random partition"."""
    draws = [set(torch.randperm(channels, generator=generator)[:width].tolist()) for _ in range(2)]
    shared = draws[0] & draws[1]
    return [
        Selection(shared=tuple(sorted(shared)), specific=tuple(sorted(draw - shared)))
        for draw in draws
    ]


def select_evenly(channels: int, width: int) -> list[Selection]:
    """The same ``width`` evenly spaced channels for both branches, whatever they do."""
    chosen = tuple(number * channels // width for number in range(width))
    return [Selection(shared=chosen, specific=())] * 2


def top_units(score_C: Tensor, width: int) -> tuple[int, ...]:
    """Ascending positions of the ``width`` largest scores; ties go to the first."""
    return _ascending(_top(score_C, width))


def _top(score_C: Tensor, count: int) -> Tensor:
    return score_C.sort(descending=True, stable=True).indices[:count]


def _ascending(index: Tensor) -> tuple[int, ...]:
    return tuple(sorted(index.tolist()))
