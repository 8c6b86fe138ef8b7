"""``sigmabranch recipe``: the constants of a task and where each comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.report import recipe_table
from sigmabranch.tasks import PAPER, constants, find_task


def command(
    task: Annotated[str, typer.Argument(help=options.TASK_HELP)],
    settings: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Print a task's constants and which of them are the paper's."""
    chosen = find_task(task).with_settings(settings or ())
    found, of_the_paper = constants(chosen), chosen.name in PAPER
    result = {
        "task": chosen.name,
        "of_the_paper": of_the_paper,
        "constants": [constant.to_dict() for constant in found],
    }
    print_result(result, recipe_table(found, of_the_paper=of_the_paper).to_text(), as_json)
