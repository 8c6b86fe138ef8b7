"""Streaming passes over the calibration data; no feature map outlives its batch.

A pass keeps the latents (N × D float32: 26 MB for 50,000 samples of 128) or the channel sums
(K × C float64 per node), nothing else. Every pass routes its samples anew, so a loader may shuffle.
Several processes are given the same loader and divide its batches (see :mod:`.shards`).

Shapes: B batch, C channels, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sigmabranch.conversion.shards import Loader, Shards
from sigmabranch.errors import ConfigError, ConversionError, DataError, NumericError

# Samples of a batch, from which on it is not joined with the next.
_ENOUGH = 32


def as_pair(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch as (inputs, labels); of inputs alone, the labels are int64 of shape (B, 0).

    Raises:
        DataError: the batch is neither inputs nor a pair.
    """
    parts = [batch] if isinstance(batch, Tensor) else batch
    fits = isinstance(parts, tuple | list) and len(parts) in (1, 2)
    if not fits or not all(isinstance(part, Tensor) for part in parts):
        raise DataError(
            "each batch of the loader must be a tensor of inputs, or a pair (inputs, labels) of "
            f"tensors: this one is a {type(batch).__name__}"
        )
    x, *labels = parts
    return x, labels[0] if labels else without_labels(x)


def without_labels(rows: Tensor) -> Tensor:
    """The labels of so many samples that have none: int64 of shape (B, 0)."""
    return rows.new_empty(len(rows), 0, dtype=torch.int64)


def has_labels(y: Tensor) -> bool:
    """Whether :func:`as_pair` found labels; a matter of shape, for which no device is asked."""
    return y.shape[1:] != (0,)


def stream(
    loader: Loader,
    samples: int,
    device: torch.device,
    shards: Shards = Shards(),
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches among the first ``samples`` inputs and labels, on ``device``.

    Where the loader gives no labels, these are as :func:`as_pair` says. Small batches are joined,
    because a batch norm learns nothing from a sample alone.

    Raises:
        ConfigError: the loader can be read only once.
        DataError: a batch is neither inputs nor a pair, or the loader is empty.
    """
    if iter(loader) is loader:
        raise ConfigError("the loader is used up after one pass: give a list or a DataLoader")
    empty = True
    pairs = loader if hasattr(loader, "part") else _joined(map(as_pair, loader))
    for x, y in shards.own(pairs, samples):
        empty = False
        yield x.to(device), y.to(device)
    if empty and shards.world == 1:  # several notice when they meet
        raise DataError("the loader is empty: give at least one batch")


def _joined(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of :data:`_ENOUGH` samples or more, as far as samples of one shape follow."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for x, y in pairs:
        if waiting and (x.shape[1:], y.shape[1:]) != tuple(part.shape[1:] for part in waiting[0]):
            yield _together(waiting)
            waiting = []
        waiting.append((x, y))
        if sum(len(x) for x, _ in waiting) >= _ENOUGH:
            yield _together(waiting)
            waiting = []
    if waiting:
        yield _together(waiting)


def _together(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


class Moments:
    """Mean and covariance of pooled features, summed batch by batch.

    Args:
        channels: C.
        device: of what will be added.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self._size = torch.zeros((), dtype=torch.float64, device=device)
        self._sum_C = torch.zeros(channels, dtype=torch.float64, device=device)
        self._product_CC = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, pooled_BC: Tensor) -> None:
        """Count every row of ``pooled_BC``."""
        rows_BC = pooled_BC.double()
        self._size += len(rows_BC)
        self._sum_C += rows_BC.sum(0)
        self._product_CC += rows_BC.T @ rows_BC

    def axes(self, shards: Shards, what: str) -> tuple[Tensor, Tensor]:
        """(mean (C,), principal axes (C, C) in rows by falling variance), both float64.

        The sign of an axis is such that its largest entry is positive.

        Raises:
            ConversionError: fewer than two samples.
            NumericError: NaN or infinity in a feature.
        """
        size, sum_C = shards.sum(self._size), shards.sum(self._sum_C)
        product_CC = shards.sum(self._product_CC)
        if size < 2:
            raise ConversionError(f"node {what} saw fewer than two samples: use more data")
        if not bool(product_CC.isfinite().all()):
            raise NumericError(f"the features at node {what} are not finite: check the network")
        mean_C = sum_C / size
        _, vector_CC = torch.linalg.eigh(product_CC / size - mean_C.outer(mean_C))
        axis_CC = vector_CC.T.flip(0)
        largest_C1 = axis_CC.gather(1, axis_CC.abs().argmax(1, keepdim=True))
        return mean_C, axis_CC * largest_C1.sign()


class ChannelSums:
    """Mean activation of every channel over every cluster, summed batch by batch.

    Args:
        channels: C.
        device: of what will be added.
        clusters: K.
    """

    def __init__(self, channels: int, device: torch.device, clusters: int) -> None:
        self.clusters = clusters
        self.sum_KC = torch.zeros(clusters, channels, dtype=torch.float64, device=device)
        self.size_K = torch.zeros(clusters, dtype=torch.float64, device=device)

    def add(self, pooled_BC: Tensor, cluster_B: Tensor) -> None:
        """Count each row of ``pooled_BC`` towards its cluster."""
        one_hot_BK = nn.functional.one_hot(cluster_B, self.clusters).double()
        self.sum_KC += one_hot_BK.T @ pooled_BC.double()
        self.size_K += one_hot_BK.sum(0)

    def mean(self, shards: Shards, where: str) -> Tensor:
        """(K, C) float64 means over all processes.

        Raises:
            NumericError: an activation was NaN or infinite.
        """
        mean_KC = shards.sum(self.sum_KC) / shards.sum(self.size_K).clamp(min=1)[:, None]
        if not bool(torch.isfinite(mean_KC).all()):
            raise NumericError(f"an activation of {where} is NaN or infinite in the dense network")
        return mean_KC


def batch_norms(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """The batch norms with running statistics in ``modules``."""
    return [
        norm
        for module in modules
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats
    ]


def saw_data(norm: _BatchNorm) -> bool:
    """Whether the latest re-estimation showed ``norm`` any batch."""
    return int(dict(norm.named_buffers())["num_batches_tracked"]) > 0


def reestimate_norms(modules: Iterable[nn.Module], run: Callable[[], None], shards: Shards) -> None:
    """Replace the running statistics of every batch norm by those of the data that ``run`` sends.

    Each statistic becomes the plain average over the batches seen; a norm that saw none keeps its
    old one.
    """
    norms = batch_norms(modules)
    kept = [(norm.momentum, {k: v.clone() for k, v in norm.named_buffers()}) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    run()
    for norm, (momentum, before) in zip(norms, kept, strict=True):
        _average(norm, before, shards)
        norm.momentum = momentum
        norm.eval()


def _average(norm: _BatchNorm, before: Mapping[str, Tensor], shards: Shards) -> None:
    """Average the statistics over processes; without any batch, restore those from before."""
    buffers = dict(norm.named_buffers())
    batches = buffers["num_batches_tracked"].double()
    total = shards.sum(batches.clone())
    for name in ("running_mean", "running_var"):
        seen = shards.sum(buffers[name] * batches)
        buffers[name].copy_(seen / total if total > 0 else before[name])
    buffers["num_batches_tracked"].copy_(total)
