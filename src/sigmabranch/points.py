"""Geometry of point sets: farthest points and balls, batched on any device, without extensions.

Distances are sums of squared differences, never matrix products: those would round nearby points
together, and a counter would charge them. Sampling and grouping are operators of their own, so that
a tracer or compiler meets one node instead of hundreds of steps.

Shapes: B clouds, P points, S sampled points (centroids), K neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding may tell two points apart that are equally far; either is a farthest point then.
_TIE = 1e-4
# Clouds whose P · S distances are held at a time: on a CPU so few that they stay in its cache.
_AT_ONCE = {"cpu": 4}
_AT_ONCE_ELSEWHERE = 32


# Declared without torch's custom_op decorator, which loads the compiler at the first call.
_operators = torch.library.Library("sigmabranch", "DEF")
_operators.define("farthest_points(Tensor xyz, int count) -> Tensor")
_operators.define("ball_query(Tensor xyz, Tensor centre, float radius, int count) -> Tensor")


def farthest_points(xyz: Tensor, count: int) -> Tensor:
    """Farthest-point sampling: each point is the one farthest from all those before it.

    The first is point 0. On an accelerator, where ``count`` dependent steps take longer than any
    other part of a point network, clouds that already come in this order are recognised in a few
    parallel operations (:func:`in_farthest_order`); then the first ``count`` points are the answer.

    Args:
        xyz: (B, P, 3) finite coordinates.
        count: S, at most P.

    Returns:
        (B, S) int64 positions among the P points; the same point again where all points coincide.
    """
    return torch.ops.sigmabranch.farthest_points(xyz, count)


def ball_query(xyz: Tensor, centre: Tensor, radius: float, count: int) -> Tensor:
    """The first ``count`` points, in the cloud's order, within ``radius`` of each centre.

    Where there are fewer, the first of them fills up the rest, which leaves a maximum over the
    neighbours as it is (Qi et al., PointNet++, 2017).

    Args:
        xyz: (B, P, 3).
        centre: (B, S, 3), taken from ``xyz``, so that no ball is empty.
        radius: in the units of the coordinates.
        count: K.

    Returns:
        (B, S, K) int64 positions among the P points.
    """
    return torch.ops.sigmabranch.ball_query(xyz, centre, radius, count)


def in_farthest_order(xyz: Tensor, count: int) -> bool:
    """Whether the first ``count`` points are farthest points in their order, up to rounding.

    One cumulative minimum replaces the chain of steps. Scaling and shifting a cloud keep the
    order, and so does removing any points but the first ``count``: a largest distance stays the
    largest among fewer.

    Args:
        xyz: (B, P, 3).
        count: how many of the first points are looked at.
    """
    for clouds in xyz.split(_at_once(xyz)):
        nearest = squared_distances(clouds[:, :count], clouds).cummin(1).values[:, :-1]
        own = nearest.diagonal(1, 1, 2)[:, : count - 1]
        if not bool((own >= nearest.amax(2) * (1 - _TIE)).all()):
            return False
    return True


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(B, S, P) squared distances between (B, S, 3) and (B, P, 3)."""
    x, y, z = (a[:, :, None, axis] - b[:, None, :, axis] for axis in range(3))
    return x.square_().addcmul_(y, y).addcmul_(z, z)


def take_points(values: Tensor, index: Tensor) -> Tensor:
    """(B, P, C) values at (B, ...) positions: (B, ..., C)."""
    row = torch.arange(len(values), device=values.device).view(-1, *[1] * (index.ndim - 1))
    return values[row, index]


@torch.library.impl(_operators, "farthest_points", "CompositeExplicitAutograd")
@torch.no_grad()
def _farthest_points(xyz: Tensor, count: int) -> Tensor:
    if xyz.device.type != "cpu" and in_farthest_order(xyz, count):
        return torch.arange(count, device=xyz.device).repeat(len(xyz), 1)
    precise = xyz if xyz.dtype == torch.float64 else xyz.float()
    x, y, z = precise.movedim(-1, 0).contiguous()
    chosen = torch.zeros(len(xyz), count, dtype=torch.int64, device=xyz.device)
    nearest, distance, difference = torch.full_like(x, torch.inf), x.clone(), x.clone()
    last = chosen[:, :1]
    for step in range(1, count):
        torch.sub(x, x.gather(1, last), out=distance).square_()
        for axis in (y, z):
            torch.sub(axis, axis.gather(1, last), out=difference)
            distance.addcmul_(difference, difference)
        torch.minimum(nearest, distance, out=nearest)
        last = _argmax(nearest)
        chosen[:, step : step + 1] = last
    return chosen


@torch.library.register_fake("sigmabranch::farthest_points", lib=_operators)
def _(xyz: Tensor, count: int) -> Tensor:
    return xyz.new_empty(len(xyz), count, dtype=torch.int64)


@torch.library.impl(_operators, "ball_query", "CompositeExplicitAutograd")
@torch.no_grad()
def _ball_query(xyz: Tensor, centre: Tensor, radius: float, count: int) -> Tensor:
    size = _at_once(xyz)
    pairs = zip(xyz.split(size), centre.split(size), strict=True)
    return torch.cat([_neighbours(points, middle, radius, count) for points, middle in pairs])


@torch.library.register_fake("sigmabranch::ball_query", lib=_operators)
def _(xyz: Tensor, centre: Tensor, radius: float, count: int) -> Tensor:
    return xyz.new_empty(*centre.shape[:2], count, dtype=torch.int64)


def _neighbours(xyz: Tensor, centre: Tensor, radius: float, count: int) -> Tensor:
    inside = squared_distances(centre, xyz) <= radius**2
    # The k-th neighbour is where the running count of neighbours reaches k.
    found = inside.cumsum(-1, dtype=torch.int32)
    wanted = torch.arange(1, count + 1, dtype=torch.int32, device=xyz.device)
    place = torch.searchsorted(found, wanted.expand(*found.shape[:2], -1).contiguous())
    return torch.where(place < xyz.shape[1], place, place[..., :1])


def _argmax(values: Tensor) -> Tensor:
    """(B, 1) position of each row's first largest value; on a CPU numpy is several times faster."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy().argmax(1))[:, None]
    return values.argmax(1, keepdim=True)


def _at_once(xyz: Tensor) -> int:
    return _AT_ONCE.get(xyz.device.type, _AT_ONCE_ELSEWHERE)
