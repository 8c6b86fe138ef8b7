"""Routers: which branch an input takes.

Shapes: B batch, C channels, D latent length, K branches, I inner nodes, L leaves.
All routing arithmetic is float32 in log space, whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.tree import NodeId, TreeSpec


class Router(nn.Module):
    """p = softmax(W_r z + b_r) for the latent z = Dropout(LN(W_g · pool(h) + b_g)) (paper, eq. 1).

    Args:
        channels: C, length of the pooled feature.
        pool: parameter-free module, feature → (B, C).
        tree: gives D and the dropout on the latent.
        branches: K, one per child.
    """

    def __init__(self, channels: int, pool: nn.Module, tree: TreeSpec, branches: int = 2) -> None:
        super().__init__()
        self.channels = channels
        latent = tree.projection_dim
        self.projection = nn.Sequential(
            pool,
            nn.Linear(channels, latent),
            nn.LayerNorm(latent),
            nn.Dropout(tree.projection_dropout),
        )
        self.gate = nn.Linear(latent, branches)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the network, but keep every bit of float32 when it is halved or doubled."""

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if not changed.is_floating_point() or changed.dtype == torch.float32:
                return changed
            return tensor.to(changed.device, torch.float32)

        return super()._apply(moved, recurse)

    @property
    def linear(self) -> nn.Linear:
        """W_g and b_g: pooled feature → latent, before its norm."""
        return self.projection[1]  # type: ignore[return-value]

    def latent(self, feature: Any) -> Tensor:
        """z: (B, D) float32."""
        with torch.autocast(_device_type(feature), enabled=False):
            return self.projection(_float(feature))

    def forward(self, feature: Any) -> Tensor:
        """log p: (B, K) float32."""
        latent_BD = self.latent(feature)
        with torch.autocast(latent_BD.device.type, enabled=False):
            return self.gate(latent_BD).log_softmax(dim=-1)


class Routes(nn.Module):
    """The tree's shape as index tables, so that walking it takes one operation per level.

    Inner nodes are numbered in the order of ``tree.inner``, leaves in that of ``tree.leaves``. K is
    the largest number of branches; a node with fewer repeats its first child, which is never
    reached that way, because :func:`stacked` makes those branches impossible.
    """

    children_IK: Tensor

    def __init__(self, tree: TreeSpec) -> None:
        super().__init__()
        self.depth = tree.depth
        self.leaf_number = {leaf: number for number, leaf in enumerate(tree.leaves)}
        self.inner_number = {node: number for number, node in enumerate(tree.inner)}
        table = [self._row(tree.children(node), tree.most_branches) for node in tree.inner]
        table_IK = torch.tensor(table, dtype=torch.int64)
        self.register_buffer("children_IK", table_IK, persistent=False)
        self.start = self._entry(())

    def _row(self, children: Sequence[NodeId], branches: int) -> list[int]:
        row = [self._entry(child) for child in children]
        return row + row[:1] * (branches - len(row))

    def _entry(self, node: NodeId) -> int:
        # A leaf j is stored as -1 - j, so that one table tells leaves from inner nodes.
        if node in self.leaf_number:
            return -1 - self.leaf_number[node]
        return self.inner_number[node]

    def hard(self, branch_log_prob_BIK: Tensor) -> Tensor:
        """The leaf that sequential top-1 decisions reach (paper, eq. 9): (B,) int64."""
        rows_B = torch.arange(len(branch_log_prob_BIK), device=branch_log_prob_BIK.device)
        node_B = torch.full_like(rows_B, self.start)
        for _ in range(self.depth):
            branch_B = branch_log_prob_BIK[rows_B, node_B.clamp(min=0)].argmax(dim=-1)
            node_B = torch.where(
                node_B >= 0, self.children_IK[node_B.clamp(min=0), branch_B], node_B
            )
        return -1 - node_B


def stacked(branch_log_prob: Sequence[Tensor]) -> Tensor:
    """Each inner node's log p as one tensor, (B, I, K); missing branches have log p = −∞.

    Args:
        branch_log_prob: (B, K_i) of each node, K_i ≤ K.
    """
    branches = max(log_prob_BK.shape[-1] for log_prob_BK in branch_log_prob)
    return torch.stack([_padded(log_prob_BK, branches) for log_prob_BK in branch_log_prob], dim=1)


def _padded(log_prob_BK: Tensor, branches: int) -> Tensor:
    missing = branches - log_prob_BK.shape[-1]
    return F.pad(log_prob_BK, (0, missing), value=-torch.inf) if missing else log_prob_BK


def _device_type(feature: Any) -> str:
    return torch.utils._pytree.tree_leaves(feature)[0].device.type


def _float(feature: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda tensor: tensor.float(), feature)
