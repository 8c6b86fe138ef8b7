"""What the simulator says, as two plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sigmabranch.report.style import house_style, save_figure


def write_simulation(result: Mapping[str, Any], folder: Path) -> None:
    """Write ``latency`` and ``stream`` as PNG and SVG into ``folder``."""
    save_figure(latency_figure(result), folder / "latency")
    save_figure(stream_figure(result), folder / "stream")


@house_style()
def latency_figure(result: Mapping[str, Any]) -> Figure:
    """Milliseconds of one input, nothing in memory, against the storage's bandwidth."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    _lines(axes, result["latency"], "mb_per_s", "ms")
    axes.set(xscale="log", yscale="log", xlabel="storage, MB/s", ylabel="ms per input, cold")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")  # powers of ten as numbers
        axis.set_minor_formatter("")
    axes.legend()
    return figure


@house_style()
def stream_figure(result: Mapping[str, Any]) -> Figure:
    """Bytes moved per input of a stream, against the memory for weights."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    _lines(axes, result["stream"], "budget_mb", "mb_per_input")
    axes.set(xlabel="memory for weights, MB", ylabel="MB moved per input")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _lines(axes: Axes, rows: list[Mapping[str, Any]], x: str, y: str) -> None:
    for name in dict.fromkeys(row["package"] for row in rows):
        own = [row for row in rows if row["package"] == name]
        axes.plot([row[x] for row in own], [row[y] for row in own], marker="o", label=name)
