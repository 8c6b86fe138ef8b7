"""Layer norms that lost channels, fitted to give what the dense ones gave.

Without some of its channels a layer norm sees another mean and another variance, so no choice of
channels keeps what it computes. What is left to choose are its scales and shifts: per channel, the
least-squares fit of the dense norm's output on the branch's own samples.

Shapes: N positions of all samples, C channels that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sigmabranch.backbones import Backbone
from sigmabranch.conversion.shards import Shards
from sigmabranch.coupling import SlicePlan

# Relative variance below which a channel is constant, and its scale cannot be told.
_CONSTANT = 1e-6


class NormFit:
    """One layer norm of a branch and the running sums of its fit.

    Args:
        path: of the same norm in the dense network.
        norm: the branch's norm; its scale and shift change when the fit is :meth:`finished`.
        kept: positions of its channels in the dense network, (C,) int64.
        width: channels of the dense norm.
    """

    def __init__(self, path: str, norm: nn.LayerNorm, kept: Tensor, width: int) -> None:
        self.path, self.norm, self.width = path, norm, width
        self.kept = kept.to(norm.weight.device)
        self.sum_4C = torch.zeros(4, len(kept), dtype=torch.float64, device=norm.weight.device)
        self.count = torch.zeros((), dtype=torch.float64, device=norm.weight.device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count what the dense norm was given and what it returned for the branch's samples."""
        dim = x.ndim - 1 if x.shape[-1] == self.width else 1
        x_NC = x.index_select(dim, self.kept).movedim(dim, -1).flatten(0, -2)
        y_NC = y.index_select(dim, self.kept).movedim(dim, -1).flatten(0, -2).double()
        unit_NC = nn.functional.layer_norm(x_NC, x_NC.shape[-1:], eps=self.norm.eps).double()
        self.sum_4C += torch.stack(
            [unit_NC.sum(0), y_NC.sum(0), (unit_NC * unit_NC).sum(0), (unit_NC * y_NC).sum(0)]
        )
        self.count += len(x_NC)

    def finished(self, shards: Shards) -> None:
        """Give the norm the fitted scales and shifts; without samples it keeps its own."""
        count = shards.sum(self.count)
        if not count:
            return
        x_C, y_C, xx_C, xy_C = shards.sum(self.sum_4C) / count
        variance_C = xx_C - x_C * x_C
        scale_C = (xy_C - x_C * y_C) / variance_C
        scale_C = torch.where(variance_C > _CONSTANT, scale_C, self.norm.weight.double())
        self.norm.weight.copy_(scale_C)
        self.norm.bias.copy_(y_C - scale_C * x_C)


def cut_norms(
    backbone: Backbone, paths: Iterable[str], section: nn.Module, plan: SlicePlan
) -> list[NormFit]:
    """The layer norms of a cut ``section`` of the modules at ``paths`` that lost channels."""
    fits = []
    for path in paths:
        for name, dense in backbone.model.get_submodule(path).named_modules():
            where = f"{path}.{name}" if name else path
            norm = section.get_submodule(f"{path.replace('.', '_')}.{name}".rstrip("."))
            kept = plan.keep.get(f"{where}.weight", {}).get(0)
            if isinstance(norm, nn.LayerNorm) and norm.bias is not None and kept is not None:
                fits.append(NormFit(where, norm, kept, len(dense.weight)))
    return fits


@contextmanager
def listening(
    backbone: Backbone, paths: Iterable[str], note: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """While the dense network runs, tell what its norms at ``paths`` are given and return."""

    def hook(path: str) -> Callable[..., None]:
        return lambda module, arguments, output: note(path, arguments[0], output)

    handles = [
        backbone.model.get_submodule(path).register_forward_hook(hook(path)) for path in set(paths)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
