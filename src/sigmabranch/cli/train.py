"""``sigmabranch train``: the dense network of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sigmabranch.cli import options
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.tasks import Chain, find_task


def command(
    task: Annotated[str, typer.Argument(help="Name of the task, e.g. digits-resnet.")],
    data: options.Data = None,
    out: options.Out = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    set_: options.Set = None,
    max_minutes: options.MaxMinutes = None,
    resume: options.Resume = True,
    json: options.Json = False,
) -> None:
    """Train the dense network of TASK; `run` and `convert` continue from it."""
    chosen = find_task(task).with_settings(set_ or ())
    screen = Screen()
    chain = Chain(
        chosen,
        out or Path("runs") / chosen.name,
        data=data,
        seed=seed,
        device=device,
        max_minutes=max_minutes,
        resume=resume,
        watch=screen.training,
    )
    with screen.live():
        chain.dense()
        accuracy = chain.dense_accuracy()
    folder = chain.folder / "dense"
    text = f"dense network: {accuracy['top1']:.2f} % top-1 on {accuracy['samples']} samples, {folder}"
    print_result({"folder": str(folder), "dense": accuracy}, text, json)
