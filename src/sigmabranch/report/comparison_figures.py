"""What accuracy costs, row by row of a comparison.

Rows are numbered in the plot and named in a key beside it, in the order of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sigmabranch.report import style
from sigmabranch.report.compared import Compared, Entry, Range
from sigmabranch.report.comparison import unit
from sigmabranch.report.numbering import number_points
from sigmabranch.report.style import house_style

_COLOURS = (style.BRANCH[0], style.BRANCH[1], style.SHARED, style.BOTH, style.DENSE)
_LINES = 36  # of the key in one column
_CIRCLE, _DIAMOND, _BELOW, _ABOVE = "o", "D", "v", "^"
_LEGEND = {
    _DIAMOND: "\N{BLACK DIAMOND} fewer bits per weight",
    _BELOW: "\N{BLACK DOWN-POINTING TRIANGLE} lies below the picture",
    _ABOVE: "\N{WHITE UP-POINTING TRIANGLE} lies above the picture",
    "ceiling": "\N{WHITE CIRCLE} needs the true label",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    """One row as drawn; ``y`` is where it stands, which may be the lower or upper edge."""

    number: int
    entry: Entry
    x: Range
    y: float
    marker: str
    colour: str
    ours: bool

    @property
    def face(self) -> str:
        return style.PAPER if self.entry.ceiling else self.colour

    @property
    def sd(self) -> float:
        return 0.0 if self.marker in (_BELOW, _ABOVE) else self.entry.top1.sd or 0.0


@house_style()
def accuracy_by_bytes(compared: Compared) -> Figure:
    """Top-1 against the bytes of weights that one input reads."""
    return _trade(compared, "weights read", "B", lambda entry: entry.read)


@house_style()
def accuracy_by_macs(compared: Compared) -> Figure:
    """Top-1 against the multiply-adds of one input."""
    return _trade(compared, "multiply-adds", "", lambda entry: entry.macs)


def _trade(compared: Compared, what: str, suffix: str, cost: Callable[[Entry], Range]) -> Figure:
    scale, letter = unit(cost(compared.reference).mean)
    points = list(_points(compared, cost, scale))
    lines = list(_key_lines(points))
    columns = math.ceil(len(lines) / _LINES)
    rows = math.ceil(len(lines) / columns)
    figure = style.canvas(
        6.9 + 2.55 * columns,
        max(5.4, 0.9 + 0.178 * rows, 3.7 + 0.1 * len(points)),
        f"What accuracy costs: {what} per input",
        "Dashed: the front; under it, another row costs no more and is right more often. "
        "Bars: ± sd over the seeds; to the right, the costliest input.",
    )
    plot, key = figure.subplots(1, 2, width_ratios=(6.9, 2.55 * columns))
    measure = letter + suffix
    plot.set(xlabel=f"{what}, {measure}" if measure else what, ylabel="top-1, %")
    for point in points:
        _draw(plot, point)
    _limits(plot, points)
    _front(plot, points)
    _key(key, lines, columns, rows)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # numbers are placed by where the points now are
    number_points(plot, {point.number: (point.x.mean, point.y) for point in points})
    return figure


def _points(compared: Compared, cost: Callable[[Entry], Range], scale: float) -> Iterator[_Point]:
    groups = list(compared.groups)
    entries = [compared.reference, *compared.entries]
    low, high = _visible(entries)
    for number, entry in enumerate(entries):
        value, top1 = cost(entry), entry.top1.mean
        marker = _DIAMOND if entry.quantized else _CIRCLE
        yield _Point(
            number=number,
            entry=entry,
            x=Range(value.mean / scale, value.max / scale),
            y=min(max(top1, low), high),
            marker=_BELOW if top1 < low else _ABOVE if top1 > high else marker,
            ours=entry is compared.branched,
            colour=_COLOURS[groups.index(entry.group) % len(_COLOURS)] if number else style.INK,
        )


def _visible(entries: Sequence[Entry]) -> tuple[float, float]:
    """Accuracies between which a row stands where it belongs.

    Rows far below the others, and ceilings far above, would press all others together.
    """
    tops = sorted(entry.top1.mean for entry in entries if not entry.ceiling)
    best, lower = tops[-1], tops[len(tops) // 4]
    worst = next(top for top in tops if top >= lower - 2 * (best - lower) - 0.5)
    room = 0.1 * (best - worst) or 1.0
    return (worst - room if worst > tops[0] else worst), best + room


def _draw(plot: Axes, point: _Point) -> None:
    plot.errorbar(
        point.x.mean,
        point.y,
        yerr=point.sd,
        xerr=[[0.0], [point.x.max - point.x.mean]],
        fmt="none",
        ecolor=point.colour,
        elinewidth=1.0,
        zorder=2,
    )
    plot.plot(
        point.x.mean,
        point.y,
        point.marker,
        markersize=8.5 if point.ours else 6,
        color=point.face,
        markeredgecolor=point.colour if point.entry.ceiling else style.PAPER,
        markeredgewidth=1.1 if point.entry.ceiling else 0.5,
        zorder=6 if point.ours else 5,
    )


def _front(plot: Axes, points: Sequence[_Point]) -> None:
    """Steps through the rows that nothing beats on both axes; ceilings do not count."""
    x, y = zip(*pareto_front([p for p in points if not p.entry.ceiling]), strict=True)
    plot.step(
        (*x, plot.get_xlim()[1]),
        (*y, y[-1]),
        where="post",
        color=style.MUTED,
        linewidth=1.0,
        dashes=(4, 3),
        zorder=1,
    )


def pareto_front(points: Sequence[_Point]) -> list[tuple[float, float]]:
    """(cost, accuracy) of those that are more accurate than everything that costs no more."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point.x.mean, -point.y)):
        if not front or point.y > front[-1][1]:
            front.append((point.x.mean, point.y))
    return front


def _limits(plot: Axes, points: Sequence[_Point]) -> None:
    """A logarithmic axis with round numbers, and room around the points."""
    low, high = min(p.x.mean for p in points), max(p.x.max for p in points)
    margin = max(high / low, 1.5) ** 0.07
    low, high = low / margin, high * margin
    plot.set_xscale("log")
    plot.set_xlim(low, high)
    ticks = next(
        (ticks for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8))
         if len(ticks := _ticks(low, high, steps)) >= 3),
        np.geomspace(low, high, 5)[1:-1].tolist(),
    )  # fmt: skip
    plot.xaxis.set_major_locator(FixedLocator(ticks))
    plot.xaxis.set_minor_locator(NullLocator())
    plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    bottom, top = min(p.y - p.sd for p in points), max(p.y + p.sd for p in points)
    room = 0.06 * (top - bottom) or 1.0
    plot.set_ylim(bottom - room, top + room)


def _ticks(low: float, high: float, steps: Sequence[float]) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (step * 10.0**power for power in powers for step in steps)
    return [tick for tick in ticks if low <= tick <= high]


# -- the key -------------------------------------------------------------------------------------


def _key_lines(points: Sequence[_Point]) -> Iterator[_Point | str]:
    """Points under the headings of their groups, then what the markers mean."""
    group = ""
    for point in points:
        if point.entry.group != group:
            group = point.entry.group
            yield group[:1].upper() + group[1:]
        yield point
    drawn = {point.marker for point in points} | {"ceiling" for p in points if p.entry.ceiling}
    legend = [text for marker, text in _LEGEND.items() if marker in drawn]
    yield from (["", *legend] if legend else [])


def _key(axes: Axes, lines: Sequence[_Point | str], columns: int, rows: int) -> None:
    style.bare(axes)
    axes.set(xlim=(0, columns), ylim=(max(rows, 26) - 0.5, -0.5))
    for place, line in enumerate(lines):
        column, row = divmod(place, rows)
        if isinstance(line, str):
            legend = line in _LEGEND.values()
            axes.text(column + 0.02, row, line, va="center", fontsize=8,
                      fontweight="normal" if legend else "bold",
                      color=style.MUTED if legend else style.INK)  # fmt: skip
            continue
        axes.text(column + 0.09, row, str(line.number), va="center", ha="right", fontsize=8)
        axes.plot(
            column + 0.14,
            row,
            line.marker,
            markersize=5,
            color=line.face,
            markeredgecolor=line.colour,
            markeredgewidth=1.0,
        )
        axes.text(column + 0.19, row, line.entry.name, va="center", fontsize=8)
        top1 = f"{line.entry.top1.mean:.2f}"
        axes.text(column + 0.97, row, top1, va="center", ha="right", fontsize=8, color=style.MUTED)
