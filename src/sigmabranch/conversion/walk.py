"""Which calibration samples reach which node of a tree that is still being built.

Shapes: B batch, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.errors import DataError
from sigmabranch.net import split_trunk
from sigmabranch.routing import Router
from sigmabranch.rows import take
from sigmabranch.tree import NodeId, TreeSpec


class Walk:
    """The nodes built so far, and the ways between them.

    Attributes:
        until: the trunk up to where the root's router reads.
        rest: what follows of the trunk.
        specializers: node → module, feature → feature.
        routers: inner node → router.
        class_branch_V: inner node → each class's branch, (V,) int64, where classes were clustered.
    """

    def __init__(self, tree: TreeSpec, trunk: nn.Module) -> None:
        self.tree = tree
        self.until, self.rest = split_trunk(trunk, tree.decide_after)
        self.specializers: dict[NodeId, nn.Module] = {}
        self.routers: dict[NodeId, Router] = {}
        self.class_branch_V: dict[NodeId, Tensor] = {}

    def entries(self, x: Tensor, y: Tensor, depth: int) -> Iterator[tuple[NodeId, Any, Tensor]]:
        """Which samples reach which node at ``depth``: (node, its input, rows of the batch).

        The root's input is what the first part of the trunk makes of the batch.
        """
        yield from self._entries(self.until(x), y, depth)

    def arrivals(self, x: Tensor, y: Tensor, depth: int) -> Iterator[tuple[NodeId, Any, Tensor]]:
        """Which samples reach which inner node at ``depth``: (node, what it decides by, rows)."""
        early = self.until(x)
        for node, feature, rows in self._entries(early, y, depth):
            if node in self.tree.inner:
                yield node, self._read(self._run(node, feature), early, rows), rows

    def branch(self, node: NodeId, seen: Any, label_B: Tensor) -> Tensor:
        """The branch each sample belongs to, (B,): by its class where classes were clustered.

        Raises:
            DataError: a label that was not among the clustered classes.
        """
        table_V = self.class_branch_V.get(node)
        if table_V is None:
            return self.routers[node](seen).argmax(-1)
        if int(label_B.max()) >= len(table_V):
            raise DataError(f"label {int(label_B.max())} was not among the calibration classes")
        return table_V[label_B]

    def _entries(self, early: Any, y: Tensor, depth: int) -> list[tuple[NodeId, Any, Tensor]]:
        root: NodeId = ()
        rows_B = torch.arange(len(y), device=y.device)
        reached = [(root, take(early, rows_B), rows_B)]  # a copy: the trunk may work in place
        for _ in range(depth):
            reached = [
                entry
                for node, feature, rows in reached
                if node in self.tree.inner
                for entry in self._sent_on(node, feature, early, y, rows)
            ]
        return reached

    def _sent_on(
        self, node: NodeId, feature: Any, early: Any, y: Tensor, rows: Tensor
    ) -> Iterator[tuple[NodeId, Any, Tensor]]:
        feature = self._run(node, feature)
        branch_B = self.branch(node, self._read(feature, early, rows), y[rows])
        for child in self.tree.children(node):
            chosen = (branch_B == child[-1]).nonzero().flatten()
            if len(chosen):
                yield child, take(feature, chosen), rows[chosen]

    def _run(self, node: NodeId, feature: Any) -> Any:
        return (self.specializers[node] if node else self.rest)(feature)

    def _read(self, output: Any, early: Any, rows: Tensor) -> Any:
        """What a node's router reads: the node's output, or the early feature of its samples."""
        return output if self.tree.decide_after is None else take(early, rows)
