"""What the routing does, from counts: balance, shared information, agreement, shuffled routes.

Shapes: N samples, B batch, V classes, L leaves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SHUFFLES = 16


def balance(count_L: Tensor) -> float:
    """Entropy of the leaves' usage over ln L: 1 if all are used alike, 0 if only one is."""
    leaves = len(count_L)
    return _entropy(count_L) / math.log(leaves) if leaves > 1 else 1.0


def leaf_class_information(count_VL: Tensor) -> float:
    """Mutual information of leaf and class over ln L.

    0: the route says nothing about the class. 1: leaves are used alike and the class tells which.
    """
    leaves = count_VL.shape[1]
    if leaves < 2:
        return 0.0
    shared = _entropy(count_VL.sum(0)) + _entropy(count_VL.sum(1)) - _entropy(count_VL)
    return max(shared, 0.0) / math.log(leaves)


def agreement(predicted_BL: Tensor) -> Tensor:
    """Per sample, the fraction of leaf pairs that predict the same class: (B,) float64."""
    leaves = predicted_BL.shape[1]
    same_BLL = predicted_BL[:, :, None] == predicted_BL[:, None, :]
    pairs_B = same_BLL.sum(dim=(1, 2)) - leaves
    return pairs_B.double() / max(leaves * (leaves - 1), 1)


def shuffled_accuracy(correct_NL: Tensor, leaf_N: Tensor, seed: int) -> float:
    """Fraction correct if each sample went where some other sample was sent.

    Leaves and usage stay, only the knowledge of the sample goes. It is the mean over 16 seeded
    permutations: one alone scatters by up to a percentage point on a thousand samples.

    Args:
        correct_NL: bool, whether leaf l is right on sample n.
        leaf_N: int64, the leaf each sample was routed to.
        seed: of the permutations, which are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    rows_N = torch.arange(len(leaf_N), device=leaf_N.device)
    hits = torch.zeros((), dtype=torch.int64, device=leaf_N.device)
    for _ in range(_SHUFFLES):
        order_N = torch.randperm(len(leaf_N), generator=generator).to(leaf_N.device)
        hits += correct_NL[rows_N, leaf_N[order_N]].sum()
    return hits.item() / (_SHUFFLES * len(leaf_N))


def _entropy(count: Tensor) -> float:
    """In nats, of a table of counts; 0·ln 0 = 0."""
    share = count.double().flatten() / count.sum()
    return torch.special.entr(share).sum().item()
