"""The pictures of a branched network, drawn from plain dictionaries.

:func:`channel_partition` is the paper's Fig. 2, :func:`class_leaf_map` its Fig. 3;
:func:`training_curves` and :func:`tree_figure` are ours. Each returns a matplotlib figure, which
:func:`save_figure` writes.

Shapes: C channels of the dense stage, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sigmabranch.errors import ConfigError
from sigmabranch.report import style
from sigmabranch.report.class_map_figure import class_leaf_map
from sigmabranch.report.style import house_style, save_figure
from sigmabranch.report.tree_figure import tree_figure

__all__ = [
    "channel_partition",
    "class_leaf_map",
    "save_figure",
    "training_curves",
    "tree_figure",
]

_RASTER_ABOVE = 600  # points; beyond, an SVG with one element each would be slow to open


@house_style()
def channel_partition(record: Mapping[str, Any]) -> Figure:
    """Which dense channels each branch keeps, against the clusters' mean activations (Fig. 2).

    One panel per router: a dot is a channel of the dense stage, its coordinates the mean activation
    over the samples of cluster 0 and of cluster 1, its colour who holds it. Of more than two
    clusters, the coordinates are the smallest and the largest mean.

    Args:
        record: conversion record, with ``splits`` (``channel_mean``: stage → (K, C)) and ``nodes``.

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
        "One dot per dense channel; its colour says who keeps it.",
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (key, split) in zip(grid, splits.items(), strict=False):
        _partition_panel(axes, key, split, record["nodes"])
    for axes in grid[len(splits) :]:
        axes.set_axis_off()
    named: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        list(named.values()),
        list(named),
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
    prefix = "" if key == "root" else f"{key}-"
    branches = [f"{prefix}{branch}" for branch in range(len(split["sizes"]))]
    # A leaf above the last level holds several stages; the split was made on its first.
    held = [nodes[branch][0] for branch in branches]
    mean_KC = np.asarray(split["channel_mean"][held[0]["stage"]], dtype=float)
    across_C, up_C = mean_KC if len(held) == 2 else (mean_KC.min(axis=0), mean_KC.max(axis=0))
    count = mean_KC.shape[1]
    size = float(np.clip(7000 / count, 4, 26))
    for label, colour, members in _holders(count, held):
        axes.scatter(
            across_C[members],
            up_C[members],
            s=size * (0.7 if label == "dropped" else 1),
            color=colour,
            alpha=0.75,
            linewidths=0,
            label=label,
            rasterized=count > _RASTER_ABOVE,
        )
    low, high = min(0.0, mean_KC.min()), (mean_KC.max() or 1.0) * 1.06
    axes.plot([low, high], [low, high], color=style.MUTED, linewidth=0.8, dashes=(4, 3), zorder=0)
    if low == 0:  # activations after a ReLU crowd near zero; a root scale spreads them
        axes.set_xscale("function", functions=(_signed_root, _signed_square))
        axes.set_yscale("function", functions=(_signed_root, _signed_square))
        ticks = [tick for tick in _round_ticks(high) if tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    place = "after the trunk" if key == "root" else f"inside branch {key}"
    axes.set_title(f"{held[0]['stage']}, {place}", pad=20)
    share = [size / max(sum(split["sizes"]), 1) for size in split["sizes"]]
    axes.text(
        0,
        1.025,
        f"{count:,} channels · clusters {' / '.join(f'{part:.0%}' for part in share)}",
        transform=axes.transAxes,
        color=style.MUTED,
        fontsize=8.5,
    )
    if len(held) == 2:
        axes.set_xlabel(f"mean activation, cluster {branches[0]}", color=style.BRANCH[0])
        axes.set_ylabel(f"mean activation, cluster {branches[1]}", color=style.BRANCH[1])
    else:
        axes.set_xlabel("mean activation, cluster with the smallest")
        axes.set_ylabel("mean activation, cluster with the largest")


def _holders(count: int, held: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, np.ndarray]]:
    """(label, colour, channel indices) from those nobody keeps to those several keep."""
    shared = np.zeros(count, bool)
    shared[held[0]["shared"]] = True
    kept_KC = np.zeros((len(held), count), bool)
    for row_C, node in zip(kept_KC, held, strict=True):
        row_C[node["kept"]] = True
    only_KC = kept_KC & ~shared
    picks_C = only_KC.sum(axis=0)
    masks = [
        ("dropped", style.DROPPED, ~kept_KC.any(axis=0)),
        ("shared by choice", style.SHARED, shared),
        *(
            (f"branch {branch} only", style.branch_colour(branch), only_C & (picks_C == 1))
            for branch, only_C in enumerate(only_KC)
        ),
        ("picked by both" if len(held) == 2 else "picked by several", style.BOTH, picks_C > 1),
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
        ticks.append(max(s * power for s in (1, 2, 3, 5) if s * power <= high * fraction))
    return sorted(set(ticks))


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
    figure.get_layout_engine().set(hspace=0.05, h_pad=0.08, wspace=0.04)  # type: ignore
    (loss, accuracy), (routing, gain) = figure.subplots(2, 2)
    start = max((row["epoch"] for row in dense), default=0)
    new = style.BRANCH[0]
    _line(loss, dense, "loss", style.DENSE, "dense")
    _line(loss, finetune, "loss", new, "branched, total", start=start)
    _line(loss, finetune, "cls", new, "branched, classification", start=start, dashes=(3, 2))
    _line(loss, finetune, "resp", style.BRANCH[1], "responsibility", start=start, dashes=(3, 2))
    loss.set(title="Loss", ylim=(0, None))

    _line(accuracy, dense, "train_top1", style.DENSE, "dense, train", dashes=(1, 1.5))
    _line(accuracy, dense, "top1", style.DENSE, "dense")
    _line(accuracy, finetune, "train_top1", new, "branched, train", start=start, dashes=(1, 1.5))
    _line(accuracy, finetune, "top1", new, "branched, one path", start=start)
    _line(
        accuracy,
        finetune,
        "soft_top1",
        style.BOTH,
        "branched, all leaves",
        start=start,
        dashes=(3, 2),
    )
    if dense_top1 is not None:
        _level(accuracy, dense_top1, f"dense {dense_top1:.2f}%")
    accuracy.set(title="Top-1 accuracy, %")

    _line(routing, finetune, "mean_max_p", new, "mean max P (how sure)", start=start)
    _line(routing, finetune, "agreement", style.BRANCH[1], "agreement of the leaves", start=start)
    _line(routing, finetune, "balance", style.SHARED, "balance of the leaves", start=start)
    _level(routing, 1 / leaves, "max P of a router that knows nothing", under=True)
    routing.set(title="Routing", ylim=(0, 1.03))

    _line(gain, finetune, "routing_gain", new, None, start=start)
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
    *,
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


def _level(axes: Axes, value: float, label: str, *, under: bool = False) -> None:
    """A dashed reference line with its name over it, or under it where curves run close above."""
    axes.axhline(value, color=style.MUTED, linewidth=0.9, dashes=(4, 3), zorder=1)
    axes.annotate(
        label,
        (0.01, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, -3 if under else 3),
        textcoords="offset points",
        va="top" if under else "baseline",
        color=style.MUTED,
        fontsize=8,
    )
