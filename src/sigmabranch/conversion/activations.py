"""What the channels of the dense network do: the measurements by which branches choose theirs.

Shapes: B batch, C channels, U units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.backbones import Backbone, Levels
from sigmabranch.coupling import CouplingMap, Space, last_reader


class DenseActivations:
    """Runs the dense network and reports one number per input and channel.

    Args:
        backbone: the dense network, in eval mode.
        levels: its trunk and levels.
        coupling: its channel couplings.
        inner: channel groups inside the levels that are reported, too.
    """

    def __init__(
        self, backbone: Backbone, levels: Levels, coupling: CouplingMap, inner: Sequence[Space] = ()
    ) -> None:
        self.backbone = backbone
        self.outputs = levels.outputs()
        readers = {space.name: last_reader(backbone.model, coupling, space) for space in inner}
        self._readers = {name: reader for name, reader in readers.items() if reader is not None}

    @property
    def inner(self) -> frozenset[str]:
        """The inner groups that can be measured: those that a convolution or linear layer reads."""
        return frozenset(self._readers)

    @torch.no_grad()
    def __call__(self, x: Tensor, first: int, last: int) -> dict[str, Tensor]:
        """The pooled outputs of levels ``first`` to ``last`` and the inner groups on the way.

        Returns:
            Output module → (B, C) pooled output (level 0 is the trunk's); inner group → (B, U) mean
            magnitude of what its reader is given.
        """
        found: dict[str, Tensor] = {}
        ends = {self.outputs[level]: level for level in range(last + 1)}
        feature: Any = x
        with self._listening(found):
            for path in self.backbone.chain[: self.backbone.chain.index(self.outputs[last]) + 1]:
                feature = self.backbone.model.get_submodule(path)(feature)
                if ends.get(path, -1) >= first:
                    found[path] = self.backbone.pool(feature)
            if last == len(self.outputs) - 1 and self._readers:
                self._run_head(feature)
        return found

    def _run_head(self, feature: Any) -> None:
        feature = self.backbone.head_pool(feature)
        for module in self.backbone.modules(self.backbone.head):
            feature = module(feature)

    @contextmanager
    def _listening(self, found: dict[str, Tensor]) -> Iterator[None]:
        handles = [
            self.backbone.model.get_submodule(reader.path).register_forward_pre_hook(
                partial(_listen, found, name, reader.dim, reader.unit_C)
            )
            for name, reader in self._readers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _listen(
    found: dict[str, Tensor],
    name: str,
    dim: int,
    unit_C: Tensor,
    module: nn.Module,
    arguments: tuple[Any, ...],
) -> None:
    """Note the mean magnitude of every unit of a layer's input."""
    value_BNC = arguments[0].detach().abs().movedim(dim, -1)
    mean_BC = value_BNC.reshape(len(value_BNC), -1, value_BNC.shape[-1]).mean(1)
    found[name] = unit_means(mean_BC, unit_C)


def unit_means(value_BC: Tensor, unit_C: Tensor) -> Tensor:
    """Means per unit (..., U) from values per channel (..., C)."""
    unit_C = unit_C.to(value_BC.device)
    units = int(unit_C.max()) + 1
    sum_BU = value_BC.new_zeros(len(value_BC), units).index_add_(1, unit_C, value_BC)
    return sum_BU / torch.bincount(unit_C, minlength=units)
