"""Printed figures of other systems beside our exact counts (the paper's tables IV and V)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sigmabranch.errors import ConfigError
from sigmabranch.report.tables import NOTHING, Table, minus
from sigmabranch.tasks.published import PUBLISHED, Printer, Published

_PRINTED = (
    "Printed figures are those of their sources; a dash is what a source does not print. Start: "
    "top-1 of the dense network. In brackets: what is saved of the dense network."
)


def published_table(counts: Mapping[str, Mapping[str, Any]]) -> Table:
    """What was printed for ResNet-50 on ImageNet-1K, under each row our counts that may explain it.

    Args:
        counts: key, as in :attr:`~sigmabranch.tasks.published.Published.counts` (such as ``"fpgm
            rate=0.3 inner"``) → cost as :func:`sigmabranch.measure.cost` gives it. Rows whose
            counts are missing show what is printed.

    Raises:
        ConfigError: a count that no printed row refers to.
    """
    known = dict.fromkeys(key for row in PUBLISHED for key in row.counts)
    for key in counts:
        if key not in known:
            raise ConfigError(f"no printed row refers to {key!r}: known are {', '.join(known)}")
    notes = dict.fromkeys(note for row in PUBLISHED for note in _row_notes(row, counts))
    convention = {cost["convention"]: None for cost in counts.values()}
    return Table(
        header=("", "start", "top-1 %", "top-5 %", "parameters", "FLOPs"),
        groups=tuple(
            (
                f"Printed in {printer}",
                tuple(
                    line
                    for row in PUBLISHED
                    if row.printer is printer
                    for line in (_printed(row), *_counted(row, counts))
                ),
            )
            for printer in Printer
        ),
        notes=(_PRINTED, *notes, *convention),
    )


def _printed(row: Published) -> tuple[str, ...]:
    accuracies = (row.start, row.top1, row.top5)
    return (
        row.title,
        *(NOTHING if value is None else f"{value:.2f}" for value in accuracies),
        _figure(row.params, "{:.2f} M", row.params_saved, 1),
        _figure(row.flops, "{:.4g} G", row.flops_saved, 1),
    )


def _counted(row: Published, counts: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for label, params, macs, dense in _candidates(row, counts):
        saved = (100 * (1 - params / dense["params"]), 100 * (1 - macs / dense["macs"]))
        yield (
            f"  {label}",
            *[NOTHING] * 3,
            _figure(params, "{:,.0f}", saved[0], 2),
            _figure(macs, "{:,.0f}", saved[1], 2),
        )


def _candidates(
    row: Published, counts: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, float, float, Mapping[str, Any]]]:
    """(label, parameters, multiply-adds, dense cost); both ends where inputs differ."""
    for key in row.counts:
        if key not in counts:
            continue
        cost = counts[key]
        paths = cost.get("paths", {})
        ends = {end: paths[end] for end in ("least", "most") if end in paths}
        if not ends:
            yield key, cost["net"]["active_params"], cost["net"]["macs"], cost["dense"]
        for end, path in ends.items():
            yield f"{key}, at {end}", path["active_params"], path["macs"], cost["dense"]


def _figure(value: float | None, show: str, saved: float | None, digits: int) -> str:
    """``"16.96 M (−33.6%)"``, or what there is of it."""
    change = "" if saved is None else minus(f"{-saved:+.{digits}f}%")
    if value is None:
        return change or NOTHING
    return show.format(value) + (f" ({change})" if change else "")


def _row_notes(row: Published, counts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    candidates = list(_candidates(row, counts))
    parts = [_nearest(row, candidates)] if candidates else []
    text = " ".join(part for part in (*parts, row.note) if part)
    if text:
        yield f"{row.title} ({row.printer}): {text}"


def _nearest(row: Published, candidates: Sequence[tuple[str, float, float, Any]]) -> str:
    """Which of our counts comes nearest to each printed figure, and how far it is off."""
    parts = []
    if row.params or row.params_saved:
        counted = {
            label: (params, _goal(row.params, 1e6, row.params_saved, dense["params"]))
            for label, params, _, dense in candidates
        }
        parts.append(f"to the printed parameters {_best(counted)}")
    if row.flops or row.flops_saved:
        counted = {
            label: (macs, _goal(row.flops, 1e9, row.flops_saved, dense["macs"]))
            for label, _, macs, dense in candidates
        }
        parts.append(f"to the printed FLOPs {_best(counted)}")
    return f"Our nearest counts: {', '.join(parts)}." if parts else ""


def _goal(printed: float | None, unit: float, saved: float | None, whole: float) -> float:
    """What a source prints, or what is left by the saving that it prints instead."""
    return printed * unit if printed else (1 - (saved or 0.0) / 100) * whole


def _best(counted: Mapping[str, tuple[float, float]]) -> str:
    off = {label: 100 * (ours / goal - 1) for label, (ours, goal) in counted.items()}
    best = min(off, key=lambda label: abs(off[label]))
    return f"{best} ({minus(f'{off[best]:+.2f}')}%)"
