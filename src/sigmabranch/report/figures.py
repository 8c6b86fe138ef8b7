"""The four pictures of a branched network, drawn from plain dictionaries.

:func:`channel_partition` is the paper's Fig. 2 and :func:`class_leaf_map` its Fig. 3;
:func:`training_curves` and :func:`~sigmabranch.report.tree_figure.tree_figure` are ours. Each
returns a matplotlib figure; :func:`~sigmabranch.report.style.save_figure` writes it.

Shapes: C channels of the dense stage, V classes, L leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sigmabranch.errors import ConfigError
from sigmabranch.report import style
from sigmabranch.report.style import house_style

_RASTER_ABOVE = 600  # points; beyond, an SVG with one element each would be slow to open
_NAMED_CLASSES = 130  # more rows than this cannot carry a name each
_ROWS_PER_BLOCK = 25
_LABELLED_LEAVES = 8  # more columns than this are too narrow for a number in each cell


@house_style()
def channel_partition(record: Mapping[str, Any]) -> Figure:
    """Which dense channels each branch keeps, against the clusters' mean activations (Fig. 2).

    One panel per router: a dot is a channel of the dense stage, its coordinates the mean activation
    over the samples of cluster 0 and of cluster 1, its colour who holds it.

    Args:
        record: conversion record, with ``splits`` (``channel_mean``: stage → (2, C)) and ``nodes``.

    Raises:
        ConfigError: the record holds no channel means.
    """
    splits = {key: split for key, split in record["splits"].items() if split["channel_mean"]}
    if not splits:
        raise ConfigError("the conversion record holds no channel means: convert again to draw it")
    columns = min(len(splits), 3)
    rows = math.ceil(len(splits) / columns)
    figure = style.canvas(
        max(3.5 * columns, 4.6),
        0.95 + 3.75 * rows,
        "Which channels go where",
        "Each dot is a channel of the dense network; its colour says who keeps it.",
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (key, split) in zip(grid, splits.items(), strict=False):
        _partition_panel(axes, key, split, record["nodes"])
    for axes in grid[len(splits) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=5 if columns > 1 else 3,
        markerscale=1.6,
        handletextpad=0.2,
        columnspacing=1.6,
    )
    return figure


def _partition_panel(
    axes: Axes, key: str, split: Mapping[str, Any], nodes: Mapping[str, Any]
) -> None:
    branches = [f"{key}-{branch}" if key != "root" else str(branch) for branch in (0, 1)]
    # A leaf above the last level holds several stages; the split was made on its first.
    pair = [nodes[branch][0] for branch in branches]
    mean_KC = np.asarray(split["channel_mean"][pair[0]["stage"]], dtype=float)
    count = mean_KC.shape[1]
    size = float(np.clip(7000 / count, 4, 26))
    for label, colour, members in _holders(count, pair):
        axes.scatter(
            mean_KC[0, members],
            mean_KC[1, members],
            s=size * (0.7 if label == "dropped" else 1),
            color=colour,
            alpha=0.75,
            linewidths=0,
            label=label,
            rasterized=count > _RASTER_ABOVE,
        )
    low, high = min(0.0, mean_KC.min()), mean_KC.max() * 1.06
    axes.plot([low, high], [low, high], color=style.MUTED, linewidth=0.8, dashes=(4, 3), zorder=0)
    if low == 0:  # activations after a ReLU crowd near zero; a root scale spreads them
        axes.set_xscale("function", functions=(_signed_root, _signed_square))
        axes.set_yscale("function", functions=(_signed_root, _signed_square))
        ticks = [tick for tick in _round_ticks(high) if tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    place = "after the trunk" if key == "root" else f"inside branch {key}"
    axes.set_title(f"{pair[0]['stage']}, {place}", pad=20)
    share = [size / max(sum(split["sizes"]), 1) for size in split["sizes"]]
    axes.text(
        0,
        1.025,
        f"{count:,} channels · clusters {share[0]:.0%} / {share[1]:.0%}",
        transform=axes.transAxes,
        color=style.MUTED,
        fontsize=8.5,
    )
    axes.set_xlabel(f"mean activation, cluster {branches[0]}", color=style.BRANCH[0])
    axes.set_ylabel(f"mean activation, cluster {branches[1]}", color=style.BRANCH[1])


def _holders(count: int, pair: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, np.ndarray]]:
    """(label, colour, channel indices) from those nobody keeps to those both keep."""
    shared = np.zeros(count, bool)
    shared[pair[0]["shared"]] = True
    kept = np.zeros((2, count), bool)
    for held, node in zip(kept, pair, strict=True):
        held[node["kept"]] = True
    only = kept & ~shared
    masks = [
        ("dropped", style.DROPPED, ~kept.any(axis=0)),
        ("shared by choice", style.SHARED, shared),
        ("branch 0 only", style.BRANCH[0], only[0] & ~only[1]),
        ("branch 1 only", style.BRANCH[1], only[1] & ~only[0]),
        ("picked by both", style.BOTH, only[0] & only[1]),
    ]
    return [(label, colour, mask.nonzero()[0]) for label, colour, mask in masks]


def _signed_root(value: np.ndarray) -> np.ndarray:
    return np.sign(value) * np.sqrt(np.abs(value))


def _signed_square(value: np.ndarray) -> np.ndarray:
    return np.sign(value) * value**2


def _round_ticks(high: float) -> list[float]:
    """0 and round numbers about evenly spaced on a root scale up to ``high``."""
    ticks = [0.0]
    for fraction in (0.06, 0.25, 0.56, 1.0):
        power = 10.0 ** math.floor(math.log10(high * fraction))
        ticks.append(max(s * power for s in (1, 2, 3, 4, 5, 6, 8) if s * power <= high * fraction))
    return sorted(set(ticks))


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
            axes.set_yticks(range(len(rows)), [names[row] for row in rows], color=style.INK)
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
            ink = style.ink_on(picture[row, leaf, :3]) if share > 0.55 else style.INK
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


@house_style()
def training_curves(
    dense: Sequence[Mapping[str, Any]],
    finetune: Sequence[Mapping[str, Any]],
    *,
    leaves: int,
    dense_top1: float | None = None,
) -> Figure:
    """Dense training and fine-tuning on one epoch axis, and what the routing did meanwhile.

    Args:
        dense: history of the dense training; may be empty.
        finetune: history of the fine-tuning; keys that a row lacks are skipped.
        leaves: number of leaves; 1/leaves is the mean max P of a router that knows nothing.
        dense_top1: percent; drawn as the line to reach.
    """
    figure = style.canvas(
        9.6,
        6.4,
        "Training",
        "Grey: the dense network. Blue: the branched one, after the cut (dotted line).",
    )
    figure.get_layout_engine().set(hspace=0.05, h_pad=0.08, wspace=0.04)
    (loss, accuracy), (routing, gain) = figure.subplots(2, 2)
    start = max((row["epoch"] for row in dense), default=0)
    new = style.BRANCH[0]
    _line(loss, dense, "loss", style.DENSE, "dense")
    _line(loss, finetune, "loss", new, "branched, total", start)
    _line(loss, finetune, "cls", new, "branched, classification", start, dashes=(3, 2))
    _line(loss, finetune, "resp", style.BRANCH[1], "responsibility", start, dashes=(3, 2))
    loss.set(title="Loss", ylim=(0, None))

    _line(accuracy, dense, "train_top1", style.DENSE, "dense, train", dashes=(1, 1.5))
    _line(accuracy, dense, "top1", style.DENSE, "dense, test")
    _line(accuracy, finetune, "train_top1", new, "branched, train", start, dashes=(1, 1.5))
    _line(accuracy, finetune, "top1", new, "branched, one path", start)
    _line(accuracy, finetune, "soft_top1", style.BOTH, "branched, all leaves", start, dashes=(3, 2))
    if dense_top1 is not None:
        _level(accuracy, dense_top1, f"dense {dense_top1:.2f}%")
    accuracy.set(title="Top-1 accuracy, %")

    _line(routing, finetune, "mean_max_p", new, "mean max P (how sure)", start)
    _line(routing, finetune, "agreement", style.BRANCH[1], "agreement of the leaves", start)
    _line(routing, finetune, "balance", style.SHARED, "balance of the leaves", start)
    _level(routing, 1 / leaves, "max P of a router that knows nothing")
    routing.set(title="Routing", ylim=(0, 1.03))

    _line(gain, finetune, "routing_gain", new, None, start)
    _level(gain, 0.0, "shuffled routes: routing decides nothing")
    gain.set(title="Routing gain, percentage points")
    for axes in (loss, accuracy, routing, gain):
        axes.grid(axis="x", visible=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if start and axes in (loss, accuracy) and finetune:
            axes.axvline(start, color=style.MUTED, linewidth=1, linestyle=":")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="best")
    for axes in (routing, gain):
        axes.set_xlabel("epoch")
    return figure


def _line(
    axes: Axes,
    history: Sequence[Mapping[str, Any]],
    key: str,
    colour: str,
    label: str | None,
    start: float = 0,
    dashes: tuple[float, ...] = (),
) -> None:
    rows = [row for row in history if isinstance(row.get(key), int | float)]
    if not rows:
        return
    (line,) = axes.plot(
        [start + row["epoch"] for row in rows],
        [row[key] for row in rows],
        color=colour,
        label=label,
        marker="o" if len(rows) < 12 else "",
        markersize=3.5,
    )
    if dashes:
        line.set_dashes(dashes)


def _level(axes: Axes, value: float, label: str) -> None:
    """A dashed reference line with its name on it."""
    axes.axhline(value, color=style.MUTED, linewidth=0.9, dashes=(4, 3), zorder=1)
    axes.annotate(
        label,
        (0.01, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        color=style.MUTED,
        fontsize=8,
    )
