"""``sigmabranch count``: parameters, bytes and multiply-adds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Count the dense network and one path of the branched one; needs neither data nor training."""
    if Path(what).is_dir():
        task, _ = read_source(Path(what), "branched", settings)
        cost = count_net(load_net(what), task)
    else:
        cost = count_task(find_task(what).with_settings(settings or ()))
    print_result(cost, cost_table(cost).to_text(), as_json)
