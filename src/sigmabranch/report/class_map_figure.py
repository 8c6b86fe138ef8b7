"""Where the samples of each class go: the paper's Fig. 3.

Shapes: V classes, L leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sigmabranch.report import style
from sigmabranch.report.style import house_style

_NAMED_CLASSES = 130  # more rows than this cannot carry a name each
_ROWS_PER_BLOCK = 25
_LABELLED_LEAVES = 8  # more columns than this are too narrow for a number in each cell


@house_style()
def class_leaf_map(
    evaluation: Mapping[str, Any], class_names: Sequence[str] | None = None
) -> Figure:
    """Where the samples of each class go: a class × leaf heat map (Fig. 3).

    Rows are grouped by the leaf that takes most of the class, and sorted within by how much it
    takes, so that a tree that sorts classes shows steps and one that does not shows a blur. Up to
    130 classes are named, in side-by-side blocks; beyond that the groups are, with examples.

    Args:
        evaluation: with ``class_leaf_share`` (V, L), ``usage`` and ``leaves``.
        class_names: one per class; numbers if None.
    """
    share_VL = np.asarray(evaluation["class_leaf_share"], dtype=float)
    classes, leaves = share_VL.shape
    names = list(class_names or map(str, range(classes)))
    main_V = share_VL.argmax(axis=1)
    order = np.lexsort((-share_VL.max(axis=1), main_V))
    title = "Which classes go to which leaf"
    if classes > _NAMED_CLASSES:
        detail = "One line per class, grouped by main leaf; at the right the most typical."
        figure = style.canvas(7.2, 8.6, title, detail)
        panels = [figure.subplots(1, 1)]
    else:
        blocks = math.ceil(classes / _ROWS_PER_BLOCK)
        longest = max(map(len, names))
        figure = style.canvas(
            max(5.4, blocks * (0.6 + 0.065 * longest + 0.38 * leaves)),
            1.75 + 0.21 * math.ceil(classes / blocks),
            title,
            "Each class, under the leaf that takes most of it.",
        )
        panels = list(figure.subplots(1, blocks, squeeze=False)[0])
    for axes, rows in zip(panels, np.array_split(order, len(panels)), strict=True):
        _heat_block(axes, share_VL[rows], evaluation)
        if classes > _NAMED_CLASSES:
            _name_groups(axes, share_VL[rows], main_V[rows], [names[row] for row in rows])
        else:
            labels = [names[row] for row in rows]
            axes.set_yticks(range(len(rows)), labels, color=style.INK, parse_math=False)
    if classes > _NAMED_CLASSES or leaves > _LABELLED_LEAVES:
        _share_scale(figure)
    return figure


def _heat_block(axes: Axes, share_VL: np.ndarray, evaluation: Mapping[str, Any]) -> None:
    rows, leaves = share_VL.shape
    # The share is the opacity, so that an empty cell is the paper, be it light or dark.
    picture = np.empty((rows, leaves, 4))
    picture[..., :3] = [to_rgb(colour) for colour in style.leaf_colours(leaves)]
    picture[..., 3] = share_VL
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_xticks(
        range(leaves),
        [
            f"{leaf}\n{usage:.0%}"
            for leaf, usage in zip(evaluation["leaves"], evaluation["usage"], strict=True)
        ],
        color=style.INK,
    )
    for edge in range(1, leaves):
        axes.axvline(edge - 0.5, color=style.PAPER, linewidth=1.5)
    if rows > _ROWS_PER_BLOCK:
        return
    for edge in range(1, rows):
        axes.axhline(edge - 0.5, color=style.PAPER, linewidth=1.5)
    if leaves > _LABELLED_LEAVES:
        return
    for (row, leaf), share in np.ndenumerate(share_VL):
        if share >= 0.005:
            ink = style.ink_on(picture[row, leaf, :3].tolist(), share)
            axes.text(leaf, row, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=7)


def _name_groups(
    axes: Axes, share_VL: np.ndarray, main_V: np.ndarray, names: Sequence[str]
) -> None:
    """Beside the map: how many classes each leaf collects, and the most typical ones."""
    rows = len(main_V)
    axes.set_yticks([])
    for leaf in np.unique(main_V):
        members = (main_V == leaf).nonzero()[0]
        if len(members) < rows // 30:  # no room for a line of text
            continue
        middle = members.mean()
        axes.text(
            -0.02,
            1 - (middle + 0.5) / rows,
            f"{len(members)}\nclasses",
            transform=axes.transAxes,
            ha="right",
            va="center",
            color=style.MUTED,
        )
        room = len(members) * 45 // rows
        typical = [names[row].split(",")[0][:24] for row in members[: max(1, room - 1)]]
        axes.text(
            1.02,
            1 - (members[0] + 1) / rows,
            "\n".join(typical),
            transform=axes.transAxes,
            ha="left",
            va="top",
            fontsize=8,
            parse_math=False,  # names may hold dollar signs
        )


def _share_scale(figure: Figure) -> None:
    """A slim opacity legend in the header's right corner."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((1 - 1.3 / width, 1 - 0.26 / height, 1.2 / width, 0.11 / height))
    axes.set_in_layout(False)
    ramp = np.zeros((1, 64, 4))
    ramp[..., :3] = to_rgb(style.DENSE)
    ramp[..., 3] = np.linspace(0, 1, 64)
    axes.imshow(ramp, aspect="auto", extent=(0, 1, 0, 1))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    axes.set_xticks([0, 1], ["0%", "all of a class"], fontsize=7.5)
    axes.get_xticklabels()[1].set_horizontalalignment("right")
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.tick_params(length=0, pad=2)
