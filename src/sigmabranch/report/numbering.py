"""Numbers beside the points of a plot, so that none hides another, however the points crowd.

A point that stands alone has its number in the nearest free place. Points in a heap have theirs in
a column at either side, in the order of their heights, so that the lines to them do not cross.
Lengths are typographic points.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import permutations
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes

from sigmabranch.report import style

Place: TypeAlias = tuple[float, float]

_HEAP = 3  # points make one
_REACH = (17.0, 11.0)  # within which two points belong together
_DOT = 4.0
_NUMBER = (6.5, 9.0)  # half a width, a height
_RINGS = (11.0, 14.0, 19.0, 25.0, 32.0, 40.0)
# Left first, where no bar starts, then right; straight up and down, into the error bars, last.
_DIRECTIONS = sorted(
    ((math.cos(turn), math.sin(turn)) for turn in np.linspace(0, 2 * math.pi, 16, endpoint=False)),
    key=lambda direction: (round(abs(direction[1]), 6), direction[0]),
)
_ASIDE = 20.0


def number_points(plot: Axes, points: Mapping[int, Place]) -> None:
    """Write each number beside its point, in a figure whose layout is final.

    Args:
        plot: with its limits set.
        points: number → data coordinates.
    """
    pixel = 72 / plot.figure.dpi
    at = {number: tuple(plot.transData.transform(xy) * pixel) for number, xy in points.items()}
    for number, (x, y) in place_numbers(at, plot.bbox.get_points() * pixel).items():
        dx, dy = x - at[number][0], y - at[number][1]
        line = {"arrowstyle": "-", "color": style.MUTED, "linewidth": 0.5, "shrinkA": 1,
                "shrinkB": 3}  # fmt: skip
        plot.annotate(
            str(number),
            points[number],
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            zorder=4,
            bbox={"facecolor": style.PAPER, "edgecolor": "none", "pad": 0.8},
            arrowprops=line if math.hypot(dx, dy) > _RINGS[1] else None,
        )


def place_numbers(at: Mapping[int, Place], corners: np.ndarray) -> dict[int, Place]:
    """Where each number goes.

    Args:
        at: number → its point.
        corners: (2, 2), of the plot.
    """
    heaps = _heaps(at, corners)
    placed: dict[int, Place] = {}
    for heap in heaps:
        if len(heap) >= _HEAP:
            placed |= _columns(heap, at, corners)
    for heap in heaps:
        if len(heap) < _HEAP:
            for number in heap:
                placed[number] = _near(at[number], at.values(), placed.values(), corners)
    return placed


def _heaps(at: Mapping[int, Place], corners: np.ndarray) -> list[list[int]]:
    """Numbers whose points hang together, joined until no heap's columns meet another heap."""
    heaps = list(_hanging_together(at))
    while pair := _meeting(heaps, at, corners):
        one, other = sorted(pair)
        heaps[one] += heaps.pop(other)
    return heaps


def _meeting(
    heaps: Sequence[Sequence[int]], at: Mapping[int, Place], corners: np.ndarray
) -> tuple[int, int] | None:
    """Two heaps of which the first one's columns hide a point or a number of the second."""
    columns = [_columns(heap, at, corners).values() if len(heap) >= _HEAP else () for heap in heaps]
    for one, other in permutations(range(len(heaps)), 2):
        dots = [at[number] for number in heaps[other]]
        if any(_hides(place, columns[other], dots) for place in columns[one]):
            return one, other
    return None


def _hides(place: Place, numbers: Collection[Place], dots: Collection[Place]) -> bool:
    """Whether a number at ``place`` would lie on one of ``numbers`` or of the points ``dots``."""
    width, height = _NUMBER
    return any(_touch(place, other, 2 * width, height) for other in numbers) or any(
        _touch(place, dot, width + _DOT, height / 2 + _DOT) for dot in dots
    )


def _hanging_together(at: Mapping[int, Place]) -> Iterator[list[int]]:
    left = list(at)
    while left:
        heap = [left.pop(0)]
        for number in heap:  # grows while it is walked through
            near = [n for n in left if _touch(at[n], at[number], *_REACH)]
            heap += near
            left = [n for n in left if n not in near]
        yield heap


def _touch(one: Place, other: Place, width: float, height: float) -> bool:
    return abs(one[0] - other[0]) < width and abs(one[1] - other[1]) < height


def _columns(heap: Sequence[int], at: Mapping[int, Place], corners: np.ndarray) -> dict[int, Place]:
    """Left and right of a heap, by turns from the lowest point up."""
    upwards = sorted(heap, key=lambda number: (at[number][1], number))
    (low_x, low_y), (high_x, high_y) = corners
    sides = {
        min(max(at[n][0] for n in heap) + _ASIDE, high_x - _NUMBER[0]): upwards[::2],
        max(min(at[n][0] for n in heap) - _ASIDE, low_x + _NUMBER[0]): upwards[1::2],
    }
    return {
        number: (x, y)
        for x, numbers in sides.items()
        for number, y in zip(
            numbers,
            _spread([at[n][1] for n in numbers], low_y + _NUMBER[1] / 2, high_y - _NUMBER[1] / 2),
            strict=True,
        )
    }


def _spread(heights: Sequence[float], low: float, high: float) -> list[float]:
    """Rising heights moved as little as possible until a number fits between any two.

    Without the gaps this is isotonic regression, solved by pooling what violates the order.
    """
    gap = _NUMBER[1] + 0.5
    pools: list[list[float]] = []  # of heights less the gaps below them
    for place, height in enumerate(heights):
        pools.append([height - gap * place])
        while len(pools) > 1 and np.mean(pools[-2]) >= np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    level = [float(np.mean(pool)) for pool in pools for _ in pool]
    highest = max(high - gap * (len(heights) - 1), low)
    return [min(max(y, low), highest) + gap * place for place, y in enumerate(level)]


def _near(
    point: Place, dots: Collection[Place], numbers: Collection[Place], corners: np.ndarray
) -> Place:
    """The nearest place around a point that hides nothing; the last one tried if there is none."""
    width, height = _NUMBER
    (low_x, low_y), (high_x, high_y) = corners
    place = point
    for ring in _RINGS:
        for right, up in _DIRECTIONS:
            place = (point[0] + ring * right, point[1] + ring * up)
            inside = low_x + width < place[0] < high_x and low_y + height < place[1] < high_y
            if inside and not _hides(place, numbers, dots):
                return place
    return place
