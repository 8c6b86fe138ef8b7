"""What a search over trees has found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sigmabranch.report.tables import NOTHING, Table, count, percent, sampling_note, signed_points
from sigmabranch.tree import TreeSpec

_REASONS = 3  # named at most


def search_table(found: Mapping[str, Any]) -> Table:
    """One row per trial of the Pareto set, by rising size, under the dense network's."""
    source, trials = found["source"], {trial["number"]: trial for trial in found["trials"]}
    dense = ("dense", "", "", count(source["params"]), "100.0%", count(source["macs"]),
             percent(source["top1"]), NOTHING)  # fmt: skip
    rows = (_row(trials[number], found) for number in found["pareto"])
    return Table(
        header=(
            "trial", "levels begin at", "leaves", "active parameters", "of dense", "MACs",
            "top-1, held out", "routing gain",
        ),
        groups=(("", (dense, *rows)),),
        notes=tuple(_notes(found)),
    )  # fmt: skip


def _row(trial: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    tree = TreeSpec.from_dict(trial["tree"])
    mark = " best" if trial["number"] == found["best"] else ""
    return (
        f"{trial['number']}{mark}",
        " ".join(tree.cuts or ()),
        str(len(tree.leaves)),
        count(trial["active_params"]),
        f"{trial['active_params'] / found['source']['params']:.1%}",
        count(trial["macs"]),
        percent(trial["top1"]),
        signed_points(trial["routing_gain"]),
    )


def _notes(found: Mapping[str, Any]) -> list[str]:
    trials, held = found["trials"], found["validation"]
    failed = [trial["reason"] for trial in trials if trial["state"] == "failed"]
    by_size = {trial["number"]: trial for trial in trials}
    top = max(by_size[number]["top1"] for number in found["pareto"])
    notes = [
        f"{len(trials)} trials, {len(failed)} of them not possible; {len(found['pareto'])} that no "
        "other beats in accuracy, active parameters and MACs together. Each was fine-tuned for "
        f"{found['epochs']} epochs with one seed, and judged on training samples held out: "
        + sampling_note({"top1": top, "samples": held["samples"]}),
        f"Best is {found['rule']}. The best of many is flattered by chance.",
    ]
    if found["best"] is None:
        notes.append(f"No trial is within the budget of {count(found['budget_bytes'])} bytes.")
    if found["source"]["seen"]:
        notes.append(
            "The dense network has learnt from the held-out samples, which flatters it and all "
            "trees cut from it."
        )
    for reason, times in Counter(failed).most_common(_REASONS):
        notes.append(f"Not possible, {times} times: {reason}")
    return notes
