"""Options that several verbs share, with one wording each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from sigmabranch.marks import check_free
from sigmabranch.tasks import TASKS

# Numbers derived from it must fit torch's generators.
LARGEST_SEED = 2**32 - 1
TASK_HELP = f"One of {', '.join(TASKS)}."

Data: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="Folder of the data set; the embedded ones need none.", show_default=False),
]
Out: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="Folder for everything this command writes.", show_default="one in runs/"),
]
OutBeside: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Folder for everything this command writes.", show_default="beside the input"
    ),
]


def _free(path: Path | None) -> Path | None:
    """Refuse a file that is not ours before any work, not after it."""
    if path is not None:
        check_free(path)
    return path


OutFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Also write the result's JSON here; an earlier result is written over.",
        callback=_free,
        show_default=False,
    ),
]
Budget: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Most memory for weights, e.g. 42MB.", metavar="SIZE", show_default="all of them"
    ),
]
Bandwidth: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Read no more than this a second, as from slower storage, e.g. 100MB.",
        metavar="SIZE",
        show_default=False,
    ),
]
SameSeed: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Another seed than the input's.", min=0, max=LARGEST_SEED, show_default=False
    ),
]
Seed: TypeAlias = Annotated[
    int,
    typer.Option(
        help="Seed of initialisation, order, augmentation and clustering.", min=0, max=LARGEST_SEED
    ),
]
Device: TypeAlias = Annotated[
    str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.", metavar="NAME")
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
]
Set: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting of the task, e.g. finetune.lr=0.02, tree.depth=3, "
        "conversion.shared_fraction=0.25, data.train_limit=1000. Repeatable.",
        show_default=False,
    ),
]
Accumulate: TypeAlias = Annotated[
    int,
    typer.Option(
        help="Work through each batch in so many passes, to need less memory; the recipe's batch "
        "size stays.",
        metavar="N",
        min=1,
    ),
]
MaxMinutes: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="Stop cleanly after so many minutes; the same command continues.",
        min=0,
        show_default=False,
    ),
]
Resume: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume", help="Continue what --out holds, or insist that it is new."
    ),
]


class Deadline:
    """One time limit for everything that a command does."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def minutes_left(self) -> float | None:
        """At least 0; None without a limit."""
        return None if self._end is None else max(0.0, (self._end - time.monotonic()) / 60)
