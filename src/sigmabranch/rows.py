"""Rows of a feature: picked out, or dealt out among branches.

A feature is a tensor (B, ...) or a tree of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree


class Hand(NamedTuple):
    """What one branch gets of a batch.

    Attributes:
        rows: int64 row numbers.
        own: how many of them, the first ones, are the branch's own. The others are borrowed: they
            take part in its batch norms, and nothing is learned from them.
    """

    rows: Tensor
    own: int


def take(feature: Any, rows: Tensor) -> Any:
    """The given rows of every tensor of a feature, as a copy."""
    return _pytree.tree_map(lambda tensor: tensor[rows], feature)


def hands(branch_B: Tensor, branches: int, fewest: int = 0) -> list[Hand]:
    """Who gets which rows of a batch.

    Args:
        branch_B: (B,) int64, the branch of each row.
        branches: K.
        fewest: rows that each branch gets, borrowed from the others if need be and if there are.
    """
    dealt = []
    for branch in range(branches):
        mine_B = branch_B == branch
        rows = mine_B.nonzero().flatten()
        own = len(rows)
        if own < fewest:
            rows = torch.cat([rows, (~mine_B).nonzero().flatten()[: fewest - own]])
        dealt.append(Hand(rows, own))
    return dealt


def deal(feature: Any, dealt: Sequence[Hand]) -> list[Any]:
    """The branches' parts of a feature: copies, but for a branch that gets all of it.

    As :func:`take` for each of them, but the gradient is gathered in one tensor of the feature's
    memory layout, where indexing would add up one zero-filled tensor a branch.

    Args:
        feature: what the branches share.
        dealt: the branches' rows; every row is at most one branch's own.
    """
    tensors, form = _pytree.tree_flatten(feature)
    parts = [_deal(tensor, dealt) for tensor in tensors]
    return [_pytree.tree_unflatten(list(part), form) for part in zip(*parts, strict=True)]


def _deal(tensor: Tensor, dealt: Sequence[Hand]) -> Sequence[Tensor]:
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _Deal.apply(tensor, [own for _, own in dealt], *[rows for rows, _ in dealt])
    return [tensor if own == len(tensor) else tensor[rows] for rows, own in dealt]


class _Deal(torch.autograd.Function):
    """A tensor's rows by hands; backward puts the gradients of own rows back into their places."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, own: list[int], *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*rows)
        ctx.own, ctx.device = own, tensor.device
        ctx.like = torch.empty_like(tensor, device="meta")
        return tuple(tensor[index] for index in rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = torch.zeros_like(ctx.like, device=ctx.device)
        for rows, own, grad in zip(ctx.saved_tensors, ctx.own, grads, strict=True):
            total[rows[:own]] = grad[:own]
        return total, None, *[None] * len(grads)
