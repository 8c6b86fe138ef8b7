"""The branched network: soft (every node once) for training, hard (one path) for inference.

Shapes: B batch, L leaves, V classes, I inner nodes, K branches per inner node.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple, Self, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from sigmabranch.archive import write_archive
from sigmabranch.backbones import Backbone, as_backbone
from sigmabranch.coupling import SlicePlan, fingerprint
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.explain import Explanation, explain
from sigmabranch.routing import Router, Routes, stacked
from sigmabranch.rows import Hand, deal, hands, take
from sigmabranch.tree import NodeId, TreeSpec, node_key, shared_key

RECORD = "record.json"

# A router's decision on each sample of a batch: the larger log p, and its branch.
Choice: TypeAlias = tuple[Tensor, Tensor]

# Rows that each node gets while training: batch norms of pooled features cannot learn from one.
_FEWEST = 2


class SoftOutput(NamedTuple):
    """What every leaf says, and how likely each leaf is.

    Attributes:
        logits: (B, L, V), leaves in the order of ``tree.leaves`` (paper, eq. 3).
        log_prob: (B, L) float32, log P_j; each row sums to one after exp (paper, eq. 2).
        branch_log_prob: (B, I, K) float32, each router's log p in the order of ``tree.inner``; −∞
            where a node has fewer branches than another.
    """

    logits: Tensor
    log_prob: Tensor
    branch_log_prob: Tensor


class HardOutput(NamedTuple):
    """The prediction of one path per sample.

    Attributes:
        logits: (B, V).
        leaf: (B,) int64, position in ``tree.leaves``.
        log_prob: (B,) float32, sum of the chosen branches' log p.
    """

    logits: Tensor
    leaf: Tensor
    log_prob: Tensor


class _Arrived(NamedTuple):
    """The samples at a node: their row numbers, own ones first, how many these are, and log P."""

    rows: Tensor
    own: int
    log_prob: Tensor

    def part(self, hand: Hand) -> _Arrived:
        """Those that go on to one branch; a borrowed sample stays borrowed."""
        chosen, own = hand
        if self.own < len(self.rows):
            own = int((chosen[:own] < self.own).sum())
        return _Arrived(self.rows[chosen], own, self.log_prob[chosen])


class SigmaBranchNet(nn.Module):
    """A trunk, routers, specializers and leaf heads (paper, section III).

    Args:
        tree: the tree's shape.
        trunk: input → feature.
        specializers: node → module, feature → feature, for every node but the root.
        routers: inner node → router.
        heads: leaf → module, feature → (B, V) logits.
        plans: node → which channels of the dense network it holds.
        source: how to rebuild the dense network's skeleton, or None.
        record: what the conversion decided (:mod:`sigmabranch.conversion.record`).
        shared: inner node → what its children share (:func:`sigmabranch.shared.tie`).

    Attributes:
        united: whether all leaves are one path for now
            (:mod:`sigmabranch.training.upcycling`).

    Raises:
        ConfigError: the trunk has no module ``tree.decide_after``.
    """

    def __init__(
        self,
        *,
        tree: TreeSpec,
        trunk: nn.Module,
        specializers: Mapping[NodeId, nn.Module],
        routers: Mapping[NodeId, Router],
        heads: Mapping[NodeId, nn.Module],
        plans: Mapping[NodeId, SlicePlan],
        source: Mapping[str, Any] | None,
        record: dict[str, Any],
        shared: Mapping[NodeId, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.tree, self.source, self.record = tree, source, record
        self.plans: dict[NodeId, SlicePlan] = dict(plans)
        self.trunk = trunk
        self.specializers = by_node(specializers)
        self.routers = by_node(routers)
        self.heads = by_node(heads)
        self.shared = by_node(shared or {})
        self.routes = Routes(tree)
        self.united = False
        self.trunk_parts()  # refuses a tree that does not fit

    @classmethod
    def unbranched(cls, dense: nn.Module | Backbone, example: Tensor) -> Self:
        """A dense network as a tree of one leaf: a copy, in eval mode.

        Args:
            dense: (B, ...) → (B, V) logits.
            example: a legal input, (1, ...).

        Raises:
            ConversionError: it is not its parts in a row.
        """
        model = dense.model if isinstance(dense, Backbone) else dense
        example = example.to(next(model.parameters()).device)
        backbone = as_backbone(dense, example)
        backbone.check(example)
        whole = SlicePlan(keep={}, edits={}, source=fingerprint(backbone.model.state_dict()))
        return cls(
            tree=TreeSpec.unbranched(),
            trunk=backbone.section(backbone.chain),
            specializers={},
            routers={},
            heads={(): backbone.pooled_head()},
            plans={(): whole},
            source=backbone.source,
            record={},
        ).eval()

    @property
    def early(self) -> bool:
        """Whether all routers read one feature inside the trunk, or at its end."""
        return self.tree.decide_after is not None

    def trunk_parts(self) -> tuple[nn.Module, nn.Sequential]:
        """The trunk up to where the root's router reads, and what follows (shares all modules).

        With early decision a runtime can run the first part, then the routers on its output, from
        the root to a leaf; now it knows the path, and may fetch the rest of it in order.
        """
        return split_trunk(self.trunk, self.tree.decide_after)

    def forward(self, x: Tensor) -> Tensor:
        """(B, V) logits of the hard path: the drop-in replacement for the dense network."""
        return self.hard(x).logits

    def soft(self, x: Tensor) -> SoftOutput:
        """Run every node once: the trunk, then each specializer, never once per leaf."""
        until, rest = self.trunk_parts()
        seen = until(x)
        # Before the rest of the trunk, which may work in place.
        decided = {node: self.router(node)(seen) for node in self.tree.inner if self.early}
        features: dict[NodeId, Any] = {(): rest(seen)}
        log_prob: dict[NodeId, Tensor] = {(): torch.zeros(len(x), device=x.device)}
        branches: list[Tensor] = []
        for node in self.tree.inner:
            branch_log_prob_BK = decided[node] if self.early else self.router(node)(features[node])
            branches.append(branch_log_prob_BK)
            for child in self.tree.children(node):
                log_prob[child] = log_prob[node] + branch_log_prob_BK[:, child[-1]]
                features[child] = self.specializer(child)(features[node])
        none_B00 = torch.zeros(len(x), 0, 0, device=x.device)
        leaves = self.tree.leaves
        return SoftOutput(
            logits=torch.stack([self.head(leaf)(features[leaf]) for leaf in leaves], dim=1),
            log_prob=torch.stack([log_prob[leaf] for leaf in leaves], dim=1),
            branch_log_prob=stacked(branches) if branches else none_B00,
        )

    def hard(self, x: Tensor) -> HardOutput:
        """Top-1 decisions from the root to a leaf; only the chosen nodes run (paper, eq. 9).

        With early decision all are made before the trunk goes on, else one after each node. A batch
        is split among the branches by index; a batch of one touches one path.

        Where a gradient is wanted in training mode every node runs: one that few rows reach borrows
        some, whose outputs are dropped. Batch norms then have what they need, and processes that
        train together stay in step. While :attr:`united` nothing is decided: all samples take the
        one path there is.

        Raises:
            DataError: the batch is empty.
        """
        if not len(x):
            raise DataError("the batch is empty: give at least one input")
        rows_B = torch.arange(len(x), device=x.device)
        arrived = _Arrived(rows_B, len(x), torch.zeros(len(x), device=x.device))
        until, rest = self.trunk_parts()
        seen = until(x)
        decided = self._decided(seen, rows_B) if self.early and not self.united else {}
        parts = list(self._descend((), rest(seen), arrived, decided))
        order_B = torch.cat([rows for rows, *_ in parts]).argsort()
        return HardOutput(
            logits=torch.cat([logits for _, logits, _, _ in parts])[order_B],
            leaf=torch.cat([leaf for _, _, leaf, _ in parts])[order_B],
            log_prob=torch.cat([log_prob for *_, log_prob in parts])[order_B],
        )

    def explain(self, x: Tensor) -> list[Explanation]:
        """The hard path of each input of a batch: its leaf, every decision on it, top classes.

        Runs :meth:`hard` as it is, without gradients, so it says what that gives. Print one for a
        person; :meth:`Explanation.to_dict` is JSON-able. Raises as :meth:`hard` does.
        """
        return explain(self, x)

    def leaf_of(self, soft: SoftOutput) -> Tensor:
        """(B,) int64: the leaf that :meth:`hard` reaches, read off a soft pass."""
        return self.routes.hard(soft.branch_log_prob)

    def _decided(self, seen: Any, rows: Tensor) -> dict[NodeId, Choice]:
        """The early choices at every inner node, for all samples; unset for those not there."""
        arrived: dict[NodeId, Tensor] = {(): rows}
        decided: dict[NodeId, Choice] = {}
        for node in self.tree.inner:
            here = arrived.get(node, rows[:0])
            if not len(here):
                continue
            part = seen if len(here) == len(rows) else take(seen, here)
            best, branch = self.router(node)(part).max(dim=-1)
            decided[node] = (
                best.new_zeros(len(rows)).index_put((here,), best),
                branch.new_zeros(len(rows)).index_put((here,), branch),
            )
            arrived |= {child: here[branch == child[-1]] for child in self.tree.children(node)}
        return decided

    def _descend(
        self, node: NodeId, feature: Any, arrived: _Arrived, decided: Mapping[NodeId, Choice]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (rows, logits, leaf, log_prob) of each leaf below ``node`` that rows reach."""
        rows, own, log_prob = arrived
        children = self.tree.children(node)
        if not children:
            leaf = torch.full_like(rows, self.tree.leaves.index(node))
            yield rows[:own], self.head(node)(feature)[:own], leaf[:own], log_prob[:own]
            return
        if self.united:
            inside = self.specializer(children[0])(feature)
            yield from self._descend(children[0], inside, arrived, decided)
            return
        if self.early:
            best, branch = (choice_B[rows] for choice_B in decided[node])
        else:
            best, branch = self.router(node)(feature).max(dim=-1)
        learning = self.training and torch.is_grad_enabled()
        dealt = hands(branch, len(children), _FEWEST if learning else 0)
        arrived = _Arrived(rows, own, log_prob + best)
        for child, hand, part in zip(children, dealt, deal(feature, dealt), strict=True):
            if len(hand.rows):
                inside = self.specializer(child)(part)
                yield from self._descend(child, inside, arrived.part(hand), decided)

    def save(self, folder: FilePath | str, notes: Mapping[str, Any] | None = None) -> None:
        """Write the network into ``folder``; :func:`sigmabranch.load` reads it back.

        Args:
            folder: receives a manifest, the weights as safetensors, and the conversion record.
            notes: anything JSON-able to keep in the manifest, such as the task.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        described = {"kind": "branched", **self.described(), "notes": dict(notes or {})}
        write_archive(folder, self.state_dict(), described, {RECORD: self.record})

    def described(self) -> dict[str, Any]:
        """Its shape, JSON-able: what a manifest says so that a skeleton can be made from it."""
        return {
            "source": self.source,
            "tree": self.tree.to_dict(),
            "plans": {node_key(node): plan.to_dict() for node, plan in self.plans.items()},
            "router_channels": {
                node_key(node): self.router(node).channels for node in self.tree.inner
            },
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone: it would pull every P towards uniform."""
        return {f"routers.{node_key(node)}.gate.weight" for node in self.tree.inner}

    def path(self, leaf: NodeId) -> Path:
        """One path as a straight line, for counting and export (shares this net's modules).

        Raises:
            ConfigError: ``leaf`` is no leaf of the tree.
        """
        if leaf not in self.tree.leaves:
            known = ", ".join(map(node_key, self.tree.leaves))
            raise ConfigError(f"no leaf {node_key(leaf)!r}: choose from {known}")
        return Path(self, leaf)

    def router(self, node: NodeId) -> Router:
        """The router of an inner node."""
        return self.routers[node_key(node)]  # type: ignore[return-value]

    def has_router(self, node: NodeId) -> bool:
        """Whether a node decides by itself; inner nodes do, unless one above decides for them."""
        return node_key(node) in self.routers

    def specializer(self, node: NodeId) -> nn.Module:
        """The specializer of any node but the root."""
        return self.specializers[node_key(node)]

    def head(self, leaf: NodeId) -> nn.Module:
        """The head of a leaf."""
        return self.heads[node_key(leaf)]

    def node_modules(self, node: NodeId) -> list[nn.Module]:
        """The modules charged to ``node``: trunk or specializer, and its router or head.

        An early router, too, is charged to its own node: only inputs that pass it need it.
        """
        body = [self.specializer(node)] if node else self._trunk_modules()
        if node in self.tree.leaves:
            return [*body, self.head(node)]
        return [*body, self.router(node)] if self.has_router(node) else body

    def shared_below(self, node: NodeId) -> nn.Module | None:
        """What the children of ``node`` share; None if they share nothing."""
        key = node_key(node)
        return self.shared[key] if key in self.shared else None  # noqa: SIM401 (no dict)

    def _trunk_modules(self) -> list[nn.Module]:
        # Run in parts, a trunk is never called as a whole, so that no tracer can charge it.
        whole = self.tree.decide_after is None
        return [self.trunk] if whole else list(self.trunk.children())

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Root first, then level by level."""
        return ((), *self.tree.specializers)

    def node_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters per node key; together they are all of the net's.

        What the children of a node share counts as a node of its own.
        """
        found = {
            node_key(node): [p for module in self.node_modules(node) for p in module.parameters()]
            for node in self.nodes
        }
        for node in self.tree.inner:
            if (shared := self.shared_below(node)) is not None:
                found[shared_key(node)] = [*shared.parameters()]
        return found

    def node_log_prob(self, log_prob_BL: Tensor) -> dict[str, Tensor]:
        """log probability that a sample passes each node: (B,) per node key.

        It passes what the children of a node share whenever it passes that node.
        """
        found = below(self.tree, self.nodes, log_prob_BL)
        for node in self.tree.inner:
            if self.shared_below(node) is not None:
                found[shared_key(node)] = found[node_key(node)]
        return found


class Path(nn.Module):
    """The straight line from the input to one leaf, routers included.

    They are charged to the path (paper, eq. 4), so their outputs are returned: a tracer would
    otherwise drop them as dead code.
    """

    def __init__(self, net: SigmaBranchNet, leaf: NodeId) -> None:
        super().__init__()
        inner = [leaf[:level] for level in range(len(leaf))]
        self.trunk, self.decide_after = net.trunk, net.tree.decide_after
        self.routers = nn.ModuleDict(
            {str(len(node)): net.router(node) for node in inner if net.has_router(node)}
        )
        self.specializers = nn.ModuleList(
            net.specializer(leaf[: level + 1]) for level in range(len(leaf))
        )
        self.head = net.head(leaf)
        below = [net.shared_below(node) for node in inner]
        self.shared = nn.ModuleList(module for module in below if module is not None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(logits (B, V), then log p (B, K) of each router on the path)."""
        until, rest = split_trunk(self.trunk, self.decide_after)
        seen = until(x)
        early = self.decide_after is not None
        branches = [router(seen) for router in self.routers.values() if early]
        feature = rest(seen)
        for level, specializer in enumerate(self.specializers):
            if str(level) in self.routers and not early:
                branches.append(self.routers[str(level)](feature))
            feature = specializer(feature)
        return (self.head(feature), *branches)


def is_branched(model: nn.Module) -> TypeGuard[SigmaBranchNet]:
    """Whether routers decide anything; in a dense network or a single path there are none."""
    return isinstance(model, SigmaBranchNet) and bool(model.tree.inner)


def split_trunk(trunk: nn.Module, after: str | None) -> tuple[nn.Module, nn.Sequential]:
    """A trunk up to and including its module ``after``, and the rest; None: all of it, and nothing.

    Raises:
        ConfigError: the trunk has no such module.
    """
    if after is None:
        return trunk, nn.Sequential()
    chain = dict(trunk.named_children()) if isinstance(trunk, nn.Sequential) else {}
    name = after.replace(".", "_")
    if name not in chain:
        raise ConfigError(
            f"tree decide_after={after!r} is no module of the trunk: choose from {', '.join(chain)}"
        )
    parts, stop = list(chain.items()), list(chain).index(name) + 1
    return nn.Sequential(OrderedDict(parts[:stop])), nn.Sequential(OrderedDict(parts[stop:]))


def below(tree: TreeSpec, nodes: Iterable[NodeId], log_prob_BL: Tensor) -> dict[str, Tensor]:
    """log P that a sample ends at some leaf below each of the nodes: (B,) per node key."""
    return {
        node_key(node): log_prob_BL[:, tree.leaves_under(node)].logsumexp(dim=1) for node in nodes
    }


def by_node(modules: Mapping[NodeId, nn.Module]) -> nn.ModuleDict:
    """Modules under their nodes' keys."""
    return nn.ModuleDict({node_key(node): module for node, module in modules.items()})
