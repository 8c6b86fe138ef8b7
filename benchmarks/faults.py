"""Claim: nothing is lost, and nothing wrong is let in, whatever happens to the disk or the process.

faults: every operation on the disk fails in turn, or is the last before a loss of power, while
something is written over something older; what is left is the old state or the new one.
mutations: every kind of file is altered at random; it is refused in one line, or says what it
said before. Resealed ones have hashes that fit nonsense.
kills: every verb is killed at random times by SIGKILL, SIGTERM or SIGINT; the same command then
ends with the same bits as one that nobody killed.

    python -m benchmarks.faults --quick             a few of each
    python -m benchmarks.faults --part mutations    one part; its figures join those in --out
    python -m benchmarks.faults --fresh             forget what --out holds

What was done before is not done again: an interrupted run goes on, and a larger one adds to it.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import parser, publish_parts, table

from sigmabranch import files

PARTS = ("faults", "mutations", "kills")
COLUMNS = {
    "faults": ("faults", "old", "new", "refused", "wrong", "tracebacks", "hangs"),
    "mutations": (
        *("mutations", "refused", "same", "altered", "traceback", "hang"),
        *("resealed", "resealed_refused", "resealed_read"),
        *("resealed_traceback", "resealed_hang", "resealed_outside", "resealed_memory"),
    ),
    "kills": ("kills", "runs", "differing", "hangs", "tracebacks", "leftovers"),
}
FAILURES = {
    *("wrong", "tracebacks", "hangs", "altered", "traceback", "hang", "differing", "leftovers"),
    *("resealed_traceback", "resealed_hang", "resealed_outside", "resealed_memory"),
}


class Figures:
    """What was seen so far, of this run and of those before it."""

    def __init__(self, options: Any) -> None:
        self.options = options
        found = files.read_json(options.out) if options.out.exists() and not options.fresh else {}
        self.parts: dict[str, dict[str, Counter]] = {
            part: defaultdict(
                Counter, {row["of"]: Counter({**row, "of": 0}) for row in found.get(part, [])}
            )
            for part in PARTS
        }

    def rows(self, part: str) -> list[dict[str, Any]]:
        """One row for each subject or verb, and their sum."""
        known = {name: seen for name, seen in self.parts[part].items() if sum(seen.values())}
        return [
            {"of": name, **{column: seen[column] for column in COLUMNS[part]}}
            for name, seen in known.items()
        ]

    def keep(self) -> None:
        """Write them down."""
        publish_parts(self.options, {part: self.rows(part) for part in PARTS}, silent=True)

    def total(self, part: str) -> dict[str, Any]:
        """The sum of a part's rows."""
        rows = self.rows(part)
        return {"of": part} | {name: sum(row[name] for row in rows) for name in COLUMNS[part]}


def inject(figures: Figures, folder: Path, step: int) -> None:
    """Faults: each subject that is not known yet."""
    from benchmarks.faults_injection import UNITS, injected  # noqa: PLC0415 (computes with torch)

    for unit in UNITS:
        if not figures.parts["faults"][unit]["faults"]:
            figures.parts["faults"][unit] = injected(folder, unit, step)
            figures.keep()


def mutate(figures: Figures, folder: Path, count: int, resealed: int) -> None:
    """Mutations, each subject in turn."""
    from benchmarks.faults_mutations import mutated  # noqa: PLC0415 (computes with torch)

    for _ in mutated(folder, figures.parts["mutations"], count, resealed, figures.keep):
        pass


def kill(figures: Figures, folder: Path, count: int) -> None:
    """Kills, each verb in turn."""
    from benchmarks.faults_kills import killed  # noqa: PLC0415 (loads what all verbs need)

    for _ in killed(folder, figures.parts["kills"], count, figures.keep):
        pass


def main() -> None:
    options = parser(__doc__, "faults")
    options.add_argument("--quick", action="store_true", help="a few of each")
    options.add_argument("--json", action="store_true", help="print JSON alone")
    options.add_argument("--fresh", action="store_true", help="forget what --out holds")
    options.add_argument("--part", choices=PARTS, action="append", help="only this one; repeatable")
    options.add_argument("--mutations", type=int, default=1000, help="of each kind of file")
    options.add_argument("--resealed", type=int, default=120, help="of each kind of file")
    options.add_argument("--kills", type=int, default=15, help="of each verb")
    options = options.parse_args()
    if options.quick:
        options.mutations, options.resealed, options.kills = 40, 10, 1
    torch.set_num_threads(1)
    figures = Figures(options)
    wanted: Sequence[str] = options.part or PARTS
    with tempfile.TemporaryDirectory() as name:
        # Kills come first: their forks need a process that has not computed yet.
        if "kills" in wanted:
            kill(figures, Path(name) / "kills", options.kills)
        if "faults" in wanted:
            inject(figures, Path(name) / "faults", 9 if options.quick else 1)
        if "mutations" in wanted:
            mutate(figures, Path(name) / "mutations", options.mutations, options.resealed)
    publish_parts(options, {part: figures.rows(part) for part in PARTS})
    totals = [figures.total(part) for part in wanted]
    if not options.json:
        print("\n".join(f"in all\n{table([total])}" for total in totals))
    if any(total[column] for total in totals for column in FAILURES & total.keys()):
        sys.exit("something was lost or let in: see above")


if __name__ == "__main__":
    main()
