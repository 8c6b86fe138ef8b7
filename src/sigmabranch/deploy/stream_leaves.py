"""Where the next input of a stream will go, from the classes that it will likely show."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sigmabranch.deploy.package import ancestry
from sigmabranch.deploy.prior import Prior, by_node
from sigmabranch.deploy.stream import StreamFilter

# Nothing is impossible: a leaf may be taken that no class took in calibration.
_EVEN = 0.01


class StreamLeaves(Prior):
    """Probabilities of leaves and nodes, given what a stream has shown.

    A class takes each leaf as often as it did in calibration, whatever the group.

    Args:
        leaves: keys of the leaves: the groups of ``stream``, in this order.
        stream: what is believed; whoever owns it tells it the answers.
    """

    def __init__(self, leaves: Sequence[str], stream: StreamFilter) -> None:
        self._names, self._stream = tuple(leaves), stream
        taken_GL = stream.shown @ stream.class_share
        self._taken_GL = (1 - _EVEN) * taken_GL + _EVEN / len(self._names)

    def saw(self, leaf: str) -> None:
        """Nothing: what the leaf answered says more than which it was."""

    def nodes(self, given: str = "root") -> dict[str, float]:
        """Probability of each node for the next input, of which it is known to pass ``given``."""
        below = self._below(given)
        weight_L = (self._stream.groups @ self._taken_GL)[below]
        return self._by_node(weight_L / weight_L.sum(), below)

    def following(self, given: str) -> dict[str, float]:
        """The same for the input after one that passes ``given``."""
        group_G = self._stream.groups * self._taken_GL[:, self._below(given)].sum(1)
        next_G = self._stream.after(group_G / group_G.sum())
        return self._by_node(next_G @ self._taken_GL, range(len(self._names)))

    def _below(self, given: str) -> list[int]:
        return [n for n, leaf in enumerate(self._names) if given in ancestry(leaf)]

    def _by_node(self, weight_L: Tensor, leaves: Sequence[int]) -> dict[str, float]:
        names = [self._names[number] for number in leaves]
        return by_node(dict(zip(names, weight_L.tolist(), strict=True)))
