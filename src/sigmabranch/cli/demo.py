"""``sigmabranch demo``: the whole method on embedded data, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from sigmabranch.cli import options
from sigmabranch.cli.run import finish
from sigmabranch.cli.screen import Screen
from sigmabranch.tasks import Chain, find_task


def command(
    points: Annotated[
        bool, typer.Option("--points", help="Point clouds and a PointNet++ instead of images.")
    ] = False,
    out: options.Out = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """See the whole method on embedded data, in a few minutes."""
    # On tensors this small a second thread mostly waits; and one gives the same figures anywhere.
    torch.set_num_threads(1)
    task = find_task("shapes-pointnet2" if points else "digits-resnet").with_settings(
        settings or ()
    )
    with Screen().live() as screen:
        screen.say(f"{task.name}: {task.summary}")
        chain = Chain(
            task,
            out or Path("runs") / ("demo-points" if points else "demo"),
            seed=seed,
            device=device,
            watch=screen.training,
            calibrating=screen.calibrating,
        )
        finish(chain, ("single-path",), None, as_json)
