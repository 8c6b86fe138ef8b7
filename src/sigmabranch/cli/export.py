"""``sigmabranch export``: write a network for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.cli.source import read_source
from sigmabranch.deploy.export import FORMATS, Export, check_format, export_net
from sigmabranch.saving import load
from sigmabranch.tasks import open_task_data

# Held-out inputs on which the export is compared with the network.
_SAMPLES = 16


def command(
    net: Annotated[Path, typer.Argument(help="Folder of a saved network.")],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.", metavar="NAME")],
    data: options.Data = None,
    out: options.OutBeside = None,
    as_json: options.Json = False,
) -> None:
    """Write a network for another runtime, and compare the two leaf by leaf."""
    check_format(format)
    task, seed = read_source(net, None, None)
    dataset = open_task_data(task, data, torch.device("cpu"))
    test = dataset.test
    order = torch.arange(min(_SAMPLES, len(test)))
    example, _ = next(iter(test.batches(order, len(order))))
    folder = out or net.resolve().parent / f"{net.resolve().name}-{format}"
    notes = {"task": task.to_dict(), "seed": seed, "classes": list(dataset.class_names)}
    export = export_net(load(net), folder, example, format=format, notes=notes)
    print_result(export.to_dict(), _text(export), as_json)


def _text(export: Export) -> str:
    """The files, and how each leaf compares."""
    lines = [f"{export.folder}:"]
    lines += [f"  {name}  {entry['bytes']:,} bytes" for name, entry in export.files.items()]
    lines += [
        f"  leaf {check.leaf}  differs by at most {check.max_rel:.1e} of its largest logit "
        f"({check.routed} inputs routed there, {check.forced} sent)"
        for check in export.checks
    ]
    return "\n".join(lines)
