"""``sigmabranch convert``: a dense network becomes a branched one, or is told how it could."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sigmabranch.archive import read_manifest
from sigmabranch.cli import options
from sigmabranch.cli.models import open_model, open_tree
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.cli.source import read_source
from sigmabranch.conversion import BudgetPlan, Proposal, plan_budget
from sigmabranch.errors import ConfigError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.report import budget_table, proposal_table
from sigmabranch.saving import load_dense
from sigmabranch.search import proposed
from sigmabranch.tasks import Chain, Task, open_task_data, shuffled
from sigmabranch.tasks.counting import example
from sigmabranch.training import launched_rank, resolve_device

FLOAT = 32


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
    bits: Annotated[int, typer.Option(help="Bits of a parameter: 4, 8, 16 or 32.")] = FLOAT,
    shape: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="One input's sides, e.g. 3x224x224.",
            metavar="SHAPE",
            show_default=False,
        ),
    ] = None,
    propose: Annotated[
        bool,
        typer.Option(
            "--propose",
            help="Let the data choose leaves and cuts, at most as deep as the task's tree, and "
            "show why.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only show the plan; writes nothing, and reads no data but for --propose.",
        ),
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
    if budget is None and (total or macs or bits != FLOAT or (dry_run and not propose)):
        raise ConfigError("--dry-run, --total, --macs and --bits need a --budget, for example 40%")
    if ":" in dense and not Path(dense).is_dir():
        model, blank = open_model(dense, shape)
        if propose or not dry_run:
            raise ConfigError(
                f"{'proposing a tree for' if propose else 'converting'} {dense} needs its data: "
                "add --dry-run to see the plan for a --budget, and call "
                "sigmabranch.propose_tree(model, loader) and sigmabranch.convert in Python"
            )
        unread = plan_budget(model, blank, str(budget), open_tree(settings), **limits)
        print_result(*_shown(unread, None), as_json)
        return
    folder = Path(dense)
    task, old_seed = read_source(folder, "dense", settings)
    if shape is not None:
        raise ConfigError(f"--input is the task's where {dense} is a folder: leave it out")
    seed = old_seed if seed is None else seed
    with Screen().live() as screen:
        proposal = _proposal(folder, task, data, seed, device, screen) if propose else None
        task = replace(task, tree=proposal.tree if proposal else task.tree)
        plan = None
        if budget is not None:
            plan = plan_budget(load_dense(folder), example(task), budget, task.tree, **limits)
            task = replace(task, tree=plan.tree)
        found, tables = _shown(plan, proposal)
        if dry_run:
            if not launched_rank():
                print_result(found, tables, as_json)
            return
        chain = Chain(
            task,
            out or folder.resolve().parent,
            data=data,
            seed=seed,
            device=device,
            start={"dense": folder},
            calibrating=screen.calibrating,
        )
        net = chain.converted()
        if proposal is not None:
            _explain(chain, net, proposal)
        accuracy = chain.accuracy(net)
    if not chain.engine.is_main:
        return
    converted = chain.folder / "converted"
    text = (
        f"{converted}: {accuracy['top1']:.2f} % top-1 before fine-tuning, "
        f"balance {accuracy['balance']:.2f}, routing gain {accuracy['routing_gain']:+.2f} points"
    )
    if proposal is not None:
        text = f"{tables}\n{text}"
    result = {"folder": str(converted), "converted": accuracy}
    print_result(result | ({"proposal": proposal.to_dict()} if proposal else {}), text, as_json)


def _proposal(
    folder: Path, task: Task, data: Path | None, seed: int, device: str, screen: Screen
) -> Proposal:
    """The tree that the training split proposes for the dense network in ``folder``."""
    where = resolve_device(device)
    train = open_task_data(task, data, where).train
    return proposed(
        task,
        load_dense(folder).to(where),
        shuffled(train, seed),
        seed,
        None if launched_rank() else screen.calibrating,
    )


def _explain(chain: Chain, net: SigmaBranchNet, proposal: Proposal) -> None:
    """Keep the proposal in the converted network's record, from where the report reads it."""
    folder = chain.folder / "converted"
    if net.record.get("proposal") is None:
        net.record["proposal"] = proposal.to_dict()
        chain.once(lambda: net.save(folder, read_manifest(folder)["notes"]))


def _shown(plan: BudgetPlan | None, proposal: Proposal | None) -> tuple[dict[str, Any], str]:
    """What was planned, as JSON and as tables."""
    if proposal is None:
        return (plan.to_dict(), budget_table(plan).to_text()) if plan else ({}, "")
    found = {"proposal": proposal.to_dict()}
    tables = [proposal_table(found["proposal"]).to_text()]
    if plan is not None:
        found["plan"] = plan.to_dict()
        tables.append(budget_table(plan).to_text())
    return found, "\n".join(tables)
