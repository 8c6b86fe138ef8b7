"""Which classes share a leaf: those that are often taken for each other.

Shapes: V classes, K branches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sigmabranch.tree import NodeId, TreeSpec

STARTS = 30
# Gains below this are rounding; without it two swaps could undo each other for ever.
_LEAST_GAIN = 1e-12


def class_leaves(confusion_VV: Tensor, tree: TreeSpec, seed: int) -> Tensor:
    """The leaf of each class, (V,) int64.

    At each node, from the root on, its classes are dealt out to the branches, as many to each as
    it has leaves in proportion, so that classes which are confused stay together.

    Args:
        confusion_VV: row v says how a network answers to class v: mean probabilities, or counts.
        tree: with at most V leaves.
        seed: of the random starts.
    """
    alike_VV = (confusion_VV + confusion_VV.T).double().cpu().fill_diagonal_(0.0)
    generator = torch.Generator().manual_seed(seed)
    leaf_V = torch.zeros(len(alike_VV), dtype=torch.int64)

    def descend(node: NodeId, classes: Tensor) -> None:
        children = tree.children(node)
        if not children:
            leaf_V[classes] = tree.leaves.index(node)
            return
        leaves = [len(tree.leaves_under(child)) for child in children]
        inside = alike_VV[classes][:, classes]
        group = closest_groups(inside, _sizes(len(classes), leaves), generator)
        for child in children:
            descend(child, classes[group == child[-1]])

    descend((), torch.arange(len(alike_VV)))
    return leaf_V


def closest_groups(alike_VV: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """Groups of given sizes with much likeness inside: the group of each class, (V,) int64.

    From each of several random starts the best swap of two classes is made until none helps; the
    best end wins.

    Args:
        alike_VV: symmetric float64, zero on the diagonal.
        sizes: K of them, which sum to V.
        generator: of the random starts.
    """
    even = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    best, most = even, -torch.inf
    for _ in range(STARTS):
        group_V = even[torch.randperm(len(even), generator=generator)]
        inside = _climb(alike_VV, group_V)
        if inside > most + _LEAST_GAIN:
            best, most = group_V, inside
    return best


def _climb(alike_VV: Tensor, group_V: Tensor) -> float:
    """Swap in place while it helps; returns the likeness inside the groups."""
    rows_V = torch.arange(len(group_V))
    while True:
        member_VK = torch.nn.functional.one_hot(group_V).double()
        to_VK = alike_VV @ member_VK
        own_V = to_VK[rows_V, group_V]
        # Row u, column v: how much closer u is to v's group than to its own.
        closer_VV = to_VK[:, group_V] - own_V[:, None]
        gain_VV = closer_VV + closer_VV.T - 2 * alike_VV
        gain_VV[group_V[:, None] == group_V] = 0.0
        gain, place = gain_VV.flatten().max(0)
        if float(gain) <= _LEAST_GAIN:
            return float(own_V.sum())
        one, other = divmod(int(place), len(group_V))
        group_V[[one, other]] = group_V[[other, one]]


def _sizes(count: int, shares: Sequence[int]) -> list[int]:
    """``count`` in whole parts that are proportional to ``shares``."""
    total, ends, sizes = sum(shares), 0, []
    for share in shares:
        begun = count * ends // total
        ends += share
        sizes.append(count * ends // total - begun)
    return sizes
