"""Which ids name the same unit: a union-find over integer tensors.

A *unit* is the smallest thing that can be kept or dropped: usually one channel, sometimes several
that stand or fall together. Id 0 means "no unit": a position that always stays.

Labels are int64 tensors with as many dimensions as the activation they describe and with size 1
along every dimension in which they do not change, so a (1, C, H, W) feature map whose channels are
its units costs C integers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Units:
    """A growing set of unit ids that can be declared equal."""

    def __init__(self) -> None:
        # Invariant: _root[i] is the smallest id equal to i, so finding is a single lookup.
        self._root = torch.zeros(1, dtype=torch.int64)

    def fresh(self, count: int) -> Tensor:
        """Ids of ``count`` new units, ascending."""
        start = len(self._root)
        ids = torch.arange(start, start + count)
        self._root = torch.cat([self._root, ids])
        return ids

    def find(self, ids: Tensor) -> Tensor:
        """The smallest id equal to each of ``ids``, same shape."""
        return self._root[ids]

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Declare the ids at equal (broadcast) positions equal; id 0 is left alone."""
        a, b = torch.broadcast_tensors(self.find(a), self.find(b))
        differ = (a > 0) & (b > 0) & (a != b)
        # Each pair as one number, because unique columns are found very slowly.
        count = len(self._root)
        pairs = torch.unique(a[differ] * count + b[differ])
        pairs = torch.stack([pairs // count, pairs % count])
        while True:
            low, high = torch.aminmax(self.find(pairs), dim=0)
            if torch.equal(low, high):
                return
            # An id met twice in ``high`` keeps its smallest partner; the next round gets the rest.
            self._root.scatter_reduce_(0, high, low, "amin")
            self._flatten()

    def _flatten(self) -> None:
        while not torch.equal(nearer := self._root[self._root], self._root):
            self._root = nearer

    def compact(self, labels: Tensor) -> Tensor:
        """Canonical labels with size 1 along every dimension in which they do not change."""
        for dim, stride in enumerate(labels.stride()):
            if stride == 0 and labels.shape[dim] > 1:
                labels = labels.narrow(dim, 0, 1)
        labels = self.find(labels)
        for dim, size in enumerate(labels.shape):
            first = labels.narrow(dim, 0, min(size, 1))
            if size > 1 and torch.equal(labels, first.expand_as(labels)):
                labels = first
        return labels


def varying(labels: Tensor) -> list[int]:
    """The dimensions along which compact ``labels`` change."""
    return [dim for dim, size in enumerate(labels.shape) if size > 1]


def along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector of ids as labels of an ``ndim``-dimensional tensor, changing along ``dim``."""
    shape = [1] * ndim
    shape[dim] = -1
    return vector.reshape(shape)


def distinct(labels: Iterable[Tensor]) -> Tensor:
    """The units in several label tensors, ascending, each once, without id 0."""
    flat = [label.reshape(-1) for label in labels]
    ids = torch.unique(torch.cat(flat)) if flat else torch.empty(0, dtype=torch.int64)
    return ids[ids > 0]


def located(ids: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Where each id stands among ascending ``known`` ones, and whether it does.

    Many times faster than ``torch.isin``.
    """
    if not len(known):
        return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    position = torch.searchsorted(known, ids.contiguous()).clamp(max=len(known) - 1)
    return position, known[position] == ids
