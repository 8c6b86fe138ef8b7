"""The candidates of a race, and which of them has won."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sigmabranch.report.tables import NOTHING, Table, count, megabytes, minus, percent

_FLOAT = 4  # bytes


def best_table(result: Mapping[str, Any]) -> Table:
    """One row per candidate, the winner marked, with intervals over the held-out samples."""
    return Table(
        header=(
            "network", "top-1, held out (95 %)", "points behind (95 %)", "reads", "stores",
            "top-1, test",
        ),
        groups=(("", tuple(_row(row, result["winner"]) for row in result["candidates"])),),
        notes=tuple(_notes(result)),
    )  # fmt: skip


def _row(row: Mapping[str, Any], winner: str) -> tuple[str, ...]:
    state = "best" if row["name"] == winner else row["state"]
    name = row["name"] if state == "complete" else f"{row['name']}, {state}"
    if "held_out" not in row:
        return (name, *[NOTHING] * 5)
    return (
        name,
        _interval(row["held_out"]),
        _interval(row["behind"]),
        megabytes(_FLOAT * row["active_params"]),
        megabytes(_FLOAT * row["stored_params"]),
        percent(row["test"]["mean"]) if "test" in row else NOTHING,
    )


def _interval(value: Mapping[str, float]) -> str:
    return minus(f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})")


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = [
        f"Judged by {count(result['held_out'])} samples that none has trained on; the dense "
        f"network has {percent(result['reference']['mean'])} there. {_sentence(result['method'])}",
        f"Best is, {result['rule']}.",
    ]
    notes += [f"{row['name']}, {row['state']}: {row['reason']}"
              for row in result["candidates"] if row["reason"]]  # fmt: skip
    return notes


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
