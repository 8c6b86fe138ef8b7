"""Processes that are killed at random times: the same command then ends as if it had not been.

Each command line runs in a fork of this process, so that imports are paid once. Nothing here may
start a thread or compute with torch, or forks would not be whole.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults_subjects import SETTINGS

from sigmabranch import files
from sigmabranch.cli import main
from sigmabranch.training import loop

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HANG_SECONDS = 600
STOPPED = 3
TASK = ("digits-resnet", *(part for setting in SETTINGS for part in ("--set", setting)))
# What differs between two runs although they did the same.
_OWN = {"seconds", "provenance", "made", "latency", "command", "date"}
_KEPT = (".json", ".csv", ".safetensors", ".onnx", ".data", ".txt", ".md")
_UNKEPT = ("tensorboard", "state.json", "search.lock", ".sigmabranch")


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command line to be killed.

    Attributes:
        line: its arguments; it writes into ``out`` of its working folder.
        needs: verb whose ``out`` it finds as ``in``, or none.
        processes: that run it together.
    """

    line: Sequence[str]
    needs: str = ""
    processes: int = 1


VERBS: Mapping[str, Verb] = {
    "train": Verb(line=("train", *TASK, "--out", "out")),
    "convert": Verb(line=("convert", "in/dense", "--out", "out"), needs="train"),
    "finetune": Verb(line=("finetune", "in/converted", "--out", "out"), needs="convert"),
    "run": Verb(line=("run", *TASK, "--out", "out", "--result", "out/published.json")),
    "evaluate": Verb(line=("evaluate", "in/branched", "--out", "out/a.json"), needs="finetune"),
    "count": Verb(line=("count", *TASK, "--out", "out/count.json")),
    "pack": Verb(line=("pack", "in/branched", "--out", "out"), needs="finetune"),
    "simulate": Verb(
        line=("simulate", "in", "--compute", "1G", "--bandwidth", "1MB", "--out", "out"),
        needs="pack",
    ),
    "export": Verb(
        line=("export", "in/branched", "--format", "onnx-nodes", "--out", "out"), needs="finetune"
    ),
    "quantize": Verb(
        line=("quantize", "in/branched", "--out", "out", "--result", "out/figures.json"),
        needs="finetune",
    ),
    "compare": Verb(
        line=("compare", *TASK, "--rows", "sigma-branch,single-path,fpgm", "--out", "out")
    ),
    "search": Verb(
        line=("search", *TASK, "--trials", "3", "--epochs", "2", "--validation", "0.25",
              "--space", "stages=layer2,layer3", "--out", "out"),
    ),
    "train, 2 processes": Verb(line=("train", *TASK, "--out", "out"), processes=2),
    "run, 2 processes": Verb(line=("run", *TASK, "--out", "out"), processes=2),
}  # fmt: skip


def killed(
    folder: Path, known: dict[str, Counter], count: int, keep: Callable[[], None]
) -> Iterator[None]:
    """Kill each verb so many times, going on from what is known.

    Args:
        folder: to work in; what runs that were not killed have made is kept there.
        known: verb → what was seen so far; filled.
        count: of kills of each verb.
        keep: called after each.
    """
    loop.CHECKPOINT_SECONDS = loop.CHECKPOINT_SHARE = 0.0  # as often as it can
    for name, verb in VERBS.items():
        seen = known[name]
        while seen["kills"] < count:
            whole, took = _whole(folder, name)
            _try(folder, name, verb, random.Random(f"{name} {seen['kills']}"), seen, whole, took)
            keep()
        yield


def _whole(folder: Path, name: str) -> tuple[Path, float]:
    """What a verb makes that nobody kills, made once, and in how many seconds."""
    place = folder / "whole" / name.replace(" ", "-")
    clock = place / "seconds"
    if not clock.exists():
        _prepare(folder, place, VERBS[name])
        began = time.monotonic()
        group = Group(VERBS[name], place)
        code = group.wait(HANG_SECONDS)
        if code:
            raise SystemExit(f"{name} does not even run: {group.said()}")
        clock.write_text(str(time.monotonic() - began))
    return place / "out", float(clock.read_text())


def _prepare(folder: Path, place: Path, verb: Verb) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if verb.needs:
        shutil.copytree(_whole(folder, verb.needs)[0], place / "in")


def _try(
    folder: Path,
    name: str,
    verb: Verb,
    draw: random.Random,
    seen: Counter,
    whole: Path,
    took: float,
) -> None:
    """One run: killed some times, then left alone; compared with one that was not killed."""
    place = folder / "killed"
    _prepare(folder, place, verb)
    for _ in range(draw.randint(1, 3)):
        group = Group(verb, place)
        code = group.kill(draw.uniform(0, took), draw.choice(SIGNALS), draw)
        seen["kills"] += 1
        seen["hangs"] += code is None
        seen["tracebacks"] += "Traceback" in group.said()
        if code == 0:
            break
    for _ in range(3):
        group = Group(verb, place)
        code = group.wait(HANG_SECONDS)
        if code != STOPPED:
            break
    seen["runs"] += 1
    seen["hangs"] += code is None
    wrong = (
        [f"exit code {code}: {group.said()[-500:]}"] if code else differing(whole, place / "out")
    )
    if wrong:
        seen["differing"] += 1
        print(f"{name}: {wrong[:3]}")
    left = [*(place / "out").rglob("*.sigmabranch.tmp"), *(place / "out").rglob("*.pending")]
    if left:
        seen["leftovers"] += 1
        print(f"{name}: left behind: {left[:3]}")


class Group:
    """The processes of one command line, in forks of this one."""

    def __init__(self, verb: Verb, place: Path) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (read after the processes)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.living = {}
        for rank in range(verb.processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": verb.processes,
                     "LOCAL_WORLD_SIZE": verb.processes, "MASTER_PORT": port,
                     "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
            child = os.fork()
            if not child:
                _become(verb.line, place, self._log.fileno(), ranks if verb.processes > 1 else {})
            self.living[child] = rank

    def kill(self, seconds: float, number: signal.Signals, draw: random.Random) -> int | None:
        """Signal one process after some seconds, or all; those that wait for it are killed too."""
        code = self.wait(seconds, kill=False)
        if not self.living:
            return code
        chosen = [*self.living] if draw.random() < 0.5 else [draw.choice([*self.living])]
        for process in chosen:
            os.kill(process, number)
        return self.wait(HANG_SECONDS)

    def wait(self, seconds: float, *, kill: bool = True) -> int | None:
        """The worst exit code, or None if they had to be killed after so many seconds."""
        worst, end = 0, time.monotonic() + seconds
        while self.living and time.monotonic() < end:
            for process in [*self.living]:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    del self.living[process]
                    worst = max(worst, abs(os.waitstatus_to_exitcode(status)))
            time.sleep(0.002)
        if not self.living or not kill:
            return worst
        for process in self.living:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        self.living.clear()
        return None

    def said(self) -> str:
        """All that the processes wrote."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


def _become(line: Sequence[str], place: Path, log: int, ranks: Mapping[str, int | str]) -> None:
    """Run a command line in place of this process, and end."""
    code = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(place)
        os.environ |= {name: str(value) for name, value in ranks.items()}
        sys.argv = ["sigmabranch", *line]
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def differing(whole: Path, found: Path) -> list[str]:
    """The files that are not what a run made that nobody killed."""
    names = {
        str(path.relative_to(place))
        for place in (whole, found)
        for path in place.rglob("*")
        if path.suffix in _KEPT and not any(part in str(path) for part in _UNKEPT)
    }
    return [name for name in sorted(names) if _content(whole / name) != _content(found / name)]


def _content(path: Path) -> Any:
    if not path.exists():
        return None
    if path.suffix == ".json":
        return _common(files.read_json(path))
    if path.suffix == ".csv":
        rows = csv.DictReader(path.read_text().splitlines())
        return [{key: row[key] for key in row if key not in _OWN} for row in rows]
    return path.read_bytes()


def _common(value: Any) -> Any:
    """What two runs that did the same agree on."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if key not in _OWN}
        # A manifest names a JSON file that holds seconds by its hash.
        return {key: _common(part) for key, part in kept.items()}
    return [_common(part) for part in value] if isinstance(value, list) else json.dumps(value)
