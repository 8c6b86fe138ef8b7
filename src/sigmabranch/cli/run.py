"""``sigmabranch run``: the whole chain, resumable step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sigmabranch import files, report
from sigmabranch.cli import options
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.peers import CONTROLS, check_rows, find_control, run_control
from sigmabranch.tasks import Chain, Task, find_task
from sigmabranch.training import routing_alarms


def command(
    task: Annotated[str, typer.Argument(help=options.TASK_HELP)],
    data: options.Data = None,
    out: options.Out = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    settings: options.Set = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Also train a control: {', '.join(CONTROLS)}. Repeatable.", show_default=False
        ),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(help="Start from this trained dense network.", show_default=False),
    ] = None,
    result: options.OutFile = None,
    accumulate: options.Accumulate = 1,
    max_minutes: options.MaxMinutes = None,
    resume: options.Resume = True,
    as_json: options.Json = False,
) -> None:
    """Run all steps of a task; repeat it to continue."""
    chosen = find_task(task).with_settings(settings or ())
    check_rows(map(find_control, control or ()), chosen)
    with Screen().live() as screen:
        chain = Chain(
            chosen,
            out or Path("runs") / chosen.name,
            data=data,
            seed=seed,
            device=device,
            accumulate=accumulate,
            max_minutes=max_minutes,
            resume=resume,
            start={"dense": dense} if dense else None,
            watch=screen.training,
            calibrating=screen.calibrating,
        )
        finish(chain, control or (), result, as_json)


def finish(chain: Chain, controls: Any, result_file: Path | None, as_json: bool) -> None:
    """Run every step that is not done, then write and print the result and the report."""
    chain.measured()
    result = chain.result({name: run_control(chain, name) for name in controls})
    if not chain.engine.is_main:
        return
    if result_file is not None:
        files.write_json(result_file, result)
    run = describe(chain, chain.task, result)
    page = report.write_report(run, chain.folder / "report")
    summary = {**result, "warnings": run.warnings, "report": str(page)}
    lines = [run.table.to_text(), *(f"warning: {warning}" for warning in run.warnings)]
    print_result(summary, "\n".join([*lines, f"report: {page}"]), as_json)


def describe(chain: Chain, task: Task, result: dict[str, Any]) -> report.Run:
    """A result as the report wants it."""
    settings = result["task"]
    return report.Run(
        title=task.name,
        cost=result["cost"],
        evaluation=result["branched"],
        dense_evaluation=result["dense"],
        record=files.read_json(chain.folder / "branched" / "record.json"),
        dense_history=result["history"]["dense"],
        finetune_history=result["history"]["branched"],
        recipe={name: part for name, part in settings.items() if isinstance(part, dict)},
        provenance={**result["provenance"], "seed": result["seed"], "data": task.data.name},
        warnings=routing_alarms(result["branched"]),
        class_names=chain.dataset.class_names,
        controls=result["controls"],
    )
