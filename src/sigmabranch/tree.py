"""The tree's shape and widths, as plain data.

A node is named by the branch numbers on its way from the root: ``()`` is the trunk, ``(0, 1)`` the
second child of the first child. Level 1 are the children of the trunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from sigmabranch.errors import ConfigError
from sigmabranch.fields import from_fields, to_fields

NodeId: TypeAlias = tuple[int, ...]

# A balanced tree of this depth has a thousand leaves.
_DEEPEST = 10


def node_key(node: NodeId) -> str:
    """The node's name in files and module paths: ``"root"``, ``"0"``, ``"0-1"``."""
    return "-".join(map(str, node)) or "root"


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeSpec:
    """A binary tree of specializers (paper, section III).

    A leaf above the last level runs all the remaining stages of the network by itself.

    Attributes:
        leaves: the paths of the leaves, left to right; every inner node has both its children.
        widths: output channels per level, or None for the rule width/√n of :meth:`level_widths`.
        round_to: widths that follow the rule become the nearest multiple of this (1 = exact).
        projection_dim: length of the latent that each router reads.
        projection_dropout: dropout on the latent while training.
        cuts: the stage at which each level begins, or None for the backbone's last stages.
        decide_after: the module of the trunk whose output all routers read, so that the whole path
            is known before the trunk has ended; None lets each read its own node's output (paper).
        trunk_share: share of the trunk's channels that stays, of those that do not leave it; the
            trunk does most of a path's arithmetic. None keeps them all (paper).
    """

    leaves: tuple[NodeId, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))
    widths: tuple[int, ...] | None = None
    round_to: int = 1
    projection_dim: int = 128
    projection_dropout: float = 0.1
    cuts: tuple[str, ...] | None = None
    decide_after: str | None = None
    trunk_share: float | None = None

    def __post_init__(self) -> None:
        _check_leaves(self.leaves)
        for name, values in (("widths", self.widths), ("cuts", self.cuts)):
            if values is not None and len(values) != self.depth:
                raise ConfigError(
                    f"tree {name} has {len(values)} entries for {self.depth} levels: give one each"
                )
        if self.widths is not None and min(self.widths) < 1:
            raise ConfigError(f"tree widths must be positive, got {self.widths}")
        if self.round_to < 1 or self.projection_dim < 1:
            raise ConfigError("tree round_to and projection_dim must be at least 1")
        if self.trunk_share is not None and not 0 < self.trunk_share <= 1:
            raise ConfigError("tree trunk_share must lie in (0, 1]")
        if not 0 <= self.projection_dropout < 1:
            raise ConfigError("tree projection_dropout must lie in [0, 1)")

    @classmethod
    def balanced(cls, depth: int = 2, **fields: Any) -> TreeSpec:
        """The complete binary tree with ``2 ** depth`` leaves; the paper's has depth 2."""
        if not 1 <= depth <= _DEEPEST:
            raise ConfigError(f"tree depth must be from 1 to {_DEEPEST}, got {depth}")
        leaves = tuple(
            tuple(number >> (depth - 1 - level) & 1 for level in range(depth))
            for number in range(2**depth)
        )
        return cls(leaves=leaves, **fields)

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {name: to_fields(value) for name, value in asdict(self).items()}

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
    if len(leaves) < 2 or any(branch not in (0, 1) for leaf in leaves for branch in leaf):
        raise ConfigError("a tree needs at least two leaves, named by branches 0 and 1")
    # Kraft's equality: with distinct prefix-free paths it says that no child is missing.
    prefix_free = all(b[: len(a)] != a for a in leaves for b in leaves if a != b)
    if not prefix_free or sum(2.0 ** -len(leaf) for leaf in leaves) != 1.0:
        raise ConfigError(f"tree leaves {leaves} do not form a binary tree with both children")
