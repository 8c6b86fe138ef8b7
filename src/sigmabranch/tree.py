"""The tree's shape and widths, as plain data.

A node is named by the branch numbers on its way from the root: ``()`` is the trunk, ``(0, 1)`` the
second child of the first child. Level 1 are the children of the trunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, TypeAlias

from sigmabranch.errors import ConfigError
from sigmabranch.fields import from_fields, to_fields

NodeId: TypeAlias = tuple[int, ...]

ENTRIES = ("project", "gather", "inner")

# Ends the name of what siblings share, where theirs end with their number.
SHARED = "shared"

# A balanced binary tree of this depth has as many leaves as a balanced tree may have.
_DEEPEST = 10
_MOST_LEAVES = 2**_DEEPEST


def node_key(node: NodeId) -> str:
    """The node's name in files and module paths: ``"root"``, ``"0"``, ``"0-1"``."""
    return "-".join(map(str, node)) or "root"


def shared_key(node: NodeId) -> str:
    """The name of what the children of ``node`` share: ``"shared"``, ``"0-shared"``."""
    return "-".join((*map(str, node), SHARED))


def is_shared(key: str) -> bool:
    """Whether a key names what siblings share, not a node that an input comes to."""
    return key.rpartition("-")[2] == SHARED


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeSpec:
    """A tree of specializers (paper, section III, where every inner node has two children).

    Inner nodes may have any number of children from two on, and not all the same. A leaf above the
    last level runs all the remaining stages of the network by itself. In :meth:`unbranched` the
    trunk is the only leaf: a network without routers, dense or one path of it.

    Attributes:
        leaves: the paths of the leaves, left to right; an inner node's children are 0 to K − 1.
        widths: output channels per level, or None for the rule width/√n of :meth:`level_widths`.
        round_to: widths that follow the rule become the nearest multiple of this (1 = exact).
        projection_dim: length of the latent that each router reads.
        projection_dropout: dropout on the latent while training.
        cuts: the stage at which each level begins, or None for the backbone's last stages.
        entry: how a level begins. ``"project"``: a layer makes new channels from all of its input,
            and only some of them are made (paper). Where the network hands its input's channels on
            instead, as residual streams do: ``"inner"`` keeps them all and cuts only what lies
            inside the blocks, ``"gather"`` copies the branch's channels out of its input. None
            projects where the network does, and else cuts inside.
        shares: share of the inner channels (bottleneck planes, hidden units) that each level keeps,
            or None for the share of its width; for 1/n where n specializers keep their width.
        heads: share of the attention heads that each level keeps, or None for all of them.
        decide_after: the module of the trunk whose output all routers read, so that the whole path
            is known before the trunk has ended; None lets each read its own node's output (paper).
        trunk_share: share of the trunk's channels that stays, of those that do not leave it; the
            trunk does most of a path's arithmetic. None keeps them all (paper).
        tied: share of the channels of each specializer's layers whose filters are one tensor for
            all siblings: trained by all samples, stored once. Siblings then hold the same channels
            of the dense network. 0 ties none (paper).
        delta: rank of what each sibling adds to layers that are one tensor for all siblings, the
            heads of sibling leaves included; the cheapest way to store many leaves. 0 shares no
            layers (paper).
    """

    leaves: tuple[NodeId, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))
    widths: tuple[int, ...] | None = None
    round_to: int = 1
    projection_dim: int = 128
    projection_dropout: float = 0.1
    cuts: tuple[str, ...] | None = None
    entry: str | None = None
    shares: tuple[float, ...] | None = None
    heads: tuple[float, ...] | None = None
    decide_after: str | None = None
    trunk_share: float | None = None
    tied: float = 0.0
    delta: int = 0

    def __post_init__(self) -> None:
        for name in ("leaves", "widths", "cuts", "shares", "heads"):
            values = getattr(self, name)
            if isinstance(values, list):
                object.__setattr__(self, name, tuple(values))
        object.__setattr__(self, "leaves", tuple(map(tuple, self.leaves)))
        _check_leaves(self.leaves)
        if self.entry not in (None, *ENTRIES):
            raise ConfigError(f"unknown tree entry {self.entry!r}: choose from {ENTRIES}")
        for name in ("shares", "heads"):
            if not all(0 < share <= 1 for share in getattr(self, name) or ()):
                raise ConfigError(f"tree {name} must lie in (0, 1], got {getattr(self, name)}")
        for name in ("widths", "cuts", "shares", "heads"):
            values = getattr(self, name)
            if values is not None and len(values) != self.depth:
                raise ConfigError(
                    f"tree {name} has {len(values)} entries for {self.depth} levels: give one each"
                )
        if min(self.widths or (1,)) < 1:
            raise ConfigError(f"tree widths must be positive, got {self.widths}")
        if self.round_to < 1 or self.projection_dim < 1:
            raise ConfigError("tree round_to and projection_dim must be at least 1")
        if self.trunk_share is not None and not 0 < self.trunk_share <= 1:
            raise ConfigError("tree trunk_share must lie in (0, 1]")
        if not 0 <= self.projection_dropout < 1:
            raise ConfigError("tree projection_dropout must lie in [0, 1)")
        self._check_sharing()

    def _check_sharing(self) -> None:
        if not 0 <= self.tied <= 1:
            raise ConfigError(f"tree tied must lie in [0, 1], got {self.tied}")
        if self.delta < 0:
            raise ConfigError(f"tree delta is a rank: it must be at least 0, got {self.delta}")
        if self.tied and self.delta:
            raise ConfigError("tree tied and delta both say what siblings share: set one of them")

    @classmethod
    def balanced(cls, depth: int = 2, branches: int = 2, **fields: Any) -> TreeSpec:
        """The complete tree with ``branches ** depth`` leaves; the paper's has depth 2.

        Raises:
            ConfigError: a depth or a number of branches out of reach, or more than 1024 leaves.
        """
        if not 1 <= depth <= _DEEPEST:
            raise ConfigError(f"tree depth must be from 1 to {_DEEPEST}, got {depth}")
        if branches < 2 or branches**depth > _MOST_LEAVES:
            raise ConfigError(
                f"a tree of {branches} branches at {depth} levels is out of reach: choose at least "
                f"2 branches and at most {_MOST_LEAVES} leaves"
            )
        return cls(leaves=tuple(product(range(branches), repeat=depth)), **fields)

    @classmethod
    def unbranched(cls) -> TreeSpec:
        """The trunk alone, which is the only leaf."""
        return cls(leaves=((),))

    @property
    def depth(self) -> int:
        """Levels of routing: the length of the longest path."""
        return max(map(len, self.leaves))

    @property
    def inner(self) -> tuple[NodeId, ...]:
        """The nodes that own a router, root first, level by level."""
        prefixes = {leaf[:length] for leaf in self.leaves for length in range(len(leaf))}
        return tuple(sorted(prefixes, key=lambda node: (len(node), node)))

    @property
    def specializers(self) -> tuple[NodeId, ...]:
        """Every node but the trunk, level by level."""
        return tuple(sorted({*self.inner, *self.leaves} - {()}, key=lambda node: (len(node), node)))

    @property
    def sharing(self) -> tuple[NodeId, ...]:
        """The nodes whose children share tensors: all inner nodes, or none."""
        return self.inner if self.tied or self.delta else ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all nodes, level by level, what siblings share before the siblings."""
        keys = [node_key(())]
        for node in self.specializers:
            if node[-1] == 0 and self.sharing:
                keys.append(shared_key(node[:-1]))
            keys.append(node_key(node))
        return tuple(keys)

    def keys_to(self, leaf: NodeId) -> tuple[str, ...]:
        """Those of :attr:`keys` that an input reads which ends in ``leaf``."""
        own = {node_key(leaf[:level]) for level in range(len(leaf) + 1)}
        shared = {shared_key(node) for node in self.sharing if leaf[: len(node)] == node}
        return tuple(key for key in self.keys if key in own | shared)

    def children(self, node: NodeId) -> tuple[NodeId, ...]:
        """The nodes right below ``node``, left to right; none below a leaf."""
        last = self.leaves[self.leaves_under(node)[-1]]
        branches = last[len(node)] + 1 if last != node else 0
        return tuple((*node, branch) for branch in range(branches))

    @property
    def most_branches(self) -> int:
        """The largest number of children that a node has."""
        return max((1 + branch for leaf in self.leaves for branch in leaf), default=0)

    def parallel(self, level: int) -> int:
        """How many specializers exist side by side at ``level`` (short leaves reach down)."""
        at_level = {leaf[:level] for leaf in self.leaves}
        return len(at_level)

    def levels_of(self, node: NodeId) -> range:
        """The levels whose stages ``node`` runs: its own, and all below it if it is a leaf."""
        last = self.depth if node in self.leaves else len(node)
        return range(len(node), last + 1)

    def leaves_under(self, node: NodeId) -> tuple[int, ...]:
        """Positions in :attr:`leaves` of the leaves below (or equal to) ``node``."""
        return tuple(i for i, leaf in enumerate(self.leaves) if leaf[: len(node)] == node)

    def level_widths(self, source: Iterable[int]) -> tuple[int, ...]:
        """Output channels per level for the dense widths ``source`` of the same levels.

        The rule is width/√n for n specializers side by side, because a block's parameters grow
        with the square of its width (paper, section III-B).

        Raises:
            ConfigError: a level would be wider than its source, or the level counts differ.
        """
        source = tuple(source)
        if len(source) != self.depth:
            raise ConfigError(f"the tree has {self.depth} levels, the network gives {len(source)}")
        widths = self.widths or tuple(
            _rounded(width / math.sqrt(self.parallel(level)), self.round_to, width)
            for level, width in enumerate(source, start=1)
        )
        for level, (width, limit) in enumerate(zip(widths, source, strict=True), start=1):
            if width > limit:
                raise ConfigError(
                    f"tree level {level} is {width} channels wide but its source stage has only "
                    f"{limit}: choose at most {limit}"
                )
        return widths

    def check_branched(self) -> None:
        """Raise :class:`ConfigError` where there is nothing to route."""
        if not self.inner:
            raise ConfigError("the tree has a single leaf: name two or more")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        fields = {name: to_fields(value) for name, value in asdict(self).items()}
        # Files of trees without them are as old as the format.
        return {n: v for n, v in fields.items() if v or n not in ("tied", "delta")}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> TreeSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown key, or values that do not make a tree.
        """
        return from_fields(cls, "tree", value)


def _rounded(width: float, multiple: int, limit: int) -> int:
    nearest = max(multiple, round(width / multiple) * multiple)
    return min(nearest, limit)


def _check_leaves(leaves: tuple[NodeId, ...]) -> None:
    if len(set(leaves)) < len(leaves) or tuple(sorted(leaves)) != leaves:
        raise ConfigError("tree leaves must be distinct and in left-to-right order")
    if len(leaves) < 2 and leaves != ((),):
        raise ConfigError("a tree needs at least two leaves")
    below: dict[NodeId, set[int]] = {}
    ends = set(leaves)
    for leaf in leaves:
        for level, branch in enumerate(leaf):
            below.setdefault(leaf[:level], set()).add(branch)
    for node, branches in below.items():
        if node in ends:
            raise ConfigError(
                f"tree leaf {node_key(node)} has children: leave it out of the leaves"
            )
        if branches != set(range(max(2, len(branches)))):
            raise ConfigError(
                f"tree node {node_key(node)} has branches {sorted(branches)}: number them 0, 1, … "
                "without a gap, at least two"
            )
