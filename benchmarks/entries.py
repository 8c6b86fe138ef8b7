"""Claim: what a conversion keeps of the accuracy depends on how its levels begin.

One trained dense network, one budget for a path, and every way to spend it: cutting inside the
blocks only (with and without attention heads), gathering channels of the residual stream, or
projecting where the network makes channels anew; layer norms that lost channels with their old
scales and shifts, and fitted. Accuracy is that of the hard path on the test split right after the
conversion, without any fine-tuning.

    python -m benchmarks.entries --dense runs/cifar100-vit/dense --data data --budget 55%
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.harness import parser, publish

from sigmabranch.archive import read_manifest
from sigmabranch.conversion import plan_budget
from sigmabranch.errors import ConfigError, ConversionError
from sigmabranch.saving import load_dense
from sigmabranch.tasks import Chain, Task
from sigmabranch.tasks.counting import example
from sigmabranch.tree import TreeSpec


def main() -> None:
    options = parser(__doc__, "entries")
    options.add_argument("--dense", type=Path, required=True, help="folder of a trained network")
    options.add_argument("--data", type=Path, default=None, help="folder of the data set")
    options.add_argument("--budget", default="55%", help="of a path")
    options.add_argument("--cuts", nargs="+", help="where the levels begin; solved if left out")
    options.add_argument("--samples", type=int, default=8192, help="of the calibration")
    given = options.parse_args()
    notes = read_manifest(given.dense, "dense")["notes"]
    task, seed = Task.from_dict(notes["task"]), notes["seed"]
    rows = list(measured(given, task, seed))
    publish(given, rows)


def measured(options: argparse.Namespace, task: Task, seed: int) -> Iterator[dict[str, Any]]:
    """One row for each way to begin a level, and for each treatment of its layer norms."""
    seen = set()
    for entry in ("project", "gather", "inner", "inner, no heads"):
        try:
            tree = solved(options, task, entry)
        except (ConfigError, ConversionError) as error:
            print(f"{entry}: {error}")
            continue
        same = replace(tree, entry=None)  # gathering where every level projects is projecting
        if same in seen:
            continue
        seen.add(same)
        for samples in (0, options.samples):
            yield row(options, replace(task, tree=tree), entry, samples, seed)


def solved(options: argparse.Namespace, task: Task, entry: str) -> TreeSpec:
    """The task's tree within the budget, its levels beginning in that way."""
    dense = load_dense(options.dense)
    cuts = tuple(options.cuts) if options.cuts else None
    tree = replace(task.tree, entry=entry.partition(",")[0], cuts=cuts, widths=None, shares=None)
    plan = plan_budget(dense, example(task), options.budget, tree)
    wanted = [
        candidate.tree
        for candidate in plan.candidates
        if not (candidate.tree.heads and entry.endswith("no heads"))
    ]
    if not wanted:
        raise ConfigError("no tree of that kind meets the budget")
    return wanted[0]


def row(
    options: argparse.Namespace, task: Task, entry: str, samples: int, seed: int
) -> dict[str, Any]:
    spec = replace(task.conversion, samples=options.samples, affine_samples=samples)
    with TemporaryDirectory() as folder:
        chain = Chain(
            replace(task, conversion=spec),
            Path(folder),
            data=options.data,
            seed=seed,
            start={"dense": options.dense},
        )
        net = chain.converted()
        found = {
            "entry": entry,
            "cuts": " ".join(task.tree.cuts or ()),
            "heads_cut": task.tree.heads is not None,
            "norms_fitted": samples > 0,
            "smallest_share": min(net.record["shares"]),
            "active_params": max(
                sum(p.numel() for p in net.path(leaf).parameters()) for leaf in net.tree.leaves
            ),
            "top1": chain.accuracy(net)["top1"],
        }
    print(found, flush=True)
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
