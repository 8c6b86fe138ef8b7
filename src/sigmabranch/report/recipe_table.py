"""Table II of the paper, as implemented: every constant of a task and where it comes from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from sigmabranch.report.tables import Table
from sigmabranch.tasks import Constant, Source

_SOURCES = {
    Source.STATED: "the paper",
    Source.FITTED: "the paper's counts",
    Source.OURS: "ours",
}
_LEGEND = (
    "the paper: it says so. the paper's counts: it does not, but the parameters and operations "
    "that it prints single this value out. ours: it does not say."
)


def recipe_table(constants: Sequence[Constant], *, of_the_paper: bool) -> Table:
    """One group per section of the task, one row per constant.

    Args:
        constants: from :func:`sigmabranch.tasks.constants`, section by section.
        of_the_paper: whether the task is one of the paper's.
    """
    if of_the_paper:
        found = Counter(constant.source for constant in constants)
        counted = ", ".join(f"{_SOURCES[source]} {found[source]}" for source in Source)
        notes = (f"{_LEGEND} Constants by source: {counted}.",)
    else:
        notes = ("This task is not the paper's: every constant is ours.",)
    return Table(
        header=("constant", "value", "source"),
        groups=tuple(
            (section, tuple(map(_row, members)))
            for section, members in groupby(constants, key=lambda constant: constant.section)
        ),
        notes=notes,
    )


def _row(constant: Constant) -> tuple[str, str, str]:
    return (constant.name, written(constant.value), _source(constant))


def _source(constant: Constant) -> str:
    text = _SOURCES[constant.source]
    if constant.replaces:
        text += f" ({_SOURCES[constant.replaces]}: {written(constant.paper)})"
    return text + (f", unused with {constant.unused}" if constant.unused else "")


def written(value: Any) -> str:
    """A setting's value as ``--set`` takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
