"""Procedural point clouds: twelve solids of random proportions, without a download.

A solid is a list of grids: each the corners of a curved sheet of quadrilaterals, z upwards.

N clouds, P points, M points of a curve, U and V corners of a grid, T triangles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from sigmabranch.data.augment import ScaleShiftDrop
from sigmabranch.data.clouds import POINTS, arrange, unchanged
from sigmabranch.data.seeds import derive_seed
from sigmabranch.data.split import Dataset, ResidentSplit

TRAIN_CLOUDS, TEST_CLOUDS = 100, 50  # of each class
SEED = 0
# Deviation of a point from the surface, in radii of the cloud.
NOISE = 0.02
GREATEST_TILT = math.radians(15)
_ROUND = 48  # corners that stand for a circle

Solid = list[np.ndarray]
Maker = Callable[[np.random.Generator], Solid]


def open_shapes(device: torch.device | str) -> Dataset:
    """Twelve kinds of solids, 1,024 points each: 1,200 clouds to train, 600 to test.

    Points lie evenly over the surface, with Gaussian noise. The solid is turned about the vertical
    by any angle and tilted by up to 15 degrees. Some kinds blend into one another: a sphere is
    nearly an ellipsoid, a disc a flat cylinder.
    """

    def split(number: int, count: int) -> ResidentSplit:
        clouds = [
            sample_cloud(make, derive_seed(SEED, number, kind, sample))
            for kind, make in enumerate(SOLIDS.values())
            for sample in range(count)
        ]
        return ResidentSplit(
            inputs=arrange(torch.from_numpy(np.stack(clouds)), device),
            labels=torch.arange(len(SOLIDS), device=device).repeat_interleave(count),
            augment=ScaleShiftDrop(),
            normalise=unchanged,
        )

    return Dataset(
        name="shapes",
        train=split(0, TRAIN_CLOUDS),
        test=split(1, TEST_CLOUDS),
        class_names=tuple(SOLIDS),
        shape=(POINTS, 3),
    )


def sample_cloud(make: Maker, seed: int) -> np.ndarray:
    """(P, 3) float32 noisy points of one solid, the same for every call with this seed."""
    rng = np.random.default_rng(seed)
    surface = np.concatenate([triangles(grid) for grid in make(rng)])
    points = sample_surface(surface, POINTS, rng)
    points -= points.mean(0)
    points /= np.linalg.norm(points, axis=1).max()
    points += NOISE * rng.standard_normal(points.shape)
    return (points @ random_pose(rng).T).astype(np.float32)


def triangles(grid_UV3: np.ndarray) -> np.ndarray:
    """(T, 3, 3) corners of the triangles into which a grid's quadrilaterals fall."""
    a, b = grid_UV3[:-1, :-1], grid_UV3[:-1, 1:]
    c, d = grid_UV3[1:, :-1], grid_UV3[1:, 1:]
    halves = (np.stack([a, b, c], axis=2), np.stack([b, d, c], axis=2))
    return np.concatenate([half.reshape(-1, 3, 3) for half in halves])


def sample_surface(triangles_T33: np.ndarray, points: int, rng: np.random.Generator) -> np.ndarray:
    """(P, 3) points, evenly over the area of the triangles."""
    corner, edge, other = np.moveaxis(triangles_T33, 1, 0).copy()
    edge -= corner
    other -= corner
    area = np.linalg.norm(np.cross(edge, other), axis=1).cumsum()
    chosen = np.searchsorted(area, rng.random(points) * area[-1], side="right")
    along, across = rng.random((2, points, 1))
    # A point of the parallelogram's far half is mirrored into the triangle.
    far = along + across > 1
    along, across = np.where(far, 1 - along, along), np.where(far, 1 - across, across)
    return corner[chosen] + along * edge[chosen] + across * other[chosen]


def random_pose(rng: np.random.Generator) -> np.ndarray:
    """A rotation by any angle about the vertical, then a small one about a horizontal axis."""
    turn, towards = rng.uniform(0, 2 * math.pi, 2)
    tilt = rng.uniform(0, GREATEST_TILT)
    about_x = np.array(
        [
            [1, 0, 0],
            [0, math.cos(tilt), -math.sin(tilt)],
            [0, math.sin(tilt), math.cos(tilt)],
        ]
    )
    return _about_z(towards) @ about_x @ _about_z(turn - towards)


def _about_z(angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def revolve(profile: Sequence[tuple[float, float]] | np.ndarray, sides: int = _ROUND) -> np.ndarray:
    """The (M, sides + 1, 3) grid of an (M, 2) curve of radius and height about the vertical.

    With four sides the cross-section is a square along the axes.
    """
    radius_M1, height_M1 = np.split(np.asarray(profile, float), 2, axis=1)
    angle_V = (np.arange(sides + 1) + 0.5) * (2 * math.pi / sides)
    x, y = radius_M1 * np.cos(angle_V), radius_M1 * np.sin(angle_V)
    return np.stack([x, y, np.broadcast_to(height_M1, x.shape)], axis=2)


def arc(start: float, stop: float, radius: float = 1.0) -> np.ndarray:
    """(M, 2) points of a circle between two angles in quarter turns."""
    angle_M = np.linspace(start, stop, _ROUND // 2) * (math.pi / 2)
    return radius * np.stack([np.cos(angle_M), np.sin(angle_M)], axis=1)


def _sphere(rng: np.random.Generator) -> Solid:
    return [revolve(arc(-1, 1)) * rng.uniform(0.94, 1.06, 3)]


def _ellipsoid(rng: np.random.Generator) -> Solid:
    axes = rng.uniform((0.45, 0.6, 1.0), (0.75, 1.0, 1.0))
    return [revolve(arc(-1, 1)) * rng.permutation(axes)]


def _capsule(rng: np.random.Generator) -> Solid:
    half = (0, rng.uniform(0.3, 1.0))
    return [revolve(np.concatenate([arc(-1, 0) - half, arc(0, 1) + half]))]


def _cylinder(rng: np.random.Generator) -> Solid:
    return [revolve(_barrel(rng.uniform(0.35, 1.8)))]


def _disc(rng: np.random.Generator) -> Solid:
    return [revolve(_barrel(rng.uniform(0.08, 0.4)))]


def _box(rng: np.random.Generator) -> Solid:
    return [revolve(_barrel(0.7), sides=4) * rng.uniform(0.4, 1.0, 3)]


def _cone(rng: np.random.Generator) -> Solid:
    return [revolve(_spire(rng.uniform(0.5, 1.3)))]


def _pyramid(rng: np.random.Generator) -> Solid:
    return [revolve(_spire(rng.uniform(0.5, 1.3)), sides=4) * rng.uniform(0.75, 1.0, 3)]


def _tetrahedron(rng: np.random.Generator) -> Solid:
    return [revolve(_spire(rng.uniform(0.5, 1.0)), sides=3) * rng.uniform(0.8, 1.0, 3)]


def _torus(rng: np.random.Generator) -> Solid:
    return [revolve(np.array([1, 0]) + arc(0, 4, rng.uniform(0.15, 0.5)))]


def _spring(rng: np.random.Generator) -> Solid:
    """A tube along a helix; its loops may touch, so that it may look like a torus."""
    turns, wire, rise = rng.uniform(1.2, 4), rng.uniform(0.12, 0.3), rng.uniform(0.3, 0.7)
    turn_U1 = np.linspace(0, turns, math.ceil(_ROUND * turns))[:, None]
    out_V, up_V = arc(0, 4, wire).T
    angle_U1 = 2 * math.pi * turn_U1
    grid = [(1 + out_V) * np.cos(angle_U1), (1 + out_V) * np.sin(angle_U1), rise * turn_U1 + up_V]
    return [np.stack(grid, axis=2)]


def _angle(rng: np.random.Generator) -> Solid:
    """A bar with the cross-section of an L."""
    foot, stem, half = rng.uniform(0.2, 0.6, 3)
    height = rng.uniform(0.6, 1.0)
    outline = [(0, 0), (1, 0), (1, foot), (stem, foot), (stem, height), (0, height), (0, 0)]
    walls = np.array([[(x, y, z) for x, z in outline] for y in (-half, half)])
    caps = [
        np.array([[(left, y, low), (right, y, low)], [(left, y, high), (right, y, high)]])
        for y in (-half, half)
        for left, right, low, high in ((0, 1, 0, foot), (0, stem, foot, height))
    ]
    return [walls, *caps]


def _barrel(half: float) -> list[tuple[float, float]]:
    return [(0, -half), (1, -half), (1, half), (0, half)]


def _spire(half: float) -> list[tuple[float, float]]:
    return [(0, -half), (1, -half), (0, half)]


SOLIDS: dict[str, Maker] = {
    "sphere": _sphere,
    "ellipsoid": _ellipsoid,
    "capsule": _capsule,
    "cylinder": _cylinder,
    "disc": _disc,
    "box": _box,
    "cone": _cone,
    "pyramid": _pyramid,
    "tetrahedron": _tetrahedron,
    "torus": _torus,
    "spring": _spring,
    "angle": _angle,
}
