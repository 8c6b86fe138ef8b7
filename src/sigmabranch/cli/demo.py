"""``sigmabranch demo``: the whole method on embedded data, in a few minutes."""

from __future__ import annotations

from pathlib import Path

import torch

from sigmabranch.cli import options
from sigmabranch.cli.run import finish
from sigmabranch.cli.screen import Screen
from sigmabranch.tasks import Chain, find_task


def command(
    out: options.Out = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """See the whole method on digits, in a few minutes."""
    # On tensors this small a second thread mostly waits; and one gives the same figures anywhere.
    torch.set_num_threads(1)
    task = find_task("digits-resnet").with_settings(settings or ())
    with Screen().live() as screen:
        screen.say(f"{task.name}: {task.summary}")
        chain = Chain(
            task,
            out or Path("runs") / "demo",
            seed=seed,
            device=device,
            watch=screen.training,
            calibrating=screen.calibrating,
        )
        finish(chain, ("single-path",), None, as_json)
