"""A residual block whose inner channels are experts: those with an open gate are read and computed.

Shapes: B batch, C channels of one gated convolution, L gated convolutions; a last 2 is
(parameters, MACs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.backbones.resnet import Bottleneck
from sigmabranch.peers.skipping import Block


class Unit(nn.Module):
    """A convolution and its norm, of which some channels can be left out."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, gated: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.gated = conv, norm, gated

    def forward(self, x: Tensor) -> Tensor:
        """All output channels of all input channels."""
        return self.norm(self.conv(x))

    def part(self, x: Tensor, read: Tensor | None, write: Tensor | None) -> Tensor:
        """Output channels ``write`` of an ``x`` that holds input channels ``read``; None is all."""
        weight = _picked(_picked(self.conv.weight, 0, write), 1, read)
        norm = self.norm
        rows = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        mean, variance, scale, shift = (_picked(cast(Tensor, row), 0, write) for row in rows)
        x = _convolved(x, weight, self.conv)
        if not len(mean):
            return x
        return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, norm.eps)


class ExpertBlock(nn.Module):
    """A residual block whose inner channels are multiplied by gates.

    Attributes:
        widths: channels of each gated convolution.
    """

    def __init__(self, block: Block, variant: str) -> None:
        super().__init__()
        self.shortcut = block.downsample or nn.Identity()
        units = [
            Unit(block.conv1, block.bn1, variant == "A" or not isinstance(block, Bottleneck)),
            Unit(block.conv2, block.bn2, isinstance(block, Bottleneck)),
        ]
        if isinstance(block, Bottleneck):
            units.append(Unit(block.conv3, block.bn3, False))
        self.units = nn.ModuleList(units)
        self.widths = [unit.conv.out_channels for unit in units if unit.gated]

    def forward(self, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Every channel, times its gate; ``gates`` are (B, C) for each gated convolution."""
        shortcut, left = self.shortcut(x), iter(gates)
        *inner, last = self._units()
        for unit in inner:
            x = unit(x).relu()
            if unit.gated:
                x = x * next(left).to(x.dtype)[:, :, None, None]
        return (last(x) + shortcut).relu()

    def sliced(self, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """The same for one input, from the weights of its open channels alone."""
        shortcut, left = self.shortcut(x), iter(gates)
        *inner, last = self._units()
        read = None
        for unit in inner:
            gate_C = next(left)[0] if unit.gated else None
            write = None if gate_C is None else gate_C.nonzero().flatten()
            x = unit.part(x, read, write).relu()
            if gate_C is not None and write is not None:
                x = x * gate_C[write].to(x.dtype)[:, None, None]
            read = write
        return (last.part(x, read, None) + shortcut).relu()

    def add_prices(self, prices: Sequence[Tensor], linear_L2: Tensor, pair_L2: Tensor) -> None:
        """Add what depends on the gates, in place, from this block's first gated convolution on.

        Args:
            prices: of each unit: (convolution, norm) by (parameters, MACs).
            linear_L2: for each open channel.
            pair_L2: for each open channel together with one of the next gated convolution.
        """
        own, read = -1, False
        for unit, (conv_2, norm_2) in zip(self._units(), prices, strict=True):
            inputs, outputs = unit.conv.in_channels, unit.conv.out_channels
            if unit.gated:
                linear_L2[own + 1] += norm_2 // outputs
            if unit.gated and read:
                pair_L2[own] += conv_2 // (inputs * outputs)
            elif unit.gated:
                linear_L2[own + 1] += conv_2 // outputs
            elif read:
                linear_L2[own] += conv_2 // inputs
            own, read = own + unit.gated, unit.gated

    def _units(self) -> list[Unit]:
        return [cast(Unit, unit) for unit in self.units]


def _picked(tensor: Tensor, axis: int, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(axis, index)


def _convolved(x: Tensor, weight: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution with another weight, which may have no channels at all."""
    stride, padding = conv.stride, cast(tuple[int, int], conv.padding)
    if weight.numel():
        return F.conv2d(x, weight, None, stride, padding)
    sides = [
        (side + 2 * pad - size) // step + 1
        for side, pad, size, step in zip(
            x.shape[2:], padding, conv.kernel_size, stride, strict=True
        )
    ]
    return x.new_zeros(1, len(weight), *sides)
