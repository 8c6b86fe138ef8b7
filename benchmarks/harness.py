"""How every benchmark here measures, prints and keeps its figures.

Systems that are compared run in turn, round after round, in one process: a machine that is busy or
throttles slows all of them alike, and what is reported are medians and ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sigmabranch.files import write_json
from sigmabranch.tasks.provenance import provenance
from sigmabranch.training import resolve_device

RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of each system in each round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, system: str) -> float:
        return statistics.median(self.seconds[system])

    def ratio(self, system: str, to: str) -> float:
        """Median over the rounds of ``system``'s time divided by ``to``'s."""
        rounds = zip(self.seconds[system], self.seconds[to], strict=True)
        return statistics.median(mine / other for mine, other in rounds)


def interleaved(
    systems: Mapping[str, Callable[[], Any]], rounds: int, *, warm: bool = False
) -> Timings:
    """Time the systems in turn for so many rounds, after an uncounted one unless they are warm."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds if warm else rounds + 1):
        for name, run in systems.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if warm or number:
                seconds[name].append(time.perf_counter() - began)
    return Timings(seconds)


def parser(what: str | None, name: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """The options that all benchmarks share: ``--device``, ``--out``, and ``--rounds`` if timed."""
    options = argparse.ArgumentParser(
        description=what, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds is not None:
        options.add_argument("--rounds", type=int, default=rounds, help="measured rounds")
    options.add_argument("--device", type=resolve_device, default="cpu", metavar="NAME")
    options.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", metavar="FILE")
    return options


def publish(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a table and write them, with where they come from, to ``options.out``."""
    print(table(rows))
    write_json(options.out, {**_header(options), "rows": list(rows)})
    print(f"written to {options.out}")


def publish_parts(
    options: argparse.Namespace,
    parts: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    silent: bool = False,
) -> None:
    """The same for several tables; as JSON alone with ``options.json``, or not printed at all."""
    result = {**_header(options), **parts}
    write_json(options.out, result)
    if silent:
        return
    if options.json:
        print(json.dumps(result))
        return
    for name, rows in parts.items():
        print(f"{name}\n{table(rows) if rows else 'none'}\n")
    print(f"written to {options.out}")


def _header(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, where and how."""
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "device")}
    return {
        "benchmark": options.out.stem,
        "provenance": provenance(options.device),
        "load_average": list(os.getloadavg()),
        "settings": {key: _plain(value) for key, value in settings.items()},
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned text, numbers to four significant digits."""
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
