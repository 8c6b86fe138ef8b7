"""Work on the same data by several processes: who takes which batch, and how all learn the result.

Every process is given the same batches in the same order and takes every W-th of them. Batches stay
whole, so what is computed from one does not depend on the number of processes.

Shapes: W processes, K batches of one process, N rows over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sigmabranch.errors import DataError

# Batches are pairs (inputs, labels), or inputs alone where labels are not needed.
Loader: TypeAlias = Iterable[Tensor | Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Shards:
    """How the batches are spread over processes; the default is one process with all of them.

    Attributes:
        rank: this process.
        world: number of processes.
        sum: adds a tensor, on any device, over all processes.
    """

    rank: int = 0
    world: int = 1
    sum: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def own(self, loader: Loader, samples: int | None = None) -> Iterator[Sequence[Tensor]]:
        """This process's batches among the first ``samples`` samples; None takes all.

        A loader with a method ``part(rank, world, samples)`` is asked for them, which spares it
        the work of making the others.

        Raises:
            DataError: a batch is no pair.
        """
        part: Any = getattr(loader, "part", None)
        if part is not None:
            yield from part(self.rank, self.world, samples)
            return
        for number, batch in enumerate(_first(loader, samples)):
            if number % self.world == self.rank:
                yield batch

    def by_rank(self, value: Tensor) -> Tensor:
        """A tensor of each process, one below the other: (W, ...)."""
        slots = value.new_zeros((self.world, *value.shape))
        slots[self.rank] = value
        return self.sum(slots)

    def first(self, value: Tensor) -> Tensor:
        """The tensor of process 0, in all of them."""
        return self.sum(value if self.rank == 0 else torch.zeros_like(value))

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of all processes' batches in the batches' order, (N, ...), in every process.

        Args:
            parts: one tensor for each of this process's batches, in order; rows may be missing,
                but not a batch.

        Raises:
            DataError: in all processes, if one of them has no batch.
        """
        if self.world == 1:
            if not parts:
                raise DataError("the data gave no batch")
            return torch.cat(list(parts))
        start_KW, total = self._starts(parts)
        first = parts[0]
        kind = torch.uint8 if first.dtype == torch.bool else first.dtype
        rows = torch.zeros((total, *first.shape[1:]), dtype=kind, device=first.device)
        for part, start in zip(parts, start_KW[:, self.rank].tolist(), strict=False):
            rows[start : start + len(part)] = part.to(kind)
        return self.sum(rows).to(first.dtype)

    def _starts(self, parts: Sequence[Tensor]) -> tuple[Tensor, int]:
        """The first row of batch k of process w among all rows, (K, W), and their number."""
        counts_W = self.by_rank(torch.tensor(len(parts)))
        if not int(counts_W.min()):
            raise DataError(
                f"{int(counts_W.sum())} batches leave some of {self.world} processes without one: "
                "use fewer processes or smaller batches"
            )
        own_K = torch.zeros(int(counts_W.max()), dtype=torch.int64)
        own_K[: len(parts)] = torch.tensor([len(part) for part in parts])
        size_KW = self.by_rank(own_K).T
        end_X = size_KW.flatten().cumsum(0)
        return (end_X - size_KW.flatten()).view_as(size_KW), int(end_X[-1])


def _first(loader: Loader, samples: int | None) -> Iterator[Sequence[Tensor]]:
    """The first so many samples of a loader, its last batch cut."""
    left = samples
    for batch in loader:
        if (
            not isinstance(batch, tuple | list)
            or len(batch) != 2
            or not all(isinstance(part, Tensor) for part in batch)
        ):
            raise DataError("each batch of the loader must be a pair (inputs, labels) of tensors")
        if left is None:
            yield batch
            continue
        yield [rows[:left] for rows in batch]
        left -= len(batch[1][:left])
        if left == 0:
            return
