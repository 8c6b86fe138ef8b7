"""``sigmabranch search``: trees tried by short fine-tunes, and those worth training in full."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sigmabranch import report
from sigmabranch.cli import options
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.search import Bench, Search, Space
from sigmabranch.tasks import find_task


def command(
    task: Annotated[str, typer.Argument(help=options.TASK_HELP)],
    data: options.Data = None,
    out: options.Out = None,
    trials: Annotated[int, typer.Option(help="Trials in all.", metavar="N", min=1)] = 30,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of each trial's fine-tuning.",
            min=1,
            show_default="a fifth of the recipe's",
        ),
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KNOB=VALUE,VALUE",
            help="Where a knob may stand: depth=1,2, active=0.3,0.5 (the least and the most), "
            "stages=layer2,layer3, shape=balanced, trunk_share=1, shared_fraction=0.5, entry=…, "
            "early=true, projection_dim=64. Repeatable.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="The best trial is one whose path is no larger, e.g. 1MB, or a part of the dense "
            "network, e.g. 40%.",
            metavar="SIZE",
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        float,
        typer.Option(help="Share of the training samples to judge by.", min=0.001, max=0.9),
    ] = 0.1,
    dense: Annotated[
        Path | None,
        typer.Option(
            help="Start from this trained dense network instead of training one without the "
            "held-out samples.",
            show_default=False,
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    settings: options.Set = None,
    accumulate: options.Accumulate = 1,
    max_minutes: options.MaxMinutes = None,
    as_json: options.Json = False,
) -> None:
    """Search for trees worth training; reads no test split. Repeat to continue."""
    chosen = find_task(task).with_settings(settings or ())
    folder = out or Path("runs") / f"search-{chosen.name}"
    with Screen().live() as screen:
        bench = Bench(
            task=chosen,
            folder=folder,
            epochs=epochs,
            validation=validation,
            given=dense,
            data=data,
            seed=seed,
            device=device,
            accumulate=accumulate,
            max_minutes=max_minutes,
            watch=screen.training,
            calibrating=screen.calibrating,
        )
        possible = Space.with_settings(space or ())
        found = Search(bench=bench, space=possible, budget=budget, say=screen.say).run(trials)
    lines = [report.write_search(found, folder).to_text()]
    if found["best"] is not None:
        lines.append(f"train the best in full: {found['commands'][str(found['best'])]}")
    print_result(found, "\n".join([*lines, f"all of it: {folder / 'search.json'}"]), as_json)
