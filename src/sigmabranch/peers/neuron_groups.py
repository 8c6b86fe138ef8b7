"""Neurons dealt into groups of equal size by which of them fire together.

Shapes: T tokens, H hidden width, N experts, S shared ones, R routed ones (N = S + R), M neurons an
expert, J neurons that are not shared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sigmabranch.errors import MissingDependency


def grouped(together_HH: Tensor, experts: int, shared: int) -> tuple[Tensor, Tensor]:
    """Deal neurons into experts of equal size by which tokens mark them.

    The L1 distance between two neurons' markers, one bit a token, follows from how often each is
    marked and how often both are; so does the distance from a mean of such markers. Clusters start
    from the leftovers that are marked most and take one pass of balanced assignment, as in the
    original code.

    Args:
        together_HH: tokens that mark both neurons, symmetric; the diagonal counts one neuron's.
        experts: N.
        shared: S.

    Returns:
        (H,) the neurons expert by expert, shared ones first; (R,) the neuron of each routed expert
        nearest to the mean of its markers.

    Raises:
        MissingDependency: scipy is not installed.
    """
    rate_H = together_HH.diagonal()
    by_rate_H = rate_H.argsort(descending=True, stable=True)
    size = len(rate_H) // experts
    common_H, left_J = by_rate_H.tensor_split([shared * size])
    if len(left_J) == size:
        cluster_J = torch.zeros_like(left_J)
    else:
        start_R = left_J[: experts - shared]
        apart_JR = rate_H[left_J, None] + rate_H[start_R] - 2 * together_HH[left_J][:, start_R]
        cluster_J = _balanced(apart_JR, size)
    members = [left_J[cluster_J == cluster] for cluster in range(experts - shared)]
    speakers = [_nearest_to_mean(together_HH, member_M) for member_M in members]
    return torch.cat([common_H, *members]), torch.stack(speakers)


def _balanced(cost_JR: Tensor, size: int) -> Tensor:
    """(J,) the cluster of each row, ``size`` rows to a cluster, at the least total cost."""
    try:
        from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 (an optional package)
    except ImportError as error:
        raise MissingDependency("scipy", "peers", "dealing neurons into experts") from error
    _, seat_J = linear_sum_assignment(cost_JR.repeat_interleave(size, dim=1).numpy())
    return torch.from_numpy(seat_J) // size


def _nearest_to_mean(together_HH: Tensor, member_M: Tensor) -> Tensor:
    """The member whose markers are nearest in L1 to the mean c of all members'.

    Σ_t |a_t − c_t| = Σ_t c_t + Σ_t a_t − 2·Σ_t a_t·c_t for bits a_t and c_t in [0, 1], and the
    first sum is the same for all members.
    """
    own_MM = together_HH[member_M][:, member_M]
    return member_M[(own_MM.diagonal() - 2 * own_MM.mean(dim=1)).argmin()]
