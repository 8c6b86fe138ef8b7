"""``sigmabranch table``: the paper's tables beside ours, from result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.errors import ConfigError
from sigmabranch.report import main_rows, main_table
from sigmabranch.tasks import group_results, read_results


def command(
    name: Annotated[str, typer.Argument(help="main (the paper's table III).")],
    results: Annotated[
        Path, typer.Option(help="Folder of the files that run --result wrote.")
    ] = Path("results"),
    as_json: options.Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX (booktabs).")] = False,
) -> None:
    """Print a table of the paper beside ours."""
    if name != "main":
        raise ConfigError(f"unknown table {name!r}: known is main")
    if as_json + markdown + latex > 1:
        raise ConfigError("choose one of --json, --markdown and --latex")
    rows = main_rows(group_results(read_results(results)), str(results))
    table = main_table(rows)
    text = table.to_markdown if markdown else table.to_latex if latex else table.to_text
    print_result({"table": name, "rows": rows}, text(), as_json)
