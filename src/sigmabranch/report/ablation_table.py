"""The branched network with one thing changed at a time, beside the paper's table VI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sigmabranch.errors import ConfigError
from sigmabranch.report.compared import Compared, Entry
from sigmabranch.report.comparison_reader import read_comparison
from sigmabranch.report.tables import NOTHING, Table, fraction, signed_points
from sigmabranch.tasks.published import PUBLISHED_ABLATION, PublishedAblation

_HEADER = (
    "", "changed", "paper, top-1 %", "paper, change", "paper, balance", "ours, top-1 %",
    "ours, change", "ours, balance",
)  # fmt: skip
_NOTES = (
    "The paper's columns are its ablation on ImageNet-1K, another data set and schedule unless "
    "this comparison is of them: its levels do not compare with ours, at best the signs of its "
    "changes. It prints no deviation over seeds.",
    "Ours: mean ± standard deviation; changes are paired by seed, each against the branched "
    "network of the same seed.",
)


def ablation_table(found: Mapping[str, Any]) -> Table:
    """The branched network with one thing changed at a time, beside the paper's ablation.

    Args:
        found: what ``sigmabranch compare`` writes.

    Raises:
        CheckpointError: see :func:`.read_comparison`.
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
    made = [base, *compared.ablations]
    printed = {row.settings: row for row in PUBLISHED_ABLATION}
    lines = []
    for entry in made:
        changes = entry.changes or ()
        theirs = _theirs(printed.pop(changes, None))
        lines.append((entry.name, _written(changes), *theirs, *_ours(entry, base)))
    for settings, row in printed.items():
        lines.append((row.title, _written(settings), *_theirs(row), "not run", NOTHING, NOTHING))
    return Table(header=_HEADER, groups=(("", tuple(lines)),), notes=(*_NOTES, *_footnotes(made)))


def _written(settings: tuple[str, ...]) -> str:
    return ", ".join(settings) or NOTHING


def _theirs(row: PublishedAblation | None) -> tuple[str, str, str]:
    if row is None:
        return (NOTHING, NOTHING, NOTHING)
    full = next(row.top1 for row in PUBLISHED_ABLATION if not row.settings)
    return (
        f"{row.top1:.2f}",
        signed_points(row.top1 - full) if row.settings else NOTHING,
        NOTHING if row.balance is None else fraction(row.balance),
    )


def _ours(entry: Entry, base: Entry) -> tuple[str, str, str]:
    return (
        entry.top1.to_text(),
        NOTHING if entry is base else _paired(entry, base),
        NOTHING if entry.balance is None else entry.balance.to_text(3),
    )


def _paired(entry: Entry, base: Entry) -> str:
    """Change in points over the seeds that both have."""
    change = entry.change_from(base)
    if change is None:
        return NOTHING
    deviation = "" if change.sd is None else f" ± {change.sd:.2f}"
    return f"{signed_points(change.mean).removesuffix(' pp')}{deviation} pp (n = {change.n})"


def _footnotes(entries: list[Entry]) -> Iterator[str]:
    for entry in entries:
        for note in entry.footnotes:
            yield f"{entry.name}: {note}."
