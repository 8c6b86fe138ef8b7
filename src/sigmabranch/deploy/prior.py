"""Where the next input will go: how often each leaf followed each other one.

Inputs that have nothing to do with each other make every row alike: the usage of the leaves. A
stream of similar inputs makes the diagonal heavy. Nothing needs to be told which of the two it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sigmabranch.deploy.package import ancestry

# What the measured usage weighs against inputs seen, and how fast old inputs are forgotten.
_PRIOR_INPUTS = 2.0
_DECAY = 0.95


class LeafPrior:
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
        """Probability of each node for the next input, if it is known to pass node ``given``."""
        row = self._start if self._last is None else self._after[self._last]
        row = {leaf: weight for leaf, weight in row.items() if given in ancestry(leaf)}
        total = sum(row.values())
        probability: dict[str, float] = {}
        for leaf, weight in row.items():
            for node in ancestry(leaf):
                probability[node] = probability.get(node, 0.0) + weight / total
        return probability
