"""Claim: where computing bounds a path and reading does not, a slimmer trunk is what shortens it.

ResNet-50 at 224 px and batch 1, early decision, nothing in memory: the trunk holds a seventh of a
path's parameters and most of its multiply-adds. Each tree has fewer channels inside its trunk than
the one before. Weights are untrained, which changes neither bytes nor times; what slimming costs in
accuracy is in the rows ``slim-trunk-…`` of ``sigmabranch compare``. Systems take turns.

    python -m benchmarks.deploy_trunk --folder runs      five minutes
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.deploy import DENSE, MB, System
from benchmarks.harness import parser, publish_parts

from sigmabranch.deploy import Trace, pack
from sigmabranch.tasks import Task, find_task
from sigmabranch.tasks.counting import example, sketch

SHARES = (1.0, 0.75, 0.5)
RATES = (100, 400, None)


def main() -> None:
    options = parser(__doc__, "deploy-trunk", rounds=9)
    options.add_argument("--task", default="imagenet-resnet50")
    options.add_argument("--early", default="layer1", help="what the routers read")
    options.add_argument("--folder", type=Path, help="for the packages, on real storage")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = options.parse_args()
    torch.set_num_threads(1)
    task = find_task(options.task)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        systems = list(packed(task, options.early, Path(folder)))
        rows = [row for rate in RATES for row in latencies(task, systems, rate, options.rounds)]
    publish_parts(options, {"latency": rows})


def packed(task: Task, early: str, folder: Path) -> Iterator[System]:
    """The dense network, and trees with slimmer and slimmer trunks."""
    torch.manual_seed(0)
    for share in SHARES:
        tree = replace(task.tree, decide_after=early, trunk_share=share)
        dense, net = sketch(replace(task, tree=tree))
        if share == SHARES[0]:
            package = pack(dense, folder / DENSE, example(task))
            yield System(name=DENSE, package=package, model=dense)
        name = f"trunk {share:.0%}"
        package = pack(net, folder / name, example(task))
        yield System(name=name, package=package, model=net)


def latencies(
    task: Task, systems: Sequence[System], rate: int | None, rounds: int
) -> Iterator[dict[str, Any]]:
    """Milliseconds an input."""
    x = torch.randn_like(example(task))
    traces: dict[str, list[Trace]] = {system.name: [] for system in systems}
    with ExitStack() as stack:
        limit = None if rate is None else rate * MB
        runtimes = {
            system.name: stack.enter_context(system.open(bytes_per_second=limit))
            for system in systems
        }
        for number in range(rounds + 1):  # the first is for warming up
            for name, runtime in runtimes.items():
                runtime.forget()
                trace = runtime.predict(x).trace
                if number:
                    traces[name].append(trace)
    for system in systems:
        nodes = system.package.path(system.package.leaves[0])
        runs = traces[system.name]
        yield {
            "mb_per_s": rate or "unlimited",
            "system": system.name,
            "path_gmacs": sum(block.macs for node in nodes for block in node.blocks) / 1e9,
            "path_mb": sum(node.weight_bytes for node in nodes) / MB,
            "ms": statistics.median(trace.total_ms for trace in runs),
            "compute_ms": statistics.median(trace.compute_ms for trace in runs),
            "dense_over": statistics.median(
                a.total_ms / b.total_ms for a, b in zip(traces[DENSE], runs, strict=True)
            ),
        }


if __name__ == "__main__":
    main()
