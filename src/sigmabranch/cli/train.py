"""``sigmabranch train``: the dense network of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sigmabranch.cli import options
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.tasks import Chain, find_task


def command(
    task: Annotated[str, typer.Argument(help=options.TASK_HELP)],
    data: options.Data = None,
    out: options.Out = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    settings: options.Set = None,
    accumulate: options.Accumulate = 1,
    max_minutes: options.MaxMinutes = None,
    resume: options.Resume = True,
    as_json: options.Json = False,
) -> None:
    """Train the dense network of a task."""
    chosen = find_task(task).with_settings(settings or ())
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
            watch=screen.training,
        )
        chain.dense()
        accuracy = chain.dense_accuracy()
    if not chain.engine.is_main:
        return
    folder = chain.folder / "dense"
    text = f"{folder}: {accuracy['top1']:.2f} % top-1 on {accuracy['samples']:,} test samples"
    print_result({"folder": str(folder), "dense": accuracy}, text, as_json)
