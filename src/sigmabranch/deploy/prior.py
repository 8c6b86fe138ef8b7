"""Where the next input will go: how often each leaf followed each other one.

Inputs that have nothing to do with each other make every row alike: the usage of the leaves. A
stream of similar inputs makes the diagonal heavy. Nothing needs to be told which of the two it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from sigmabranch.deploy.package import ancestry

# What the measured usage weighs against inputs seen, and how fast old inputs are forgotten.
_PRIOR_INPUTS = 2.0
_DECAY = 0.95


class Prior(ABC):
    """Probabilities of nodes for inputs that are yet to come."""

    @abstractmethod
    def saw(self, leaf: str) -> None:
        """An input took ``leaf``."""

    @abstractmethod
    def nodes(self, given: str = "root") -> dict[str, float]:
        """Probability of each node for an input of which it is known that it passes ``given``."""

    @abstractmethod
    def following(self, given: str) -> dict[str, float]:
        """The same for the input after one that passes ``given``."""


class LeafPrior(Prior):
    """Probabilities of leaves and nodes, given the leaf of the last input.

    Args:
        leaves: keys of the leaves.
        usage: leaf → share of the inputs; all alike if empty.
    """

    def __init__(self, leaves: Sequence[str], usage: Mapping[str, float]) -> None:
        total = sum(usage.get(leaf, 0.0) for leaf in leaves)
        even = 1 / len(leaves)
        share = {leaf: usage.get(leaf, 0.0) / total if total else even for leaf in leaves}
        # Nothing is impossible: a leaf that was never used yet may be.
        self._start = {
            leaf: _PRIOR_INPUTS * (0.9 * value + 0.1 * even) for leaf, value in share.items()
        }
        self._after = {leaf: dict(self._start) for leaf in leaves}
        self._last: str | None = None

    def saw(self, leaf: str) -> None:
        """An input took ``leaf``."""
        if self._last is not None:
            row = self._after[self._last]
            for other in row:
                row[other] *= _DECAY
            row[leaf] += 1.0
        self._last = leaf

    def nodes(self, given: str = "root") -> dict[str, float]:
        """Probability of each node for an input of which it is known that it passes ``given``."""
        return by_node(self._leaves(given))

    def following(self, given: str) -> dict[str, float]:
        """The same for the input after one that passes ``given``."""
        after = dict.fromkeys(self._start, 0.0)
        for leaf, probability in self._leaves(given).items():
            row = self._after[leaf]
            total = sum(row.values())
            for other, weight in row.items():
                after[other] += probability * weight / total
        return by_node(after)

    def _leaves(self, given: str) -> dict[str, float]:
        """Probability of each leaf below ``given``."""
        row = self._start if self._last is None else self._after[self._last]
        below = {leaf: weight for leaf, weight in row.items() if given in ancestry(leaf)}
        total = sum(below.values())
        return {leaf: weight / total for leaf, weight in below.items()}


def by_node(leaves: Mapping[str, float]) -> dict[str, float]:
    """Probability of each node from those of the leaves."""
    probability: dict[str, float] = {}
    for leaf, weight in leaves.items():
        for node in ancestry(leaf):
            probability[node] = probability.get(node, 0.0) + weight
    return probability
