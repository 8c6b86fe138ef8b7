"""Which channels each branch keeps (paper, section III-C, phase 2).

Shapes: K branches, C source channels (units, where channels are tied together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """One branch's channels, as ascending positions among the C source channels.

    Attributes:
        shared: strong in all clusters; the same for all branches.
        specific: strong in this branch's cluster relative to the others.
    """

    shared: tuple[int, ...]
    specific: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """Shared and specific together, in the dense network's order."""
        return tuple(sorted((*self.shared, *self.specific)))

    def among(self, candidates: Sequence[int]) -> Selection:
        """The same choice by the numbers that ``candidates`` have among all channels."""
        return Selection(
            shared=tuple(candidates[number] for number in self.shared),
            specific=tuple(candidates[number] for number in self.specific),
        )


def select_by_activation(mean_KC: Tensor, width: int, shared_fraction: float) -> list[Selection]:
    """Shared channels by the smallest of the means, the rest by their difference.

    With s = round(ρ·width), the shared set is the top s of min_k a_k; branch k adds, from the
    others, the top width − s of a_k − max_(i≠k) a_i. With two branches, the paper's case, that is
    the difference of the two means.

    Args:
        mean_KC: (K, C), mean pooled activation of each channel over each cluster.
        width: channels per branch, at most C.
        shared_fraction: ρ.
    """
    count = round(shared_fraction * width)
    shared = _top(mean_KC.amin(0), count)
    selections = []
    for branch, own_C in enumerate(mean_KC):
        contrast_C = own_C - torch.cat([mean_KC[:branch], mean_KC[branch + 1 :]]).amax(0)
        contrast_C[shared] = -torch.inf
        specific = _top(contrast_C, width - count)
        selections.append(Selection(shared=_ascending(shared), specific=_ascending(specific)))
    return selections


def select_at_random(
    channels: int, width: int, generator: torch.Generator, branches: int = 2
) -> list[Selection]:
    """A uniform draw of ``width`` channels each: the paper's ablation "random partition"."""
    draws = [
        set(torch.randperm(channels, generator=generator)[:width].tolist()) for _ in range(branches)
    ]
    shared = set.intersection(*draws)
    return [
        Selection(shared=tuple(sorted(shared)), specific=tuple(sorted(draw - shared)))
        for draw in draws
    ]


def select_evenly(channels: int, width: int, branches: int = 2) -> list[Selection]:
    """The same ``width`` evenly spaced channels for all branches, whatever they do."""
    chosen = tuple(number * channels // width for number in range(width))
    return [Selection(shared=chosen, specific=())] * branches


def top_units(score_C: Tensor, width: int) -> tuple[int, ...]:
    """Ascending positions of the ``width`` largest scores; ties go to the first."""
    return _ascending(_top(score_C, width))


def _top(score_C: Tensor, count: int) -> Tensor:
    return score_C.sort(descending=True, stable=True).indices[:count]


def _ascending(index: Tensor) -> tuple[int, ...]:
    return tuple(sorted(index.tolist()))
