"""Siblings read one feature, so no branch may write into it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sigmabranch as sb
from sigmabranch.errors import ConversionError


class Block(nn.Module):
    """An activation, then a convolution."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.conv = copy.deepcopy(first), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8, H, W) → the same shape."""
        return self.conv(self.first(x))


class ActivationFirst(nn.Module):
    """A network whose blocks begin with an activation."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(first) for _ in range(4)))
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) → (B, 5)."""
        return self.last(self.blocks(self.stem(x)).mean((2, 3)))


class InPlace(nn.Module):
    """An activation that is no module of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return nn.functional.silu(x, inplace=True)


@pytest.mark.parametrize("first", [nn.SiLU(inplace=True), nn.ReLU(inplace=True)], ids=type)
def test_a_branch_that_begins_in_place_leaves_its_siblings_what_they_read(batches, first):
    torch.manual_seed(0)
    net = sb.convert(ActivationFirst(first), batches, sb.TreeSpec(projection_dim=8))
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        soft, hard = net.soft(x), net.hard(x)
    assert torch.equal(net.leaf_of(soft), hard.leaf)
    chosen = soft.logits[torch.arange(96), hard.leaf]
    assert torch.allclose(chosen, hard.logits, atol=1e-5)
    net.train()
    net.soft(x).logits.sum().backward()


def test_a_branch_that_writes_into_its_input_by_itself_is_refused(batches):
    with pytest.raises(ConversionError, match="changes its input in place"):
        sb.convert(ActivationFirst(InPlace()), batches, sb.TreeSpec(projection_dim=8))
