"""Where the trials of a search over trees stand: accuracy against active parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sigmabranch.files import atomic_write
from sigmabranch.report import style
from sigmabranch.report.comparison import unit
from sigmabranch.report.numbering import number_points
from sigmabranch.report.search_table import search_table
from sigmabranch.report.style import house_style
from sigmabranch.report.tables import Table


def write_search(found: Mapping[str, Any], folder: Path | str) -> Table:
    """Write ``pareto.txt``, ``pareto.png`` and ``pareto.svg`` into ``folder``.

    Args:
        found: what ``sigmabranch search`` writes, with at least one complete trial.
        folder: made if it is missing.

    Returns:
        The table.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    table = search_table(found)
    with atomic_write(Path(folder) / "pareto.txt") as temporary:
        temporary.write_text(table.to_text(), encoding="utf-8")
    style.save_figure(search_figure(found), Path(folder) / "pareto")
    return table


@house_style()
def search_figure(found: Mapping[str, Any]) -> Figure:
    """Every complete trial; those of the Pareto set filled and numbered.

    Args:
        found: what ``sigmabranch search`` writes, with at least one complete trial.
    """
    trials = [trial for trial in found["trials"] if trial["state"] == "complete"]
    scale, letter = unit(max(trial["active_params"] for trial in trials))
    figure = style.canvas(
        7.2,
        4.6,
        "What the search has found",
        "Numbered: no other trial is as good in accuracy, active parameters and MACs together. "
        "Ring: the best.",
    )
    plot = figure.subplots()
    plot.set(
        xlabel=f"active parameters, {letter}" if letter else "active parameters",
        ylabel="top-1 on held-out samples, %",
    )
    dense = found["source"]["top1"]
    plot.axhline(dense, color=style.DENSE, linewidth=1.0, dashes=(4, 3), zorder=1)
    plot.annotate(
        "dense",
        (1, dense),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=style.MUTED,
    )
    for trial in trials:
        _draw(plot, trial, found, scale)
    _limits(plot, [trial["active_params"] / scale for trial in trials],
            [dense, *(trial["top1"] for trial in trials)])  # fmt: skip
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # numbers are placed by where the points now are
    number_points(
        plot,
        {
            trial["number"]: (trial["active_params"] / scale, trial["top1"])
            for trial in trials
            if trial["number"] in found["pareto"]
        },
    )
    return figure


def _draw(plot: Axes, trial: Mapping[str, Any], found: Mapping[str, Any], scale: float) -> None:
    ours = trial["number"] in found["pareto"]
    x, y = trial["active_params"] / scale, trial["top1"]
    plot.plot(
        x,
        y,
        "o",
        markersize=6.5 if ours else 5,
        color=style.BRANCH[0] if ours else style.PAPER,
        markeredgecolor=style.PAPER if ours else style.DROPPED,
        markeredgewidth=0.5 if ours else 1.0,
        zorder=5 if ours else 3,
    )
    if trial["number"] == found["best"]:
        plot.plot(x, y, "o", markersize=11, color="none", markeredgecolor=style.BRANCH[1], zorder=6)


def _limits(plot: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    for values, limit in ((x, plot.set_xlim), (y, plot.set_ylim)):
        room = 0.08 * (max(values) - min(values)) or 0.05 * max(values) or 1.0
        limit(min(values) - room, max(values) + room)
