"""Which classes go to which leaf, for every row of a comparison that has leaves.

Shapes: V classes, L leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sigmabranch.errors import ConfigError
from sigmabranch.report import style
from sigmabranch.report.compared import Compared, Entry
from sigmabranch.report.style import house_style

_MAPS = 5  # beside each other


@house_style()
def leaf_maps(compared: Compared) -> Figure:
    """Which share of each class each leaf receives, row by row, for the first seed.

    Raises:
        ConfigError: no row has such shares.
    """
    entries = [entry for entry in compared.entries if entry.routing]
    if not entries:
        raise ConfigError("no row of the comparison routes inputs to leaves: nothing to draw")
    columns = min(len(entries), _MAPS)
    rows = math.ceil(len(entries) / columns)
    figure = style.canvas(
        max(2.05 * columns, 6.2),
        0.75 + 2.75 * rows,
        "Which classes go to which leaf",
        "One line per class, in each map sorted by main leaf. Steps: sorted by class; blur: not.",
    )
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)  # type: ignore
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, (axes, entry) in enumerate(zip(grid, entries, strict=False)):
        _leaf_map(axes, entry, f"map{number}")
    for axes in grid[len(entries) :]:
        axes.set_axis_off()
    return figure


def _leaf_map(axes: Axes, entry: Entry, name: str) -> None:
    """``name`` tells the map from an equal one: an SVG would call both by their content."""
    routing = entry.routing or {}
    share_VL = np.asarray(routing["class_leaf_share"], dtype=float)
    classes, leaves = share_VL.shape
    order = np.lexsort((-share_VL.max(axis=1), share_VL.argmax(axis=1)))
    # The share is the opacity, so that an empty cell is the paper, be it light or dark.
    picture = np.empty((classes, leaves, 4))
    picture[..., :3] = [to_rgb(colour) for colour in style.leaf_colours(leaves)]
    picture[..., 3] = share_VL[order].clip(0, 1)
    axes.imshow(picture, aspect="auto", interpolation="nearest", gid=name)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for edge in range(1, leaves):
        axes.axvline(edge - 0.5, color=style.PAPER, linewidth=1.5)
    axes.tick_params(length=0)
    axes.set_yticks([])
    names = routing.get("leaves") or range(leaves)
    axes.set_xticks(range(leaves), [str(name) for name in names], fontsize=7 if leaves > 4 else 8)
    axes.set_title(entry.name, fontsize=9, pad=18)
    axes.text(0, 1.02, _routed(routing), transform=axes.transAxes, color=style.MUTED, fontsize=8)


def _routed(routing: Mapping[str, Any]) -> str:
    """What the routing of one row comes to, in a few words."""
    parts = []
    if routing.get("balance") is not None:
        parts.append(f"balance {routing['balance']:.2f}")
    if routing.get("routing_gain") is not None:
        parts.append(f"gain {routing['routing_gain']:+.1f}".replace("-", "\N{MINUS SIGN}"))
    return ", ".join(parts)
