"""A feature of two tensors, as point sets have one, and modules that pass it on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Pair(NamedTuple):
    place: Tensor
    value: Tensor


class Paired(nn.Module):
    """(1, C) → a place that every node hands on as it is, and a value that it changes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)

    def forward(self, x: Tensor | Pair) -> Pair:
        place, value = x if isinstance(x, Pair) else (x[:, :2], x)
        return Pair(place, self.linear(value).relu() + place.sum(1, keepdim=True))


class Value(nn.Module):
    def forward(self, feature: Pair) -> Tensor:
        return feature.value
