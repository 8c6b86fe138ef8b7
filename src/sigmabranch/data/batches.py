"""The order in which training sees a split, as a function of seed, epoch and step.

What a step is made of (its samples, their augmentation) never depends on how many processes share
the work, so a run can go on with another number of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigmabranch.data.seeds import derive_seed
from sigmabranch.data.split import Split
from sigmabranch.errors import ConfigError

_ORDER, _AUGMENT = 0, 1


class Share(NamedTuple):
    """One process's samples of one optimizer step.

    A process for which the step has no sample holds the step's first one, which
    :func:`own_samples` does not count.

    Attributes:
        x: inputs.
        y: labels.
        total: samples of the step over all processes.
    """

    x: Tensor
    y: Tensor
    total: int


def own_samples(total: int, rank: int, world_size: int) -> int:
    """How many of ``total`` samples fall to ``rank``; the shares differ by at most one."""
    return len(range(rank, total, world_size))


def own_rows(rows: Tensor, rank: int, world_size: int) -> Tensor:
    """Every ``world_size``-th row from ``rank`` on, or the first where that is none."""
    return rows[rank::world_size] if rank < len(rows) else rows[:1]


@dataclass(frozen=True, slots=True)
class EpochBatches:
    """One process's part of shuffled, augmented batches; any epoch can be entered at any step.

    Attributes:
        split: the samples.
        batch_size: samples of an optimizer step, over all processes.
        seed: orders and augmentation follow from it and the epoch's number.
        rank: number of this process.
        world_size: number of processes.
        augment: augment, anew in each epoch.

    Raises:
        ConfigError: sizes out of range, fewer samples a step than processes, or no sample.
    """

    split: Split
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    augment: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; give 1 or more")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} is not one of {self.world_size} processes")
        if self.batch_size < self.world_size:
            raise ConfigError(
                f"a batch_size of {self.batch_size} leaves some of {self.world_size} processes "
                "without a sample; use fewer processes or a larger batch_size"
            )
        if len(self) == 0:
            raise ConfigError("there are no samples: check the data and their limit")

    def __len__(self) -> int:
        """Steps in an epoch."""
        return math.ceil(len(self.split) / self.batch_size)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these samples from others, JSON-able: their number and their labels."""
        labels_N = self.split.labels.cpu().long().contiguous()
        return {
            "samples": len(self.split),
            "classes": len(labels_N.unique()),
            "labels": hashlib.sha256(labels_N.numpy().tobytes()).hexdigest(),
        }

    def epoch(self, number: int, start: int = 0) -> Iterator[Share]:
        """Yield this process's shares of epoch ``number``, from step ``start`` on."""
        augment_seed = derive_seed(self.seed, number, _AUGMENT) if self.augment else None
        # Every step but the last has equally many samples for this process, so its shares are the
        # batches of one long order.
        size = own_samples(self.batch_size, self.rank, self.world_size)
        pairs = self.split.batches(self.order(number), size, augment_seed=augment_seed, start=start)
        for step, (x, y) in enumerate(pairs, start):
            total = min(self.batch_size, len(self.split) - step * self.batch_size)
            yield Share(x, y, total)

    def order(self, number: int) -> Tensor:
        """int64 sample numbers of this process in epoch ``number``."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number, _ORDER))
        order = torch.randperm(len(self.split), generator=generator)
        steps = order.split(self.batch_size)
        return torch.cat([own_rows(rows, self.rank, self.world_size) for rows in steps])
