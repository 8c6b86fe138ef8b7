"""The tree as a river: boxes for what each node holds, bands for how many inputs pass.

It flows from left to right, one column per level. A leaf above the last level runs the remaining
stages itself, so its box reaches through their columns. Lengths are inches: the axes are scaled so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from sigmabranch.report import style
from sigmabranch.report.style import house_style
from sigmabranch.report.tables import short
from sigmabranch.tree import is_shared

_BOX_WIDTH, _BOX_HEIGHT = 1.62, 0.72
_COLUMN, _ROW = 2.62, 0.92
_HEADER = 0.62
_BAND = 0.62  # thickness of a band that all inputs pass


@house_style()
def tree_figure(cost: Mapping[str, Any], usage: Mapping[str, float] | None = None) -> Figure:
    """Every node with its width, parameters and share of the inputs.

    Args:
        cost: with ``nodes`` (rows of ``node``, ``width``, ``params``) and ``net``.
        usage: leaf key → fraction of the inputs it takes; equal parts at every router if None.
    """
    river = _River(cost["nodes"], usage)
    width = river.depth * _COLUMN + _BOX_WIDTH + 0.5
    height = len(river.leaves) * _ROW + 0.15
    net = cost["net"]
    figure = style.canvas(
        width,
        height + _HEADER,
        "The tree",
        f"One input runs one path: {short(net['active_params'])} of "
        f"{short(net['total_params'])} parameters. "
        + ("Bands: share of the inputs." if usage else "Bands: equal shares, not measured."),
    )
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, height / (height + _HEADER)))
    axes.set(xlim=(-0.25, width - 0.25), ylim=(0.075 - height, 0.075))
    style.bare(axes)
    for key in river.rows:
        river.draw_bands(axes, key)
    for key in river.rows:
        river.draw_box(axes, key)
    return figure


class _River:
    """Where each node lies, and how much flows through it."""

    def __init__(self, rows: Any, usage: Mapping[str, float] | None) -> None:
        # What siblings share is no place that an input comes to.
        self.rows = {row["node"]: row for row in rows if not is_shared(row["node"])}
        self.usage = usage
        self.leaves = sorted(
            (key for key in self.rows if not self.children(key)),
            key=lambda key: [int(branch) for branch in key.split("-")],
        )
        self.depth = max(map(_level, self.leaves))
        self.leaf_colours = style.leaf_colours(len(self.leaves))

    def children(self, key: str) -> list[str]:
        return [child for child in self.rows if child != "root" and _parent(child) == key]

    def under(self, key: str) -> list[int]:
        """Positions of the leaves at or below ``key``."""
        return [
            position
            for position, leaf in enumerate(self.leaves)
            if key == "root" or f"{leaf}-".startswith(f"{key}-")
        ]

    def middle(self, key: str) -> float:
        """Height of the node's centre: between its leaves."""
        rows = self.under(key)
        return -_ROW * (sum(rows) / len(rows) + 0.5)

    def share(self, key: str) -> float:
        if self.usage is None:
            above = _parent(key)
            return 1.0 if key == "root" else self.share(above) / len(self.children(above))
        return sum(self.usage[self.leaves[position]] for position in self.under(key))

    def colour(self, key: str) -> str:
        """A leaf's own; for a node above, its branch's; grey for the trunk."""
        if key in self.leaves:
            return self.leaf_colours[self.leaves.index(key)]
        return style.DENSE if key == "root" else style.branch_colour(int(key.partition("-")[0]))

    def draw_bands(self, axes: Axes, key: str) -> None:
        """From the node's right edge, stacked, to the left edge of each child."""
        left = _level(key) * _COLUMN + _BOX_WIDTH
        top = self.middle(key) + _BAND * self.share(key) / 2
        for child in self.children(key):
            thickness = _BAND * self.share(child)
            target = self.middle(child) + thickness / 2
            outline = _ribbon((left, top), (_level(child) * _COLUMN, target), thickness)
            axes.add_patch(PathPatch(outline, color=self.colour(child), alpha=0.55, linewidth=0.6))
            top -= thickness

    def draw_box(self, axes: Axes, key: str) -> None:
        row, middle, colour = self.rows[key], self.middle(key), self.colour(key)
        left = _level(key) * _COLUMN
        last = self.depth if key in self.leaves else _level(key)
        right = last * _COLUMN + _BOX_WIDTH
        for face, edge, line in (
            (style.PAPER, "none", 0.0),  # under the tint, so that no band shines through
            (to_rgba(colour, 0.12), colour, 1.3),
        ):
            axes.add_patch(
                FancyBboxPatch(
                    (left, middle - _BOX_HEIGHT / 2),
                    right - left,
                    _BOX_HEIGHT,
                    boxstyle="round,pad=0,rounding_size=0.08",
                    facecolor=face,
                    edgecolor=edge,
                    linewidth=line,
                )
            )
        name = "trunk" if key == "root" else key
        channels = f"{row['width']:,} channels" if row["width"] else ""
        x, y = left + 0.12, middle + 0.19
        axes.text(x, y, name, va="center", fontweight="bold", fontsize=10)
        axes.text(x, y - 0.21, channels, va="center", fontsize=8.5)
        params = f"{short(row['params'])} params"
        axes.text(x, y - 0.39, params, va="center", fontsize=8.5, color=style.MUTED)
        if self.usage is not None:
            share = self.share(key)
            text = "<1%" if 0 < share < 0.005 else f"{share:.0%}"
            axes.text(right - 0.12, y, text, ha="right", va="center", color=style.MUTED)


def _ribbon(start: tuple[float, float], stop: tuple[float, float], thickness: float) -> Path:
    """A smooth band between two upper corners."""
    (x0, y0), (x1, y1) = start, stop
    bend = (x0 + x1) / 2
    upper = [(x0, y0), (bend, y0), (bend, y1), (x1, y1)]
    lower = [(x, y - thickness) for x, y in reversed(upper)]
    curve = [Path.CURVE4] * 3
    codes = [Path.MOVETO, *curve, Path.LINETO, *curve, Path.CLOSEPOLY]
    return Path([*upper, *lower, upper[0]], codes)


def _parent(key: str) -> str:
    return key.rpartition("-")[0] or "root"


def _level(key: str) -> int:
    return 0 if key == "root" else key.count("-") + 1
