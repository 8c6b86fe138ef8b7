"""Streaming passes over the calibration data; no feature map outlives its batch.

A pass keeps the latents (N × D float32: 26 MB for 50,000 samples of 128) or the channel sums
(K × C float64 per node), nothing else. Every pass routes its samples anew, so a loader may shuffle.

Shapes: B batch, C channels, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from sigmabranch.conversion.cluster import Shards
from sigmabranch.errors import ConfigError, DataError, NumericError


def stream(
    loader: Iterable[Sequence[Tensor]], samples: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first ``samples`` inputs and labels of a loader, batch by batch, on ``device``.

    Raises:
        ConfigError: the loader can be read only once.
        DataError: a batch is no pair, or the loader is empty.
    """
    if iter(loader) is loader:
        raise ConfigError("the loader is used up after one pass: give a list or a DataLoader")
    left = samples
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError("each batch of the loader must be a pair (inputs, labels)")
        x, y = (part[:left].to(device) for part in batch)
        left -= len(x)
        yield x, y
        if left == 0:
            return
    if left == samples:
        raise DataError("the loader is empty: give at least one batch")


class ChannelSums:
    """Mean activation of every channel over every cluster, summed batch by batch."""

    def __init__(self, clusters: int = 2) -> None:
        self.clusters = clusters
        self.sum_KC: Tensor | None = None
        self.size_K: Tensor | None = None

    def add(self, pooled_BC: Tensor, cluster_B: Tensor) -> None:
        """Count each row of ``pooled_BC`` towards its cluster."""
        one_hot_BK = nn.functional.one_hot(cluster_B, self.clusters).double()
        sum_KC = one_hot_BK.T @ pooled_BC.double()
        size_K = one_hot_BK.sum(0)
        first = self.sum_KC is None
        self.sum_KC = sum_KC if first else self.sum_KC + sum_KC
        self.size_K = size_K if first else self.size_K + size_K

    def mean(self, shards: Shards, where: str) -> Tensor:
        """(K, C) float64 means over all processes.

        Raises:
            NumericError: an activation was NaN or infinite.
        """
        mean_KC = shards.sum(self.sum_KC) / shards.sum(self.size_K).clamp(min=1)[:, None]
        if not bool(torch.isfinite(mean_KC).all()):
            raise NumericError(f"an activation of {where} is NaN or infinite in the dense network")
        return mean_KC


def reestimate_norms(
    modules: Sequence[nn.Module], run: Callable[[], None], shards: Shards
) -> bool:
    """Replace the running statistics of every batch norm by those of the data that ``run`` sends.

    Each statistic becomes the plain average over the batches seen; a norm that saw none keeps its
    old one. Returns whether there was any batch norm.
    """
    norms = [
        norm
        for module in modules
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
    ]
    kept = [(norm.momentum, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    run()
    for norm, (momentum, mean, variance) in zip(norms, kept, strict=True):
        _average(norm, mean, variance, shards)
        norm.momentum = momentum
        norm.eval()
    return bool(norms)


def _average(norm: nn.Module, mean: Tensor, variance: Tensor, shards: Shards) -> None:
    batches = norm.num_batches_tracked.to(mean.dtype)
    total = shards.sum(batches.clone())
    for buffer, old in ((norm.running_mean, mean), (norm.running_var, variance)):
        seen = shards.sum(buffer * batches)
        buffer.copy_(seen / total if total > 0 else old)
