"""Claim: most networks of timm convert, others say why not in a line, and none is silently wrong.

Every network is followed, traced, given a budget, converted on eight random inputs, and every path
is compared with the dense network in which the dropped channels are zero, apart from the library's
own check and through the whole network. They run in a process of their own; the file is written
after each, and the same command goes on after an interrupt.

    python -m benchmarks.support --json results/support.json               what is missing there
    python -m benchmarks.support --models resnet18 swin_tiny_patch4_window7_224
    python -m benchmarks.support --json results/support.json --markdown MODEL_SUPPORT.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from benchmarks.support_models import subject, subjects
from benchmarks.support_page import page
from benchmarks.support_row import measured

from sigmabranch.backbones.timm import load_timm
from sigmabranch.errors import CheckpointError
from sigmabranch.files import atomic_write, read_json, write_json
from sigmabranch.tasks.provenance import provenance

SEED = 0


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    result = _known(options.json)
    wanted = options.models or [found.name for found in subjects()]
    missing = [name for name in wanted if options.models or name not in result["rows"]]
    worker = Worker(options.timeout)
    for number, name in enumerate(missing, start=1):
        row = worker.measured(name)
        result = _with(result, row)
        if options.json:
            write_json(options.json, result)
        print(f"[{number}/{len(missing)}] {summary(row)}", file=sys.stderr, flush=True)
    if options.markdown:
        with atomic_write(options.markdown) as temporary:
            temporary.write_text(page(result), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these, measured anew")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows are kept")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the page to write of them")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="a network")
    return parser


def _known(path: Path | None) -> dict[str, Any]:
    if path is None or not path.exists():
        return {"rows": {}}
    result: dict[str, Any] = read_json(path)
    return result


def _with(result: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The result with one more row, in the order of the sweep, and this run's origin."""
    rows = {**result["rows"], row["name"]: dict(row)}
    order = [found.name for found in subjects()]
    names = [name for name in order if name in rows] + [name for name in rows if name not in order]
    return {
        "benchmark": "support",
        "provenance": {
            **provenance(torch.device("cpu")),
            "timm": load_timm().__version__,
            "load_average": list(os.getloadavg()),
        },
        "seed": SEED,
        "rows": {name: rows[name] for name in names},
    }


class Worker:
    """A process of its own that measures network after network; a new one after a failure."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._pool: Pool | None = None

    def measured(self, name: str) -> dict[str, Any]:
        """A network's row, whatever becomes of the process that makes it."""
        self._pool = self._pool or multiprocessing.get_context("spawn").Pool(1)
        try:
            return self._pool.apply_async(measured, (name, SEED)).get(self._timeout)
        except multiprocessing.TimeoutError:
            why = f"not done after {self._timeout:.0f} s"
        except Exception as error:  # a bug in one network's row must not lose the others
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        self._pool.terminate()
        self._pool = None
        return {**asdict(subject(name)), "outcome": "failed", "reason": why}


def summary(row: Mapping[str, Any]) -> str:
    """A network's row in a line."""
    seconds = sum(row.get("seconds", {}).values())
    if "active_params" not in row:
        return f"{row['name']}: {row['outcome']}: {row['reason']}"
    return (
        f"{row['name']}: {row['outcome']}, {row['active_params']:,} of {row['params']:,} "
        f"parameters ({row['spent']:.2%} of the budget), {seconds:.1f} s"
    )


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        sys.exit(str(error))
