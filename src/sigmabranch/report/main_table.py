"""Table III of the paper beside ours: exact counts, and accuracies from result files."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeAlias

from sigmabranch.report.recipe_table import written
from sigmabranch.report.tables import NOTHING, Table, count
from sigmabranch.tasks import (
    PAPER,
    TASKS,
    Group,
    PaperTask,
    Spread,
    Task,
    constants,
    count_task,
)

Row: TypeAlias = tuple[str, ...]

_SCHEDULE = ("epochs", "batch_size", "schedule", "warmup_epochs", "step_epochs")
_DENSE_MEASURED, _MEASURED = ("top1", "top5"), ("top1", "top5", "balance")
_ACCURACIES = (("Top-1 %", "top1", 2), ("Top-5 %", "top5", 2), ("Balance", "balance", 3))
_NOTES = (
    "The paper's columns hold what it prints; ours hold exact counts, and accuracies as mean ± "
    "standard deviation over seeds. FLOPs are those of one path at batch 1, with 2 per element "
    "of a batch norm and 5 of a layer norm. Accuracies are those of the weights at "
    "the end of training; the test split chose nothing.",
)
_DOUBLED = (
    "{title}: the paper's FLOPs fit its network only at 2 per multiply-add, although it names "
    "fvcore and its ResNets fit at 1. Both counts are given; only those of one convention compare."
)


def main_rows(groups: Iterable[Group], folder: str) -> list[dict[str, Any]]:
    """The paper's tasks: its figures, our counts and our runs, JSON-able.

    Args:
        groups: from :func:`sigmabranch.tasks.group_results`; other tasks' are passed over.
        folder: where a new result should go, as commands are to name it.

    Raises:
        MissingDependency: fvcore is not installed.
    """
    groups = list(groups)
    return [
        _task_row(TASKS[name], paper, [g for g in groups if g.task.name == name], folder)
        for name, paper in PAPER.items()
    ]


def main_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The rows of :func:`main_rows` for people: per task the counts, then each group of runs."""
    rows = list(rows)
    groups = [group for row in rows for group in _groups(row)]
    return Table(
        header=("", "dense, paper", "dense, ours", "branched, paper", "branched, ours"),
        groups=tuple(groups),
        notes=(*_NOTES, *(note for row in rows for note in _row_notes(row))),
    )


# -- the figures ---------------------------------------------------------------------------------


def _task_row(task: Task, paper: PaperTask, groups: list[Group], folder: str) -> dict[str, Any]:
    counts = _counts(count_task(task))
    file = f"{folder}/{task.name}-seed0.json"
    return {
        "task": task.name,
        "title": paper.title,
        "paper": {
            "dense": asdict(paper.dense),
            "branched": asdict(paper.branched),
            "active_reduction": paper.active_reduction,
            "flops_reduction": paper.flops_reduction,
            "flops_per_mac": paper.flops_per_mac,
        },
        "counts": counts,
        "runs": [_run(group, task, counts) for group in groups],
        "command": f"sigmabranch run {task.name} --data data/{task.data.name} "
        f"--result {shlex.quote(file)}",
    }


def _counts(cost: Mapping[str, Any]) -> dict[str, Any]:
    """Exact parameters, operations in both conventions, and what the branching saves."""
    dense, net = cost["dense"], cost["net"]
    counts = {
        "dense": {"stored": dense["params"], "run": dense["params"]},
        "branched": {"stored": net["total_params"], "run": net["active_params"]},
    }
    for name in ("macs", "flops_doubled"):
        if name in dense and name in net:
            counts["dense"][name], counts["branched"][name] = dense[name], net[name]
    saved = {
        name: 100 * (1 - counts["branched"][name] / counts["dense"][name])
        for name in counts["dense"]
        if name != "stored"
    }
    return {**counts, "reduction_percent": saved}


def _run(group: Group, task: Task, counts: Mapping[str, Any]) -> dict[str, Any]:
    departures = group.departures(task)
    own = _counts(group.first["cost"])
    return {
        "n": len(group.runs),
        "seeds": list(group.seeds),
        "files": [run.file for run in group.runs],
        "epochs": {"dense": group.task.dense.epochs, "finetune": group.task.finetune.epochs},
        "task_epochs": {"dense": task.dense.epochs, "finetune": task.finetune.epochs},
        "paper_schedule": _keeps_schedule(group.task),
        "weights": {
            "dense": _weights(group.task.dense.ema_decay),
            "branched": _weights(group.task.finetune.ema_decay),
        },
        "departures": {
            key: {"here": here, "task": there} for key, (here, there) in departures.items()
        },
        "test_samples": group.first["branched"]["samples"],
        **{
            net: {name: asdict(group.spread(net, name)) for name in names}
            for net, names in (("dense", _DENSE_MEASURED), ("branched", _MEASURED))
        },
        # A changed tree or network has other counts than the task.
        **({} if _same(own, counts) else {"counts": own}),
    }


def _keeps_schedule(task: Task) -> bool:
    """Whether both trainings are as long, and go as, the paper says."""
    return not any(
        constant.replaces
        for constant in constants(task)
        if constant.section in ("dense", "finetune") and constant.name in _SCHEDULE
    )


def _weights(ema_decay: float) -> str:
    return "moving average" if ema_decay else "last epoch"


def _same(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    names = ("stored", "run", "macs")
    return all(
        some[net][name] == others[net][name] for net in ("dense", "branched") for name in names
    )


# -- the table -----------------------------------------------------------------------------------


def _groups(row: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Row, ...]]]:
    paper, counts, runs = row["paper"], row["counts"], row["runs"]
    missing = () if runs else tuple(_accuracy_rows(paper, None))
    yield row["title"], (*_count_rows(paper, counts), *missing)
    for run in runs:
        own = _count_rows(None, run["counts"]) if "counts" in run else ()
        yield _heading(run), (*own, *_accuracy_rows(paper, run))


def _count_rows(paper: Mapping[str, Any] | None, counts: Mapping[str, Any]) -> Iterator[Row]:
    """Parameters and operations; ``paper`` is None for a network that is not the paper's."""
    theirs = paper or {"dense": {}, "branched": {}, "flops_per_mac": 0}

    def row(label: str, key: str, printed: str, show: str) -> Row:
        """``printed`` is the paper's name of the figure, "" where it prints none."""
        cells = []
        for net in ("dense", "branched"):
            figure = theirs[net].get(printed)
            exact = counts[net].get(key)
            cells.append(NOTHING if figure is None else show.format(figure))
            cells.append(NOTHING if exact is None else count(exact))
        return (label, *cells)

    def saved(key: str, printed: str) -> Row:
        figure, exact = theirs.get(printed), counts["reduction_percent"].get(key)
        paper_cell = NOTHING if figure is None else f"{figure:.1f}%"
        return ("  saved", "", "", paper_cell, NOTHING if exact is None else f"{exact:.2f}%")

    yield row("Parameters stored", "stored", "stored", "{:.2f} M")
    yield row("Parameters run", "run", "run", "{:.2f} M")
    yield saved("run", "active_reduction")
    for per_mac, key in ((1, "macs"), (2, "flops_doubled")):
        stated = theirs["flops_per_mac"] == per_mac
        if stated or per_mac == 1:
            yield row(f"FLOPs, {per_mac} per multiply-add", key, "flops" * stated, "{:.3f} G")
            yield saved(key, "flops_reduction" * stated)


def _accuracy_rows(paper: Mapping[str, Any], run: Mapping[str, Any] | None) -> Iterator[Row]:
    for label, name, digits in _ACCURACIES:
        cells: list[str] = []
        for net in ("dense", "branched"):
            printed = paper[net][name]
            cells.append(NOTHING if printed is None else f"{printed:.{digits}f}")
            if name == "balance" and net == "dense":
                cells.append(NOTHING)
            else:
                cells.append(_measured(run, net, name, digits) if run else "not run")
        yield (label, *cells)


def _measured(run: Mapping[str, Any], net: str, name: str, digits: int) -> str:
    spread = Spread(**run[net][name])
    fewer = f" (n = {spread.n})" if spread.n != run["n"] else ""
    return spread.to_text(digits) + fewer


def _heading(run: Mapping[str, Any]) -> str:
    """What a group of runs is, and how it departs from the task."""
    number = f"{run['n']} run{'s' if run['n'] > 1 else ''}"
    seeds = ", ".join(map(str, run["seeds"]))
    epochs = " + ".join(
        f"{made}" if made == asked else f"{made} of {asked}"
        for made, asked in zip(run["epochs"].values(), run["task_epochs"].values(), strict=True)
    )
    schedule = "the paper's schedule" if run["paper_schedule"] else "not the paper's schedule"
    dense, branched = run["weights"].values()
    weights = dense if dense == branched else f"{dense}, branched: {branched}"
    changed = "".join(
        f"; {key} {written(values['here'])} (task: {written(values['task'])})"
        for key, values in run["departures"].items()
        if not key.endswith(".epochs")
    )
    return (
        f"ours, {number} (seed {seeds}): {epochs} epochs ({schedule}), weights of the {weights}, "
        f"{count(run['test_samples'])} test samples{changed}"
    )


def _row_notes(row: Mapping[str, Any]) -> Iterator[str]:
    if row["paper"]["flops_per_mac"] == 2:
        yield _DOUBLED.format(title=row["title"])
    if not row["runs"]:
        yield f"{row['title']} is not run; this command does it: {row['command']}"
