"""A step in passes that fit into memory, weighted so that their sum is the step's mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sigmabranch.data import Share, own_samples


class Pass(NamedTuple):
    """What one forward and backward pass sees.

    Attributes:
        x: inputs.
        y: labels.
        weight: what to multiply the mean over the pass by. Summed over the passes of a step and
            averaged over the processes, the products are the mean over the step's samples.
    """

    x: Tensor
    y: Tensor
    weight: float


def pass_size(batch_size: int, world_size: int, accumulate: int) -> int:
    """The most samples that one of ``accumulate`` passes of a process needs to hold."""
    return math.ceil(math.ceil(batch_size / world_size) / accumulate)


def split_share(share: Share, size: int, rank: int, world_size: int) -> list[Pass]:
    """Passes of at most ``size`` samples, equally many in every process.

    A process short of a sample for a pass repeats its first one with weight 0, because gradients
    are exchanged by all processes or by none.
    """
    count = math.ceil(math.ceil(share.total / world_size) / size)
    own = own_samples(share.total, rank, world_size)
    parts = zip(share.x.tensor_split(count), share.y.tensor_split(count), strict=True)
    return [
        Pass(x, y, len(y) * world_size / share.total)
        if own and len(y)
        else Pass(share.x[:1], share.y[:1], 0.0)
        for x, y in parts
    ]


def weighted_sum(values: Sequence[Tensor], passes: Sequence[Pass]) -> Tensor:
    """Σ weight · value over the passes; the step's mean, once averaged over processes."""
    total = values[0] * passes[0].weight
    for value, part in zip(values[1:], passes[1:], strict=True):
        total = total + value * part.weight
    return total
