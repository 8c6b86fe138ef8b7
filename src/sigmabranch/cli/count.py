"""``sigmabranch count``: parameters, bytes and multiply-adds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sigmabranch import files
from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.cli.source import read_source
from sigmabranch.report import cost_table
from sigmabranch.saving import load_net
from sigmabranch.tasks import count_net, count_task, find_task


def command(
    what: Annotated[
        str, typer.Argument(metavar="TASK|NET", help="A task, or the folder of a branched network.")
    ],
    out: options.OutFile = None,
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Count parameters, bytes and MACs, without data."""
    if Path(what).is_dir():
        task, _ = read_source(Path(what), "branched", settings)
        cost = count_net(load_net(what), task)
    else:
        cost = count_task(find_task(what).with_settings(settings or ()))
    if out is not None:
        files.write_json(out, cost)
    print_result(cost, cost_table(cost).to_text(), as_json)
