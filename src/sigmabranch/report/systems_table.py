"""Table I of the paper, for every system here: what kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sigmabranch.report.tables import Table

_NOTES = (
    "Labels: whether making the structure needs them; training uses them everywhere. Pretrained: "
    "whether its authors start from a trained dense network; in the comparison all do that can.",
)


def systems_table(traits: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per system.

    Args:
        traits: system → ``source``, ``unit``, ``decided``, ``by``, ``labels``, ``pretrained`` and
            ``same_bytes``.
    """
    rows = tuple(
        (
            name,
            row["unit"],
            row["decided"],
            row["by"],
            *(_yes(row[flag]) for flag in ("labels", "pretrained", "same_bytes")),
            row["source"],
        )
        for name, row in traits.items()
    )
    header = (
        "", "unit", "decided", "structure from", "labels", "pretrained", "same bytes", "source",
    )  # fmt: skip
    return Table(header=header, groups=(("", rows),), notes=_NOTES)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
