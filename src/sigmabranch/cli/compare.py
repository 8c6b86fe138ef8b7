"""``sigmabranch compare``: every system on one bench, and the table that says who wins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sigmabranch import files, report
from sigmabranch.cli import options
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.data import Dataset
from sigmabranch.errors import ConfigError
from sigmabranch.peers import GROUPS, Comparison, find_rows, groups_of
from sigmabranch.tasks import Chain, Task, find_task
from sigmabranch.tasks.task import SECTIONS, parsed

#: Exit code when a row failed and the others are there.
SOME_FAILED = 4


def command(
    task: Annotated[str, typer.Argument(help=options.TASK_HELP)],
    data: options.Data = None,
    out: options.Out = None,
    rows: Annotated[
        str,
        typer.Option(
            help=f"Rows, systems or groups ({', '.join(GROUPS)}), comma-separated.",
            metavar="NAMES",
        ),
    ] = "branched,peers,controls",
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.", metavar="N,N")] = "0",
    device: options.Device = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting of the task (finetune.epochs=3) or of one row (fpgm.rate=0.5). "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(help="Start from this trained dense network.", show_default=False),
    ] = None,
    include: Annotated[
        list[Path] | None,
        typer.Option(
            help="Take the rows that this --result of the same task and source network holds, from "
            "another machine or an earlier time, instead of making them. Repeatable.",
            show_default=False,
        ),
    ] = None,
    gather: Annotated[
        bool, typer.Option("--gather", help="Make nothing: tabulate the rows that are there.")
    ] = False,
    result: options.OutFile = None,
    accumulate: options.Accumulate = 1,
    max_minutes: options.MaxMinutes = None,
    as_json: options.Json = False,
) -> None:
    """Train and measure Sigma-Branch and the systems to judge it by; repeat to continue."""
    chosen, own = _settings(find_task(task), settings or ())
    numbers = _seeds(seeds)
    names = [name for part in rows.split(",") if (name := part.strip())]
    if not names:
        raise ConfigError("--rows names no row: give rows, systems or groups, comma-separated")
    systems, skipped = find_rows(chosen, names, own)
    folder = out or Path("runs") / f"compare-{chosen.name}"
    deadline = options.Deadline(max_minutes)
    with Screen().live() as screen:
        for name, reason in skipped.items():
            screen.say(f"{name} is left out: {reason}")

        def chain(place: Path, seed: int, start: Any, dataset: Dataset | None) -> Chain:
            return Chain(
                chosen,
                place,
                data=data,
                seed=seed,
                device=device,
                accumulate=accumulate,
                max_minutes=deadline.minutes_left(),
                start=start or ({"dense": dense} if dense else None),
                branching=False,
                watch=screen.training,
                calibrating=screen.calibrating,
                dataset=dataset,
            )

        comparison = Comparison(
            task=chosen,
            folder=folder,
            rows=systems,
            groups=groups_of(systems),
            skipped=skipped,
            seeds=numbers,
            chain=chain,
            known=[files.read_json(path) for path in include or ()],
            say=screen.say,
        )
        found = comparison.run(make=not gather)
    if result is not None:
        files.write_json(result, found)
    table, page = report.write_comparison(found, folder / "report")
    lines = [table.to_text(), *(f"failed: {row['row']}, seed {row['seed']}: {row['reason']}"
                                for row in found["failed"]), f"report: {page}"]  # fmt: skip
    print_result({**found, "report": str(page)}, "\n".join(lines), as_json)
    if found["failed"]:
        raise typer.Exit(SOME_FAILED)


def _settings(task: Task, settings: Any) -> tuple[Task, dict[str, dict[str, Any]]]:
    """The task with its settings, and those of rows by row."""
    own: dict[str, dict[str, Any]] = {}
    general = []
    for setting in settings:
        row, dot, rest = setting.partition(".")
        key, equals, value = rest.partition("=")
        if dot and equals and "=" not in row and row not in SECTIONS:
            own.setdefault(row, {})[key] = parsed(value)
        else:
            general.append(setting)
    return task.with_settings(general), own


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) for part in parts if part.isdecimal()]
    if len(set(seeds)) < len(parts) or max(seeds) > options.LARGEST_SEED:
        raise ConfigError(
            "--seeds takes different whole numbers, comma-separated, none above "
            f"{options.LARGEST_SEED}; got {text[:80]!r}"
        )
    return seeds
