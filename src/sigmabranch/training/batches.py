"""What the loop reads: batches by epoch, from any step on."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, Protocol

import torch
from torch import Tensor

from sigmabranch.data.seeds import derive_seed
from sigmabranch.errors import DataError


class Batches(Protocol):
    """Batches on the training device, reproducible by epoch."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, y) of epoch ``number``, beginning with batch ``start``."""


class LoaderBatches:
    """Batches from any sized iterable of (x, y) pairs, such as a ``DataLoader``.

    The loader's own generator, if it has one, is seeded at each epoch and the global one there
    and before each batch, so that shuffling and augmentation are the same after a resume. Skipped
    batches are loaded and dropped.

    Args:
        loader: yields (x, y); its length is the number of batches.
        device: where the batches go.
        seed: of the shuffling.
    """

    def __init__(self, loader: Any, device: torch.device | str = "cpu", *, seed: int = 0) -> None:
        if not isinstance(loader, Sized) or not len(loader):
            raise DataError("the training loader must have a length of at least one batch")
        self.loader: Any = loader
        self.device, self.seed = torch.device(device), seed

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, y) of epoch ``number``, beginning with batch ``start``."""
        generator = getattr(self.loader, "generator", None)
        if generator is not None:
            generator.manual_seed(derive_seed(self.seed, number))
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number)
        torch.manual_seed(derive_seed(self.seed, number))
        pairs = iter(self.loader)
        for index in range(len(self)):
            torch.manual_seed(derive_seed(self.seed, number, index))
            pair = next(pairs, None)
            if pair is None:
                raise DataError(f"the loader ended after {index} of {len(self)} batches")
            if index >= start:
                x, y = pair
                yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
