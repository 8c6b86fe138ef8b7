"""DecisioNet's network: a tree whose nodes are single linear units that gate two children.

In training both children run and a gate mixes them, by one coin per batch soft or hard; in
evaluation one path runs.

Shapes: B batch, V classes, I inner nodes, L leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sigmabranch.errors import DataError
from sigmabranch.measure import Load, module_costs
from sigmabranch.net import below, by_node
from sigmabranch.rows import take
from sigmabranch.tree import NodeId, TreeSpec, node_key

# The authors' constants: the stretch of the sigmoid, so that soft gates reach 0 and 1, and how
# often a batch is gated hard.
_STRETCH, _MARGIN = 1.2, 0.1
_HARD_SHARE = 0.5


class DecisionNode(nn.Module):
    """Which way? One linear unit on the pooled feature.

    Args:
        channels: of the feature.
        pool: parameter-free module, feature → (B, channels).
    """

    def __init__(self, channels: int, pool: nn.Module) -> None:
        super().__init__()
        self.pool = copy.deepcopy(pool)
        self.unit = nn.Linear(channels, 1)

    def forward(self, feature: Any) -> Tensor:
        """Feature → (B,) float32 score; above zero means right."""
        with torch.autocast(self.unit.weight.device.type, enabled=False):
            feature = pytree.tree_map(lambda tensor: tensor.float(), feature)
            return self.unit(self.pool(feature)).squeeze(1)


def gate(score: Tensor, hard: Tensor) -> Tensor:
    """The share that goes right: [score > 0] where ``hard``, which has the gradient of the other.

    Args:
        score: any shape.
        hard: bool, broadcast against ``score``.
    """
    soft = (_STRETCH * score.sigmoid() - _MARGIN).clamp(0, 1)
    value = torch.where(hard, (score > 0).to(soft), soft).detach()
    return value + (soft - soft.detach())


class Gated(NamedTuple):
    """What training looks at.

    Attributes:
        logits: (B, V) float32, mixed over the leaves.
        gates: (B, I) float32, the share that each inner node sends right.
        arrived: (B, L) float32, the share that each leaf is mixed with.
        codes: (V, I), see :func:`~sigmabranch.peers.label_tree.class_codes`.
    """

    logits: Tensor
    gates: Tensor
    arrived: Tensor
    codes: Tensor


class Parts(NamedTuple):
    """What a :class:`DecisionNet` is made of.

    Attributes:
        trunk: input → feature.
        specializers: node → module, feature → feature, for every node but the root.
        nodes: inner node → its decision.
        heads: leaf → module, feature → (B, V) logits.
    """

    trunk: nn.Module
    specializers: Mapping[NodeId, nn.Module]
    nodes: Mapping[NodeId, DecisionNode]
    heads: Mapping[NodeId, nn.Module]


class DecisionNet(nn.Module):
    """A trunk, decision nodes, specializers and leaf heads; a dynamic network.

    Args:
        tree: the tree's shape.
        parts: its modules, which become the network's own.
        codes: (V, I), the classes' sides, kept with the weights.
        example: one input, (1, ...), at which the paths are priced.
    """

    codes: Tensor
    params_L: Tensor
    macs_L: Tensor

    def __init__(self, tree: TreeSpec, parts: Parts, *, codes: Tensor, example: Tensor) -> None:
        super().__init__()
        self.tree, self.trunk = tree, parts.trunk
        self.specializers = by_node(parts.specializers)
        self.nodes = by_node(parts.nodes)
        self.heads = by_node(parts.heads)
        self.register_buffer("codes", codes)
        costs = module_costs(self, example)
        prices = [[costs[path] for path in self._line(leaf)] for leaf in tree.leaves]
        for position, name in enumerate(("params_L", "macs_L")):
            price_L = torch.tensor([sum(part[position] for part in line) for line in prices])
            self.register_buffer(name, price_L, persistent=False)

    def _line(self, leaf: NodeId) -> list[str]:
        """Paths of the modules that an input on its way to ``leaf`` runs."""
        line = ["trunk"]
        for level in range(len(leaf)):
            line += [
                f"nodes.{node_key(leaf[:level])}",
                f"specializers.{node_key(leaf[: level + 1])}",
            ]
        return [*line, f"heads.{node_key(leaf)}"]

    def forward(self, x: Tensor) -> Tensor:
        """(B, V) logits: mixed in training, of one path per input in evaluation.

        A tracer, which cannot follow decisions, sees every node once, mixed by hard gates.
        """
        if self.training or torch.jit.is_tracing():
            return self.gated(x).logits
        return self.hard(x)[0]

    def gated(self, x: Tensor) -> Gated:
        """Run every node once and mix the leaves by the gates on the way to each.

        In training scores are noisy, and one coin for all samples and nodes says whether gates are
        hard; in evaluation they are.
        """
        gates: list[Tensor] = []
        features: dict[NodeId, Any] = {(): self.trunk(x)}
        arrived: dict[NodeId, Any] = {(): 1.0}
        hard = torch.ones((), dtype=torch.bool, device=x.device)
        if self.training:
            hard = torch.rand((), device=x.device) < _HARD_SHARE
        for node in self.tree.inner:
            score_B = self.nodes[node_key(node)](features[node])
            if self.training:
                score_B = score_B + torch.randn_like(score_B)
            right_B = gate(score_B, hard)
            gates.append(right_B)
            for branch, share_B in enumerate((1 - right_B, right_B)):
                child = (*node, branch)
                arrived[child] = arrived[node] * share_B
                features[child] = self.specializers[node_key(child)](features[node])
        mixed = [
            arrived[leaf][:, None] * self.heads[node_key(leaf)](features[leaf]).float()
            for leaf in self.tree.leaves
        ]
        arrived_BL = torch.stack([arrived[leaf] for leaf in self.tree.leaves], dim=1)
        return Gated(torch.stack(mixed).sum(0), torch.stack(gates, dim=1), arrived_BL, self.codes)

    def hard(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V) logits and (B,) int64 leaf of the one path that each input takes.

        A batch is split among the branches by index; a batch of one touches one path. Raises
        :class:`DataError` at an empty batch.
        """
        if not len(x):
            raise DataError("the batch is empty: give at least one input")
        rows_B = torch.arange(len(x), device=x.device)
        parts = list(self._descend((), self.trunk(x), rows_B))
        order_B = torch.cat([rows for rows, _, _ in parts]).argsort()
        logits_BV = torch.cat([logits for _, logits, _ in parts])[order_B]
        return logits_BV, torch.cat([leaf for _, _, leaf in parts])[order_B]

    def _descend(
        self, node: NodeId, feature: Any, rows: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (rows, logits, leaf) of each leaf below ``node`` that rows reach."""
        if node in self.tree.leaves:
            leaf = torch.full_like(rows, self.tree.leaves.index(node))
            yield rows, self.heads[node_key(node)](feature), leaf
            return
        right_B = self.nodes[node_key(node)](feature) > 0
        for branch, side_B in enumerate((~right_B, right_B)):
            chosen = side_B.nonzero().flatten()
            if not len(chosen):
                continue
            child = (*node, branch)
            part = feature if len(chosen) == len(rows) else take(feature, chosen)
            yield from self._descend(child, self.specializers[node_key(child)](part), rows[chosen])

    def with_load(self, x: Tensor) -> tuple[Tensor, Load]:
        """Logits (B, V) of the hard paths, and what each reads; the choices are the leaves."""
        logits_BV, leaf_B = self.hard(x)
        choice_BL = F.one_hot(leaf_B, len(self.tree.leaves)).bool()
        return logits_BV, Load(self.params_L[leaf_B], self.macs_L[leaf_B], choice_BL)

    def node_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters per node key, all but the trunk's and the root's decision."""
        parts = (self.specializers, self.nodes, self.heads)
        keys = [node_key(node) for node in self.tree.specializers]
        return {
            key: [p for part in parts if key in part for p in part[key].parameters()]
            for key in keys
        }

    def node_log_prob(self, log_prob_BL: Tensor) -> dict[str, Tensor]:
        """log probability that a sample passes each node but the root: (B,) per node key."""
        return below(self.tree, self.tree.specializers, log_prob_BL)

    def bounds(self) -> dict[str, dict[str, int]]:
        """Parameters and MACs of the cheapest and of the dearest path, each by itself."""
        return {
            name: {
                "active_params": int(pick(self.params_L)),
                "macs": int(pick(self.macs_L)),
            }
            for name, pick in (("least", torch.min), ("most", torch.max))
        }
