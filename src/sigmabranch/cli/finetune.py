"""``sigmabranch finetune``: train all paths of a branched network together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sigmabranch.cli import options
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.cli.source import read_source
from sigmabranch.tasks import Chain


def command(
    net: Annotated[Path, typer.Argument(help="Folder of a branched network made by convert.")],
    data: options.Data = None,
    out: options.OutBeside = None,
    seed: options.SameSeed = None,
    device: options.Device = "auto",
    settings: options.Set = None,
    accumulate: options.Accumulate = 1,
    max_minutes: options.MaxMinutes = None,
    as_json: options.Json = False,
) -> None:
    """Train all paths of a branched network together."""
    task, old_seed = read_source(net, "branched", settings)
    dense = net.resolve().parent / "dense"
    with Screen().live() as screen:
        chain = Chain(
            task,
            out or net.resolve().parent,
            data=data,
            seed=old_seed if seed is None else seed,
            device=device,
            accumulate=accumulate,
            max_minutes=max_minutes,
            start={"converted": net} | ({"dense": dense} if dense.exists() else {}),
            watch=screen.training,
        )
        accuracy = chain.accuracy(chain.branched())
    if not chain.engine.is_main:
        return
    folder = chain.folder / "branched"
    text = f"{folder}: {accuracy['top1']:.2f} % top-1 on one path per input"
    if "balance" in accuracy:
        gain = accuracy["routing_gain"]
        text += f", balance {accuracy['balance']:.2f}, routing gain {gain:+.2f} points"
    print_result({"folder": str(folder), "branched": accuracy}, text, as_json)
