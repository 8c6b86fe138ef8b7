"""The table of a comparison: every system on one line, by the same recipe and yardstick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from sigmabranch.report.compared import Compared, Entry, Range
from sigmabranch.report.comparison_reader import read_comparison
from sigmabranch.report.tables import NOTHING, Table, minus, sampling_note
from sigmabranch.tasks import Spread

Column: TypeAlias = tuple[str, Callable[[Entry], str]]


def comparison_table(found: Mapping[str, Any]) -> Table:
    """One line per row, the source network first, then group by group by accuracy.

    Args:
        found: what ``sigmabranch compare`` writes.

    Raises:
        CheckpointError, ConfigError: see :func:`.read_comparison`.
    """
    return compared_table(read_comparison(found))


def compared_table(compared: Compared) -> Table:
    """The same, of a comparison that has been read."""
    footnotes = list(dict.fromkeys(n for entry in compared.entries for n in entry.footnotes))
    columns = _columns(compared, footnotes)
    groups = {"": [compared.reference]}
    for group, entries in compared.groups.items():
        groups[group or "rows"] = entries
    rows = [tuple(show(entry) for _, show in columns) for some in groups.values() for entry in some]
    # A column without a single figure says nothing.
    kept = [i for i in range(len(columns)) if any(row[i] != NOTHING for row in rows)]
    cells = iter(tuple(row[i] for i in kept) for row in rows)
    return Table(
        header=tuple(columns[i][0] for i in kept),
        groups=tuple(
            (_heading(group), tuple(next(cells) for _ in entries))
            for group, entries in groups.items()
        ),
        notes=(
            *(f"[{number}] {text}." for number, text in enumerate(footnotes, 1)),
            *_notes(compared),
        ),
    )


def unit(value: float) -> tuple[float, str]:
    """What to divide by, and its letter, so that ``value`` is at least 1."""
    return next(
        ((limit, letter) for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"))
         if value >= limit),
        (1.0, ""),
    )  # fmt: skip


def _columns(compared: Compared, footnotes: list[str]) -> list[Column]:
    reference = compared.reference
    params, macs, read = (unit(r.mean) for r in (reference.active, reference.macs, reference.read))
    seeds = len(compared.seeds)

    def marks(entry: Entry) -> str:
        return "".join(f"[{footnotes.index(n) + 1}]" for n in entry.footnotes) or NOTHING

    def headed(name: str, scale: tuple[float, str], suffix: str = "") -> str:
        return f"{name}, {scale[1]}{suffix}" if scale[1] + suffix else name

    return [
        ("", lambda entry: entry.name),
        ("epochs", lambda entry: str(entry.epochs)),
        (headed("stored", params), lambda entry: _scaled(entry.stored, params)),
        (headed("active", params), lambda entry: _scaled(entry.active.mean, params)),
        (headed("at most", params), lambda entry: _largest(entry.active, params)),
        (headed("read", read, "B"), lambda entry: _scaled(entry.read.mean, read)),
        (headed("MACs", macs), lambda entry: _scaled(entry.macs.mean, macs)),
        (headed("MACs at most", macs), lambda entry: _largest(entry.macs, macs)),
        ("top-1 %", lambda entry: _top1(entry, seeds)),
        ("held out %", lambda entry: _spread(entry.held_out, 2)),
        ("gain pp", lambda entry: _spread(entry.gain, 2)),
        ("balance", lambda entry: _spread(entry.balance, 3)),
        ("time", lambda entry: NOTHING if entry.latency is None else f"{entry.latency:.2f}"),
        ("note", marks),
    ]


def _scaled(value: float, scale: tuple[float, str]) -> str:
    return f"{value / scale[0]:,.{3 if scale[1] else 0}f}"


def _largest(value: Range, scale: tuple[float, str]) -> str:
    """The largest over the inputs, where they differ."""
    return _scaled(value.max, scale) if value.max > value.mean else NOTHING


def _top1(entry: Entry, seeds: int) -> str:
    fewer = f" (n = {entry.top1.n})" if entry.system and entry.top1.n < seeds else ""
    return entry.top1.to_text() + fewer


def _spread(spread: Spread | None, digits: int) -> str:
    return NOTHING if spread is None else minus(spread.to_text(digits))


def _heading(group: str) -> str:
    return group[:1].upper() + group[1:]


def _notes(compared: Compared) -> tuple[str, ...]:
    seeds = ", ".join(map(str, compared.seeds))
    spread = (
        f"mean ± standard deviation over seeds {seeds}"
        if len(compared.seeds) > 1
        else f"of the single seed {seeds}, whose deviation is not known"
    )
    source = ", ".join(map(str, compared.reference.top1_by_seed))
    missing = [
        f"{why}: {'; '.join(lines)}."
        for why, lines in (
            ("Not made yet", compared.missing),
            ("Failed", compared.failed),
            ("Left out", compared.skipped),
        )
        if lines
    ]
    return (
        f"Top-1: {spread}, all from one source network (seed {source}); the test split chose "
        "nothing. Rows without a note share the recipe of fine-tuning; epochs include the source "
        "network's.",
        "Active, read, MACs: of one input at batch 1, the mean over the test split, and at most "
        "where inputs differ. Gain: top-1 over shuffled routes. Balance: entropy of the leaf "
        "usage, 1 being even. Time: of one input on the CPU, weights in memory, over the source "
        "network's at the same moment.",
        *(["Held out: top-1 on training samples that no row was trained on, to choose by."]
          if compared.reference.held_out else []),
        sampling_note(compared.evaluation),
        *missing,
        compared.convention,
    )  # fmt: skip
