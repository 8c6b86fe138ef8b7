"""A tree over the classes, from which ones a trained network confuses.

As in DecisioNet (Gottlieb et al., ACCV 2022), but with confusions counted on the training split;
the authors' script counts them on the test split. Nothing balances the tree: where few classes are
confused, a side may hold a single one.

Shapes: B batch, V classes, I inner nodes of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.conversion import Shards
from sigmabranch.conversion.shards import Loader
from sigmabranch.coupling import evaluating
from sigmabranch.errors import MissingDependency
from sigmabranch.tree import NodeId, TreeSpec

# What a class's code says of an inner node.
LEFT, EITHER, RIGHT, OFF_ITS_WAY = 0.0, 0.5, 1.0, -1.0


@torch.no_grad()
def confusions(
    network: nn.Module, batches: Loader, classes: int, *, expected: bool, shards: Shards = Shards()
) -> Tensor:
    """How often each class is taken for each: (V, V) float64 on the CPU, rows summing to one.

    Args:
        network: (B, ...) → (B, V) logits.
        batches: (inputs, labels) of the training split.
        classes: V.
        expected: average the probabilities of the answers instead of counting the likeliest one.
        shards: the processes that divide the batches.
    """
    device = next(network.parameters()).device
    sum_VV = torch.zeros(classes, classes, dtype=torch.float64, device=device)
    with evaluating(network):
        for x, y in shards.own(batches):
            logits_BV = network(x.to(device)).double()
            answer_BV = logits_BV.softmax(1)
            if not expected:
                answer_BV = F.one_hot(logits_BV.argmax(1), classes).double()
            sum_VV.index_add_(0, y.to(device), answer_BV)
    sum_VV = shards.sum(sum_VV).cpu()
    return sum_VV / sum_VV.sum(1, keepdim=True).clamp(min=1)


def class_codes(confusion_VV: Tensor, tree: TreeSpec, overlap: float | None = None) -> Tensor:
    """Which side of each inner node each class belongs to: (V, I) float32.

    Each node's classes fall into the last two clusters of average linkage, whose distance is one
    minus the confusion, in the mean of both directions. A node that only one class reaches sends
    it either way.

    Args:
        confusion_VV: rows summing to one.
        tree: the tree to be filled; its inner nodes give the columns.
        overlap: classes that are confused with all of the other side together more often than
            this may go either way; None lets none.

    Returns:
        :data:`LEFT`, :data:`RIGHT`, :data:`EITHER`, or :data:`OFF_ITS_WAY` where the class does
        not come or is the only one.

    Raises:
        MissingDependency: SciPy is not installed.
    """
    distance_VV = 1 - (confusion_VV + confusion_VV.T) / 2
    distance_VV.fill_diagonal_(0)
    code_VI = torch.full((len(confusion_VV), len(tree.inner)), OFF_ITS_WAY)
    root: NodeId = ()
    members = {root: list(range(len(confusion_VV)))}
    for column, node in enumerate(tree.inner):
        here = members[node]
        left, right = _halves(distance_VV, here) if len(here) > 1 else (here, here)
        members[(*node, 0)], members[(*node, 1)] = left, right
        if len(here) > 1:
            code_VI[left, column] = _codes(confusion_VV, left, right, LEFT, overlap)
            code_VI[right, column] = _codes(confusion_VV, right, left, RIGHT, overlap)
    return code_VI


def linkage() -> ModuleType:
    """SciPy's hierarchical clustering.

    Raises:
        MissingDependency: SciPy is not installed.
    """
    try:
        from scipy.cluster import hierarchy  # noqa: PLC0415 (an optional package)
    except ImportError as error:
        raise MissingDependency("scipy", "peers", "Clustering the classes") from error
    return hierarchy


def _halves(distance_VV: Tensor, members: Sequence[int]) -> tuple[list[int], list[int]]:
    """The two clusters joined last, the one with the first class first.

    Cutting at a height instead could give one cluster only: distances often tie.
    """
    upper = torch.triu_indices(len(members), len(members), offset=1)
    condensed = distance_VV[members][:, members][upper[0], upper[1]]
    hierarchy = linkage()
    top = hierarchy.to_tree(hierarchy.linkage(condensed.numpy(), "average"))
    sides = [sorted(members[i] for i in side.pre_order()) for side in (top.left, top.right)]
    first, second = sorted(sides)
    return first, second


def _codes(
    confusion_VV: Tensor, side: list[int], other: list[int], code: float, overlap: float | None
) -> Tensor:
    """The codes of the classes of one side."""
    code_S = torch.full((len(side),), code)
    if overlap is not None:
        code_S[confusion_VV[side][:, other].sum(1) > overlap] = EITHER
    return code_S
