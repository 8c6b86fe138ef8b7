"""Uniform structured pruning by Torch-Pruning (Fang et al., CVPR 2023, 2301.12900).

The only file that imports torch_pruning.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from sigmabranch.errors import MissingDependency
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.filters import FilterGroup
from sigmabranch.peers.pruning import FilterPruning
from sigmabranch.peers.system import Trained, share
from sigmabranch.tasks import Task

# Batches whose gradients the Taylor score adds up.
_TAYLOR_BATCHES = 10


@dataclass(frozen=True, kw_only=True)
class _Uniform(FilterPruning):
    """One rate for every group of coupled channels, the classifier's outputs kept."""

    rate: float = 0.3

    def __post_init__(self) -> None:
        share(f"{self.name} rate", self.rate)

    def remaining(self, group: FilterGroup, size: int) -> int:
        """How many of ``size`` filters stay, rounded as the package does."""
        return int(size * (1 - self.rate))

    def check(self, task: Task) -> None:
        """What every pruning refuses, and Torch-Pruning must be installed."""
        super().check(task)
        _torch_pruning()

    def run(self, bench: Bench) -> Trained:
        """Prune the source network at once, then fine-tune with the bench's recipe."""
        self.check(bench.task)
        network = self.pruned(bench)
        bench.train(network)
        return Trained(network=network.eval(), recipe=bench.recipe, epochs=bench.epochs)

    def pruned(self, bench: Bench) -> nn.Module:
        """The source network without the channels that matter least, not yet fine-tuned."""
        package = _torch_pruning()
        network = bench.dense().requires_grad_(True)
        pruner = package.pruner.BasePruner(
            network,
            bench.example().to(bench.device),
            importance=self.importance(package),
            pruning_ratio=self.rate,
            ignored_layers=[network.get_submodule("fc")],
        )
        self.prepare(network, bench)
        pruner.step()
        network.zero_grad(set_to_none=True)
        # It names the shape of the network before the cut.
        network.__dict__.pop("skeleton_source", None)
        return network.eval()

    @abstractmethod
    def importance(self, package: Any) -> Any:
        """How the package is to score a group of channels."""

    def prepare(self, network: nn.Module, bench: Bench) -> None:
        """Whatever the score needs of the network."""


@dataclass(frozen=True, kw_only=True)
class Magnitude(_Uniform):
    """Channels of smallest L1 norm go.

    Attributes:
        rate: share of every layer's channels that is removed.
    """

    name: ClassVar[str] = "l1"
    summary: ClassVar[str] = "static: channels of smallest L1 norm removed, by Torch-Pruning"

    def importance(self, package: Any) -> Any:
        """Mean over a group's layers of the L1 norms, relative to their mean."""
        return package.importance.GroupMagnitudeImportance(p=1)


@dataclass(frozen=True, kw_only=True)
class Taylor(_Uniform):
    """Channels go whose removal would change the loss least to first order (1906.10771).

    Attributes:
        rate: share of every layer's channels that is removed.
    """

    name: ClassVar[str] = "taylor"
    summary: ClassVar[str] = "static: channels of smallest first-order effect removed, likewise"

    def importance(self, package: Any) -> Any:
        """Products of weights and gradients."""
        return package.importance.GroupTaylorImportance()

    def prepare(self, network: nn.Module, bench: Bench) -> None:
        """Add up the gradients of some calibration batches."""
        network.eval()
        for x, y in islice(bench.calibration(), _TAYLOR_BATCHES):
            F.cross_entropy(network(x), y).backward()


def _torch_pruning() -> Any:
    try:
        import torch_pruning  # noqa: PLC0415 (an optional package)
    except ImportError as error:
        raise MissingDependency("torch-pruning", "peers", "Pruning by norm or gradient") from error
    return torch_pruning
