"""``sigmabranch convert``: a dense network becomes a branched one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sigmabranch.cli import options
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.cli.source import read_source
from sigmabranch.tasks import Chain


def command(
    dense: Annotated[Path, typer.Argument(help="Folder of a dense network made by train.")],
    data: options.Data = None,
    out: options.OutBeside = None,
    seed: options.SameSeed = None,
    device: options.Device = "auto",
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Make a dense network branched; no fine-tuning yet."""
    task, old_seed = read_source(dense, "dense", settings)
    with Screen().live() as screen:
        chain = Chain(
            task,
            out or dense.resolve().parent,
            data=data,
            seed=old_seed if seed is None else seed,
            device=device,
            start={"dense": dense},
            calibrating=screen.calibrating,
        )
        net = chain.converted()
        accuracy = chain.accuracy(net)
    if not chain.engine.is_main:
        return
    folder = chain.folder / "converted"
    text = (
        f"{folder}: {accuracy['top1']:.2f} % top-1 before fine-tuning, "
        f"balance {accuracy['balance']:.2f}, routing gain {accuracy['routing_gain']:+.2f} points"
    )
    print_result({"folder": str(folder), "converted": accuracy}, text, as_json)
