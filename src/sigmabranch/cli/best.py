"""``sigmabranch best``: the tree, single path or narrow dense network that serves a budget best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sigmabranch import files, report
from sigmabranch.cli import options
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.cli.source import read_source
from sigmabranch.errors import ConfigError
from sigmabranch.race import TaskRace
from sigmabranch.tasks import Task, find_task


def command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|TASK",
            help="A task, or the folder of a dense network that train made with data.held_out.",
        ),
    ],
    budget: Annotated[
        str,
        typer.Option(
            help="Bytes of the parameters that one input may read, e.g. 12MB, or a part of the "
            "dense network, e.g. 40%.",
            metavar="SIZE",
            show_default=False,
        ),
    ],
    data: options.Data = None,
    out: options.Out = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    settings: options.Set = None,
    result: options.OutFile = None,
    accumulate: options.Accumulate = 1,
    max_minutes: options.MaxMinutes = None,
    as_json: options.Json = False,
) -> None:
    """Train a tree, a single path and a narrow dense network; keep the best. Repeat to continue."""
    given = Path(what) if Path(what).is_dir() else None
    task = find_task(what).with_settings(settings or ()) if given is None else None
    task = task or _task_of(Path(what), settings)
    folder = out or Path("runs") / f"best-{task.name}"
    with Screen().live() as screen:
        found = TaskRace(
            task=task,
            budget=budget,
            folder=folder,
            given=given,
            data=data,
            seed=seed,
            device=device,
            accumulate=accumulate,
            max_minutes=max_minutes,
            watch=screen.training,
            calibrating=screen.calibrating,
            say=screen.say,
        ).run()
    if result is not None:
        files.write_json(result, found)
    lines = [report.best_table(found).to_text(), f"the best is in {found['folder']}"]
    print_result(found, "\n".join(lines), as_json)


def _task_of(folder: Path, settings: list[str] | None) -> Task:
    """The task of a dense network that has not seen some of the training samples."""
    task, _ = read_source(folder, "dense", settings)
    if task.data.held_out is None:
        raise ConfigError(
            f"{folder} has learnt from all training samples, so that none is left to choose by: "
            "train it with --set data.held_out=N, or name the task"
        )
    return task
