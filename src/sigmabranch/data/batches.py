"""The order in which training sees a split, as a function of seed, epoch and step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sigmabranch.data.seeds import derive_seed
from sigmabranch.data.split import Split
from sigmabranch.errors import ConfigError

_ORDER, _AUGMENT = 0, 1


@dataclass(frozen=True, slots=True)
class EpochBatches:
    """Shuffled, augmented batches of one process; any epoch can be entered at any step.

    Every process takes equally many steps: the order is filled up from its beginning (or, with
    ``drop_last``, cut) to a multiple of ``world_size``, and each rank takes every
    ``world_size``-th sample of it.

    Attributes:
        split: the samples.
        batch_size: samples a batch on this process.
        seed: orders and augmentation follow from it and the epoch's number.
        rank: number of this process.
        world_size: number of processes.
        augment: augment, anew in each epoch.
        drop_last: leave out a last batch smaller than ``batch_size``.

    Raises:
        ConfigError: sizes out of range, or not one full batch with ``drop_last``.
    """

    split: Split
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    augment: bool = True
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; give 1 or more")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} is not one of {self.world_size} processes")
        if len(self) == 0:
            raise ConfigError(
                f"{len(self.split)} samples on {self.world_size} processes do not fill one batch "
                f"of {self.batch_size}; use a smaller batch_size or more samples"
            )

    def __len__(self) -> int:
        """Steps in an epoch."""
        if self.drop_last:
            return len(self.split) // self.world_size // self.batch_size
        return math.ceil(self._share() / self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of epoch ``number``, from step ``start`` on."""
        augment_seed = derive_seed(self.seed, number, _AUGMENT) if self.augment else None
        return self.split.batches(
            self.order(number), self.batch_size, augment_seed=augment_seed, start=start
        )

    def order(self, number: int) -> Tensor:
        """int64 sample numbers of this rank in epoch ``number``."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number, _ORDER))
        order = torch.randperm(len(self.split), generator=generator)
        if self.drop_last:
            return order[self.rank :: self.world_size][: len(self) * self.batch_size]
        filled = torch.arange(self._share() * self.world_size) % len(order)
        return order[filled[self.rank :: self.world_size]]

    def _share(self) -> int:
        return math.ceil(len(self.split) / self.world_size)
