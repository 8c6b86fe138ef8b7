"""The tree as a river: boxes for what each node holds, bands for how many inputs pass.

It flows from left to right, one column per level. A leaf above the last level runs the remaining
stages itself, so its box reaches through their columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from sigmabranch.report import style
from sigmabranch.report.style import house_style

_BOX = 1.62  # inches, as are all sizes below: the axes are scaled so
_GAP = 1.0
_ROW = 0.92
_BOX_HEIGHT = 0.72
_BAND = 0.62  # thickness of a band that all inputs pass


@house_style()
def tree_figure(cost: Mapping[str, Any], usage: Mapping[str, float] | None = None) -> Figure:
    """Every node with its width, parameters and share of the inputs.

    Args:
        cost: with ``nodes``, rows of ``node``, ``width``, ``params``, ``macs``.
        usage: leaf key → fraction of the inputs it takes; equal thickness if None.
    """
    rows = {row["node"]: row for row in cost["nodes"]}
    leaves = [key for key in rows if not _children(key, rows)]
    leaves.sort(key=lambda key: [int(branch) for branch in key.split("-")])
    depth = max(len(leaf.split("-")) for leaf in leaves)
    tint = dict(zip(leaves, style.leaf_colours(len(leaves)), strict=True))
    width = (depth + 1) * _BOX + depth * _GAP + 0.5
    height = len(leaves) * _ROW + 0.15
    paths = cost["net"]
    figure = style.canvas(
        width,
        height + 0.62,
        "The tree",
        f"One input runs one path: {_short(paths['active_params'])} of "
        f"{_short(paths['total_params'])} parameters. Bands: share of the inputs.",
    )
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, height / (height + 0.62)))
    axes.set(xlim=(-0.25, width - 0.25), ylim=(-height + 0.075, 0.075))
    style.bare(axes)
    _draw(axes, "root", rows, leaves, tint, usage, depth)
    return figure


def _draw(
    axes: Axes,
    key: str,
    rows: Mapping[str, Mapping[str, Any]],
    leaves: Sequence[str],
    tint: Mapping[str, str],
    usage: Mapping[str, float] | None,
    depth: int,
) -> None:
    """Draw the subtree at ``key``: bands first, so that boxes lie on them."""
    level, y = _level(key), _height_of(key, leaves)
    left, right = _column(level), _column(level) + _BOX
    start = y + _BAND * _share(key, leaves, usage) / 2
    for child in _children(key, rows):
        thickness = _BAND * _share(child, leaves, usage)
        target = _height_of(child, leaves)
        _band(
            axes,
            (right, start),
            (_column(level + 1), target),
            thickness,
            _tint(child, leaves, tint),
        )
        start -= thickness
        _draw(axes, child, rows, leaves, tint, usage, depth)
    if key in leaves:
        right = _column(depth) + _BOX
    _box(axes, left, right, y, rows[key], _tint(key, leaves, tint))
    if usage is not None:
        share = _share(key, leaves, usage)
        text = "<1%" if 0 < share < 0.01 else f"{share:.0%}"
        axes.text(right - 0.12, y + 0.19, text, ha="right", va="center", color=style.MUTED)


def _box(
    axes: Axes, left: float, right: float, y: float, row: Mapping[str, Any], colour: str
) -> None:
    shape = (left, y - _BOX_HEIGHT / 2), right - left, _BOX_HEIGHT
    rounded = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(*shape, boxstyle=rounded, facecolor=style.PAPER, linewidth=0))
    axes.add_patch(
        FancyBboxPatch(
            *shape,
            boxstyle=rounded,
            facecolor=to_rgba(colour, 0.12),
            edgecolor=colour,
            linewidth=1.3,
        )
    )
    name = "trunk" if row["node"] == "root" else row["node"]
    for offset, text, look in (
        (0.19, name, {"fontweight": "bold", "fontsize": 10}),
        (-0.02, f"{row['width']:,} channels", {"fontsize": 8.5}),
        (-0.2, f"{_short(row['params'])} params", {"fontsize": 8.5, "color": style.MUTED}),
    ):
        axes.text(left + 0.12, y + offset, text, va="center", **look)


def _band(
    axes: Axes,
    start: tuple[float, float],
    stop: tuple[float, float],
    thickness: float,
    colour: str,
) -> None:
    """A smooth ribbon from the upper edge ``start`` to one centred at ``stop``."""
    (x0, top0), (x1, middle) = start, stop
    top1, bend = middle + thickness / 2, (x0 + x1) / 2
    outline = [
        (x0, top0),
        (bend, top0),
        (bend, top1),
        (x1, top1),
        (x1, top1 - thickness),
        (bend, top1 - thickness),
        (bend, top0 - thickness),
        (x0, top0 - thickness),
        (x0, top0),
    ]
    curve = [Path.CURVE4] * 3
    codes = [Path.MOVETO, *curve, Path.LINETO, *curve, Path.CLOSEPOLY]
    axes.add_patch(
        PathPatch(
            Path(outline, codes), facecolor=colour, alpha=0.55, linewidth=0.6, edgecolor=colour
        )
    )


def _children(key: str, rows: Mapping[str, Any]) -> list[str]:
    prefix = "" if key == "root" else f"{key}-"
    return [child for child in (f"{prefix}0", f"{prefix}1") if child in rows]


def _level(key: str) -> int:
    return 0 if key == "root" else len(key.split("-"))


def _column(level: int) -> float:
    return level * (_BOX + _GAP)


def _under(key: str, leaves: Sequence[str]) -> list[int]:
    """Positions of the leaves at or below ``key``."""
    inside = key == "root"
    return [i for i, leaf in enumerate(leaves) if inside or f"{leaf}-".startswith(f"{key}-")]


def _height_of(key: str, leaves: Sequence[str]) -> float:
    rows = _under(key, leaves)
    return -_ROW * (sum(rows) / len(rows) + 0.5)


def _share(key: str, leaves: Sequence[str], usage: Mapping[str, float] | None) -> float:
    if usage is None:
        return 0.5 ** _level(key)
    return sum(usage[leaves[row]] for row in _under(key, leaves))


def _tint(key: str, leaves: Sequence[str], tint: Mapping[str, str]) -> str:
    """A leaf's own colour; for a node above, its branch's; grey for the trunk."""
    if key == "root":
        return style.DENSE
    return tint[key] if key in tint else style.BRANCH[int(key.split("-")[0])]


def _short(count: float) -> str:
    """1,234,567 → "1.23 M"."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:,.0f}"
