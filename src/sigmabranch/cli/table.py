"""``sigmabranch table``: the paper's tables beside ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sigmabranch import files
from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.errors import ConfigError
from sigmabranch.peers import TRAITS, published_counts
from sigmabranch.report import (
    Table,
    ablation_table,
    comparison_table,
    main_rows,
    main_table,
    published_table,
    systems_table,
)
from sigmabranch.tasks import group_results, read_results

Made = tuple[Table, dict[str, Any]]


def command(
    name: Annotated[
        str,
        typer.Argument(
            help="systems (the paper's table I: what kind each system is), main (III: the three "
            "tasks), published (IV and V: printed figures of other systems beside exact counts), "
            "comparison or ablations (measured ones; VI)."
        ),
    ],
    results: Annotated[
        Path,
        typer.Option(
            help="For main the folder of the files that run --result wrote; for comparison and "
            "ablations the file that compare --result wrote."
        ),
    ] = Path("results"),
    as_json: options.Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX (booktabs).")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Print a table of the paper beside ours."""
    if name not in TABLES:
        raise ConfigError(f"unknown table {name!r}: known are {', '.join(TABLES)}")
    if as_json + markdown + latex + csv > 1:
        raise ConfigError("choose one of --json, --markdown, --latex and --csv")
    table, content = TABLES[name](results)
    forms = {markdown: table.to_markdown, latex: table.to_latex, csv: table.to_csv}
    text = forms.get(True, table.to_text)
    print_result({"table": name, **content}, text(), as_json)


def _main(results: Path) -> Made:
    rows = main_rows(group_results(read_results(results)), str(results))
    return main_table(rows), {"rows": rows}


def _systems(_: Path) -> Made:
    traits = {name: asdict(row) for name, row in TRAITS.items()}
    return systems_table(traits), {"systems": traits}


def _published(_: Path) -> Made:
    counts = published_counts()
    return published_table(counts), {"counts": counts}


def _comparison(results: Path) -> Made:
    found = _read(results)
    return comparison_table(found), found


def _ablations(results: Path) -> Made:
    found = _read(results)
    return ablation_table(found), found


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file that compare --result wrote")
    return files.read_json(path)


TABLES: Mapping[str, Callable[[Path], Made]] = {
    "systems": _systems,
    "main": _main,
    "published": _published,
    "comparison": _comparison,
    "ablations": _ablations,
}
