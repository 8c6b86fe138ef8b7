"""What follows from the trials of a search: the front, the best, how to train them in full."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sigmabranch.conversion import Budget
from sigmabranch.tasks import TASKS, Task
from sigmabranch.tasks.task import SECTIONS

#: One trial's record.
Trial: TypeAlias = Mapping[str, Any]

#: How the best trial is chosen.
RULE = (
    "the highest validation accuracy among the trials within the budget, or among all without one; "
    "of equals, the one with fewer active parameters, then with fewer multiply-adds"
)


def pareto(trials: Sequence[Trial]) -> list[int]:
    """Numbers of the complete trials that no other is at least as good as, by rising size.

    A trial is as good as another if its ``top1`` is not lower and its ``active_params`` and
    ``macs`` are not higher; of equals, the first counts.
    """
    front: list[Trial] = []
    for trial in sorted(_complete(trials), key=_order):
        # Whatever is more accurate has come before.
        if not any(_costs_no_more(other, trial) for other in front):
            front.append(trial)
    return [trial["number"] for trial in sorted(front, key=lambda trial: trial["active_params"])]


def best_of(trials: Sequence[Trial], budget: Budget | None) -> int | None:
    """Number of the best trial by :data:`RULE`; None if no complete one is within the budget."""
    within = [
        trial
        for trial in _complete(trials)
        if budget is None or budget.bytes(trial["active_params"]) <= budget.active_bytes
    ]
    return min(within, key=_order)["number"] if within else None


def settings_of(task: Task) -> list[str]:
    """The ``--set`` values that lead from the named task to this one."""
    base, own = TASKS.get(task.name, task).to_dict(), task.to_dict()
    return [
        f"{section}.{name}={json.dumps(value, separators=(',', ':'))}"
        for section in SECTIONS
        for name, value in own[section].items()
        if value != base[section].get(name)
    ]


def command(task: str, trial: Trial, data: Path | None, seed: int) -> str:
    """The command line that trains a trial's tree in full and measures it on the test split."""
    options = ["--out", f"runs/{task}-trial{trial['number']}"]
    options += [] if data is None else ["--data", str(data)]
    options += ["--seed", str(seed)] if seed else []
    for setting in trial["settings"]:
        options += ["--set", setting]
    return shlex.join(["sigmabranch", "run", task, *options])


def _complete(trials: Sequence[Trial]) -> Iterator[Trial]:
    return (trial for trial in trials if trial["state"] == "complete")


def _order(trial: Trial) -> tuple[float, int, int, int]:
    return -trial["top1"], trial["active_params"], trial["macs"], trial["number"]


def _costs_no_more(one: Trial, other: Trial) -> bool:
    return all(one[name] <= other[name] for name in ("active_params", "macs"))
