"""What the loop reads: optimizer steps by epoch, from any step on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sized
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from sigmabranch.conversion import Shards
from sigmabranch.conversion.calibrate import as_pair, has_labels
from sigmabranch.data import Share, derive_seed, own_rows
from sigmabranch.errors import DataError

_ONE_LOADER = "give every process the same loader, which this library shares out by itself"


class Batches(Protocol):
    """This process's samples on its device, reproducible by epoch."""

    @property
    def batch_size(self) -> int:
        """Samples of a full step over all processes."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells these data from others, JSON-able; a resume needs the same."""

    def __len__(self) -> int:
        """Optimizer steps per epoch."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Share]:
        """Yield the shares of epoch ``number``, beginning with step ``start``."""


class LoaderBatches:
    """Steps from any sized iterable of batches, such as a ``DataLoader``: one for each.

    A batch is a pair (x, y), or x alone; :func:`~sigmabranch.conversion.calibrate.has_labels` then
    says no to the labels of its share.

    The generators of the loader and of its samplers, where they have one, are seeded at each epoch
    and the global one there and before each batch, so that shuffling and augmentation are the same
    after a resume and in every process. Not so where augmentation draws from Python's or numpy's
    generators in this process, or in workers that persist from epoch to epoch. Skipped batches
    are loaded and dropped. With several processes each takes its rows of every batch.

    Args:
        loader: yields batches; its length is their number.
        device: where the batches go.
        seed: of the shuffling.
        shards: the processes that share the work.
        labels: False drops those that the loader gives.

    Raises:
        DataError: a loader without length or batches, or one that shares out its data itself.
    """

    def __init__(
        self,
        loader: Any,
        device: torch.device | str = "cpu",
        *,
        seed: int = 0,
        shards: Shards = Shards(),
        labels: bool = True,
    ) -> None:
        if not isinstance(loader, Sized) or not len(loader):
            raise DataError("the training loader must have a length of at least one batch")
        sampler = getattr(loader, "sampler", None)
        if shards.world > 1 and isinstance(sampler, DistributedSampler):
            raise DataError(f"the training loader has a DistributedSampler: {_ONE_LOADER}")
        self.loader: Any = loader
        self.device, self.seed, self.shards = torch.device(device), seed, shards
        self.labels = labels

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def batch_size(self) -> int:
        """Samples of a batch, as the loader says or its first batch shows."""
        size = getattr(self.loader, "batch_size", None)
        return size if isinstance(size, int) else len(as_pair(next(iter(self.loader)))[0])

    @property
    def identity(self) -> dict[str, Any]:
        """The number of samples, where the loader knows it; its labels are not looked at."""
        dataset = getattr(self.loader, "dataset", None)
        return {"samples": len(dataset) if isinstance(dataset, Sized) else None}

    def epoch(self, number: int, start: int = 0) -> Iterator[Share]:
        """Yield the shares of epoch ``number``, beginning with step ``start``."""
        for generator in self._generators():
            generator.manual_seed(derive_seed(self.seed, number))
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(number)
        torch.manual_seed(derive_seed(self.seed, number))
        batches = iter(self.loader)
        for index in range(len(self)):
            torch.manual_seed(derive_seed(self.seed, number, index))
            batch = next(batches, None)
            if batch is None:
                raise DataError(f"the loader ended after {index} of {len(self)} batches")
            if index >= start:
                x, y = as_pair(batch if self.labels else _inputs(batch))
                if index == start:
                    self._check_same(y if has_labels(y) else x)
                yield Share(self._own(x), self._own(y), len(y))

    def _generators(self) -> list[torch.Generator]:
        """Those from which the loader and its samplers draw."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        samplers = [getattr(part, "sampler", None) for part in (self.loader, batch_sampler)]
        drawing = [self.loader, batch_sampler, *samplers]
        found = [getattr(part, "generator", None) for part in drawing]
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    def _own(self, rows: Tensor) -> Tensor:
        mine = own_rows(rows, self.shards.rank, self.shards.world)
        return mine.to(self.device, non_blocking=True)

    def _check_same(self, rows: Tensor) -> None:
        """Raise :class:`DataError` in every process if their loaders differ in this batch."""
        content = rows.cpu().contiguous().flatten().view(torch.uint8)
        digest = hashlib.sha256(content.numpy().tobytes()).digest()
        mine = torch.tensor(int.from_bytes(digest[:4], "little"), device=self.device)
        if len(self.shards.by_rank(mine).unique()) > 1:
            raise DataError(f"the processes' loaders yield different batches: {_ONE_LOADER}")


def _inputs(batch: Any) -> Any:
    """A pair without its labels."""
    return batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
