"""``sigmabranch convert``: a dense network becomes a branched one, or is told how it could."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sigmabranch.cli import options
from sigmabranch.cli.models import open_model, open_tree
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.cli.source import read_source
from sigmabranch.conversion import BudgetPlan, plan_budget
from sigmabranch.errors import ConfigError
from sigmabranch.report import budget_table
from sigmabranch.saving import load_dense
from sigmabranch.tasks import Chain
from sigmabranch.tasks.counting import example


def command(
    dense: Annotated[
        str,
        typer.Argument(
            help="Folder of a dense network made by train; with --dry-run also timm:NAME or "
            "PATH.py:CLASS.",
            metavar="FOLDER|MODEL",
        ),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            help="Bytes of one path's parameters, e.g. 12MB, or a part of the dense network, e.g. "
            "40%; cuts and widths are solved for it.",
            metavar="SIZE",
            show_default=False,
        ),
    ] = None,
    total: Annotated[
        str | None,
        typer.Option(help="Most bytes of all nodes.", metavar="SIZE", show_default=False),
    ] = None,
    macs: Annotated[
        int | None,
        typer.Option(help="Most multiply-accumulates of a path.", min=1, show_default=False),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits of a parameter: 4, 8, 16 or 32.")] = 32,
    shape: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="One input's sides, e.g. 3x224x224.",
            metavar="SHAPE",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the plan; reads no data, writes nothing.")
    ] = False,
    data: options.Data = None,
    out: options.OutBeside = None,
    seed: options.SameSeed = None,
    device: options.Device = "auto",
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Make a dense network branched; no fine-tuning yet."""
    limits: dict[str, Any] = {"total": total, "macs": macs, "bits": bits}
    if budget is None and (dry_run or total or macs):
        raise ConfigError("--dry-run, --total and --macs need a --budget, for example 40%")
    if ":" in dense and not Path(dense).is_dir():
        model, blank = open_model(dense, shape)
        if not dry_run:
            raise ConfigError(
                f"converting {dense} needs its data: add --dry-run to see the plan, and call "
                "sigmabranch.convert(model, loader, budget=…) in Python"
            )
        _show(plan_budget(model, blank, str(budget), open_tree(settings), **limits), as_json)
        return
    folder = Path(dense)
    task, old_seed = read_source(folder, "dense", settings)
    if budget is not None:
        plan = plan_budget(load_dense(folder), example(task), budget, task.tree, **limits)
        if dry_run:
            _show(plan, as_json)
            return
        task = replace(task, tree=plan.tree)
    with Screen().live() as screen:
        chain = Chain(
            task,
            out or folder.resolve().parent,
            data=data,
            seed=old_seed if seed is None else seed,
            device=device,
            start={"dense": folder},
            calibrating=screen.calibrating,
        )
        net = chain.converted()
        accuracy = chain.accuracy(net)
    if not chain.engine.is_main:
        return
    converted = chain.folder / "converted"
    text = (
        f"{converted}: {accuracy['top1']:.2f} % top-1 before fine-tuning, "
        f"balance {accuracy['balance']:.2f}, routing gain {accuracy['routing_gain']:+.2f} points"
    )
    print_result({"folder": str(converted), "converted": accuracy}, text, as_json)


def _show(plan: BudgetPlan, as_json: bool) -> None:
    print_result(plan.to_dict(), budget_table(plan).to_text(), as_json)
