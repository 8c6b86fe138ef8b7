"""Every operation on the disk goes wrong in turn: what is left is the old state, or the new one."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults_disk import CRASHED, READS, Disk
from benchmarks.faults_subjects import SUBJECTS, Subject

from sigmabranch.errors import SigmaBranchError

ERRORS, CRASHES = ("error", "full"), ("killed", "power", "torn")
HANG_SECONDS = 120
# What is written as one; of the others each file is.
UNITS = (
    *("dense network", "branched network", "package", "checkpoint", "result", "journal", "curves"),
)


def injected(folder: Path, unit: str, step: int) -> Counter:
    """How many faults, and how many of them left something else.

    Args:
        folder: to work in.
        unit: one of :data:`UNITS`.
        step: take every so many operations.
    """
    subject, place = SUBJECTS[unit], folder / unit.replace(" ", "-")
    seen: Counter = Counter()
    for fresh in (False, True):
        _write_faults(subject, place, step, seen, fresh=fresh)
    _read_faults(subject, place, step, seen)
    return seen


def _write_faults(subject: Subject, place: Path, step: int, seen: Counter, *, fresh: bool) -> None:
    """Faults while the new state is written over the old one, or into an empty folder."""
    before, now = place / "before", place / "now"
    expected = {}
    for variant, key in enumerate(("old", "new")):
        shutil.rmtree(before, ignore_errors=True)
        before.mkdir(parents=True)
        subject.write(before, 0)
        if variant:
            subject.write(before, 1)
        expected[subject.read(before)] = key
    shutil.rmtree(before)
    before.mkdir()
    if not fresh:
        subject.write(before, 0)
    count = len(_run(subject, before, now, None, "error").kinds)
    for at in range(0, count, step):
        for how in (*ERRORS, *CRASHES):
            seen["faults"] += 1
            if how in ERRORS:
                outcome = _caught(lambda at=at, how=how: _run(subject, before, now, at, how))
            else:
                outcome = _forked(subject, before, now, at, how)
            if outcome in ("tracebacks", "hangs"):
                seen[outcome] += 1
                print(f"{place.name}: operation {at}, {how}: {outcome}")
            _judge(subject, now, expected, seen, f"{place.name}: operation {at}, {how}", fresh)
    shutil.rmtree(place)


def _run(subject: Subject, before: Path, now: Path, at: int | None, how: str) -> Disk:
    shutil.rmtree(now, ignore_errors=True)
    shutil.rmtree(now.with_name("now-backups"), ignore_errors=True)
    shutil.copytree(before, now)
    with Disk(now, at, how).mounted() as disk:
        subject.write(now, 1)
    return disk


def _caught(act: Any) -> str:
    """``"done"``, ``"refused"`` in one line, or ``"tracebacks"``."""
    try:
        act()
    except SigmaBranchError as error:
        return "refused" if "\n" not in str(error) else "tracebacks"
    except OSError:
        return "refused"  # the command line says it in one line
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return "tracebacks"
    return "done"


def _forked(subject: Subject, before: Path, now: Path, at: int, how: str) -> str:
    """The same in a process that ends at the fault."""
    child = os.fork()
    if not child:
        signal.alarm(HANG_SECONDS)
        _run(subject, before, now, at, how)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGALRM:
        return "hangs"
    return "done" if code in (0, CRASHED) else "tracebacks"


def _judge(
    subject: Subject, now: Path, expected: dict[str, str], seen: Counter, where: str, fresh: bool
) -> None:
    """What a reader finds, and whether the next writer gets by."""
    try:
        state = expected.get(subject.read(now), "wrong")
    except (SigmaBranchError, FileNotFoundError):
        state = "old" if fresh else "wrong"  # nothing was there
    if state == "wrong":
        print(f"{where}: neither old nor new")
    seen[state] += 1
    try:
        subject.write(now, 1)
        again = expected.get(subject.read(now)) == "new"
    except SigmaBranchError as error:
        print(f"{where}: {error}")
        again = False
    left = [path for path in now.rglob(".*") if path.name.endswith((".tmp", ".pending"))]
    if left or not again:
        print(f"{where}: the next run leaves {[path.name for path in left]}, same: {again}")
        seen["wrong"] += 1


def _read_faults(subject: Subject, place: Path, step: int, seen: Counter) -> None:
    """Errors while a state is read: one line, or the right answer."""
    before, now = place / "before", place / "now"
    before.mkdir(parents=True)
    subject.write(before, 0)
    expected = subject.read(before)

    def read(at: int | None) -> Disk:
        shutil.rmtree(now, ignore_errors=True)
        shutil.copytree(before, now)
        with Disk(now, at, "error").mounted() as disk:
            found.append(subject.read(now))
        return disk

    found: list[str] = []
    kinds = read(None).kinds
    places = [number for number, kind in enumerate(kinds) if kind in READS]
    for at in places[::step]:
        seen["faults"] += 1
        found.clear()
        outcome = _caught(lambda at=at: read(at))
        key = outcome if outcome != "done" else "new" if found == [expected] else "wrong"
        if key in ("wrong", "tracebacks"):
            print(f"{place.name}: reading, operation {at}: {key}")
        seen["refused" if key == "refused" else key] += 1
    shutil.rmtree(place)
