"""Other people's figures beside ours: printed rows against exact counts, and ablations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sigmabranch.errors import ConfigError
from sigmabranch.report.compared import Compared, Entry, read_comparison
from sigmabranch.report.tables import NOTHING, Table, minus, signed_points
from sigmabranch.tasks import Spread
from sigmabranch.tasks.published import (
    PUBLISHED,
    PUBLISHED_ABLATION,
    Printer,
    Published,
    PublishedAblation,
)

_PRINTED = (
    "Printed figures are those of their sources; a dash is what a source does not print. Start: "
    "top-1 of the dense network. In brackets: what is saved of the dense network."
)
_PAPERS = (
    "The paper's column is its ablation on ImageNet-1K, another data set and schedule unless this "
    "comparison is of them: its levels do not compare with ours, at best the signs of its changes. "
    "It prints no deviation over seeds.",
    "Ours: mean ± standard deviation; changes are paired by seed, each against the branched "
    "network of the same seed.",
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


# -- ablations -----------------------------------------------------------------------------------


def ablation_table(found: Mapping[str, Any]) -> Table:
    """The branched network with one thing changed at a time, beside the paper's ablation.

    Args:
        found: what ``sigmabranch compare`` writes.

    Raises:
        CheckpointError: see :func:`~sigmabranch.report.compared.read_comparison`.
        ConfigError: see there; or the branched network itself is not among the rows.
    """
    return compared_ablations(read_comparison(found))


def compared_ablations(compared: Compared) -> Table:
    """The same, of a comparison that has been read."""
    base = compared.branched
    if base is None:
        raise ConfigError(
            "ablations are changes of the branched network, which is not among the rows: "
            "add it with --rows branched,ablations"
        )
    printed = {row.settings: row for row in PUBLISHED_ABLATION}
    full = printed[()]
    made = [base, *ablations(compared)]
    lines = [
        _ablation(printed.pop(tuple(entry.system["settings"]), None), full, entry, base)
        for entry in made
    ]
    missing = [_ablation(row, full, None, base) for row in printed.values()]
    return Table(
        header=("", "changed", "paper, top-1 %", "paper, change", "ours, top-1 %", "ours, change"),
        groups=(("", (*lines, *missing)),),
        notes=(*_PAPERS, *_marks(made)),
    )


def _marks(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        for note in entry.footnotes:
            yield f"{entry.name}: {note}."


def ablations(compared: Compared) -> list[Entry]:
    """Rows that are the branched network with settings changed."""
    return [
        entry
        for entry in compared.entries
        if entry.system["name"] == "sigma-branch" and entry.system["settings"]
    ]


def _ablation(
    printed: PublishedAblation | None, full: PublishedAblation, entry: Entry | None, base: Entry
) -> tuple[str, ...]:
    settings = printed.settings if entry is None and printed else (entry or base).system["settings"]
    theirs = (NOTHING, NOTHING)
    if printed:
        change = signed_points(printed.top1 - full.top1) if printed.settings else NOTHING
        theirs = (f"{printed.top1:.2f}", change)
    ours = ("not run", NOTHING)
    if entry:
        ours = (entry.top1.to_text(), NOTHING if entry is base else _paired(entry, base))
    name = entry.name if entry else printed.title if printed else ""
    return (name, ", ".join(settings) or NOTHING, *theirs, *ours)


def _paired(entry: Entry, base: Entry) -> str:
    """Change in points over the seeds that both have."""
    both = sorted(entry.top1_by_seed.keys() & base.top1_by_seed.keys())
    if not both:
        return NOTHING
    change = Spread.of([entry.top1_by_seed[seed] - base.top1_by_seed[seed] for seed in both])
    deviation = "" if change.sd is None else f" ± {change.sd:.2f}"
    return f"{signed_points(change.mean).removesuffix(' pp')}{deviation} pp (n = {change.n})"
