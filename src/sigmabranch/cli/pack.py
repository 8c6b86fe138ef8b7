"""``sigmabranch pack``: a network becomes a package that a device reads node by node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.cli.source import read_source
from sigmabranch.data import EMBEDDED, Dataset
from sigmabranch.deploy import Package, pack
from sigmabranch.measure import evaluate
from sigmabranch.net import SigmaBranchNet, is_branched
from sigmabranch.report import package_table
from sigmabranch.saving import load
from sigmabranch.tasks import open_task_data, ordered
from sigmabranch.tasks.counting import example

# Enough to tell a leaf that is used from one that is not.
USAGE_SAMPLES = 2000


def command(
    net: Annotated[Path, typer.Argument(help="Folder of a saved network.")],
    data: options.Data = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the package.", show_default="NET-package"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a network as a package; with --data it also knows class names and leaf usage."""
    task, seed = read_source(net, None, None)
    model = load(net)
    notes = {"task": task.to_dict(), "seed": seed}
    seen: dict[str, Any] = {}
    if data is not None or task.data.name in EMBEDDED:
        dataset = open_task_data(task, data, torch.device("cpu"))
        notes["classes"] = list(dataset.class_names)
        seen = _leaves(model, dataset) if is_branched(model) else {}
    folder = out or net.resolve().with_name(f"{net.resolve().name}-package")
    package = pack(model, folder, example(task), notes=notes, **seen)
    print_result(_result(package), package_table(package).to_text(), as_json)


def _leaves(net: SigmaBranchNet, dataset: Dataset) -> dict[str, Any]:
    """How often training samples, and those of each class, take each leaf."""
    figures = evaluate(net, ordered(dataset.limit(train=USAGE_SAMPLES).train))
    return {
        "usage": dict(zip(figures["leaves"], figures["usage"], strict=True)),
        "class_share": figures["class_leaf_share"],
    }


def _result(package: Package) -> dict[str, object]:
    return {
        "folder": str(package.folder),
        "nodes": {key: node.weight_bytes for key, node in package.nodes.items()},
        "path_bytes": {leaf: package.path_bytes(leaf) for leaf in package.leaves},
        "usage": dict(package.usage),
    }
