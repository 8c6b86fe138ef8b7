"""What the simulator says, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sigmabranch.report.tables import Table


def simulation_table(result: Mapping[str, Any]) -> Table:
    """Latency by bandwidth, then bytes by budget, one group per package and kind."""
    names = list(dict.fromkeys(row["package"] for row in result["latency"]))
    groups = []
    for name in names:
        rows = tuple(
            (
                f"{row['mb_per_s']:g} MB/s",
                f"{row['mb']:.3f}",
                f"{row['ms']:.2f}",
                f"{row['foreseen_ms']:.2f}",
                f"{row['floor_ms']:.2f}",
            )
            for row in result["latency"]
            if row["package"] == name
        )
        groups.append((name, rows))
    streams = tuple(
        f"{row['package']} in {row['budget_mb']:.3f} MB: {row['mb_per_input']:.3f} MB an input."
        for row in result["stream"]
    )
    return Table(
        header=("storage", "MB read", "ms", "ms, path foreseen", "ms, floor"),
        groups=tuple(groups),
        notes=streams,
    )
