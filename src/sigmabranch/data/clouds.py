"""Point clouds as networks see them: centred, of unit size, farthest points first.

N clouds, P points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sigmabranch.points import farthest_points, take_points

POINTS = 1024
# As many as a network takes for its centroids at most. Ordering the other half as well would more
# than double the time.
ORDERED = POINTS // 2
# Clouds ordered at a time: on a CPU what its cache holds, on an accelerator what keeps it busy.
_CHUNK, _ACCELERATOR_CHUNK = 64, 1024


def arrange(clouds_NP3: Tensor, device: torch.device | str) -> Tensor:
    """Unit sphere, then farthest-first order.

    Args:
        clouds_NP3: finite float32 on the CPU; no cloud has all its points in one place.
        device: where the order is found and the result stays.

    Returns:
        (N, P, 3) float32.
    """
    chunk = _CHUNK if torch.device(device).type == "cpu" else _ACCELERATOR_CHUNK
    pieces = clouds_NP3.split(chunk)
    return torch.cat([farthest_first(unit_sphere(piece).to(device)) for piece in pieces])


def unit_sphere(clouds_NP3: Tensor) -> Tensor:
    """Move each cloud's mean to the origin and its farthest point to distance 1: float32."""
    clouds_NP3 = clouds_NP3.double()  # coordinates may be of any size
    centred_NP3 = clouds_NP3 - clouds_NP3.mean(1, keepdim=True)
    radius_N = centred_NP3.square().sum(2).amax(1).sqrt()
    return (centred_NP3 / radius_N[:, None, None]).float()


def farthest_first(clouds_NP3: Tensor) -> Tensor:
    """Put the first :data:`ORDERED` farthest points first; the others keep their old order.

    Uniform scale, shift and rotation leave this order valid, so a network that samples farthest
    points finds them in place under augmentation too.
    """
    points = clouds_NP3.shape[1]
    first_NS = farthest_points(clouds_NP3, min(ORDERED, points))
    place_NS = torch.arange(first_NS.shape[1], device=first_NS.device).expand_as(first_NS)
    rank_NP = torch.full(clouds_NP3.shape[:2], points, device=clouds_NP3.device)
    # A cloud with too few distinct points samples some again and again: their first time counts.
    rank_NP.scatter_reduce_(1, first_NS, place_NS, "amin")
    return take_points(clouds_NP3, rank_NP.argsort(dim=1, stable=True))


def unchanged(clouds_NP3: Tensor) -> Tensor:
    """What normalises clouds that are arranged already."""
    return clouds_NP3
