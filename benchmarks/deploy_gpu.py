"""Claim: one path, streamed from the host's memory to a GPU, beats the dense network by a multiple.

A ResNet-50 at 224 px, so many times as wide, at batch 1 in bf16: weights wait in page-locked
memory, a CUDA graph computes each stretch as soon as it has come. Weights are untrained, which
changes neither bytes nor times. Systems take turns; a round is one input for each.

whole    GPU memory for a whole path of the tree, for all of the dense network; nothing stays
equal    the same GPU memory on both sides, that of one path; nothing stays
pinned   the same, and as many bytes as the trunk has stay, on both sides

    python -m benchmarks.deploy_gpu --factor 3.5    a tree of 320 million parameters; minutes
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import parser, publish_parts
from torch import nn

from sigmabranch.deploy import GpuPath, Package, pack
from sigmabranch.tasks import Task, find_task
from sigmabranch.tasks.counting import example, sketch

MB = 10**6
DENSE, PATH, EARLY = "dense", "path", "path, early decision"


def main() -> None:
    options = parser(__doc__, "deploy-gpu", rounds=50)
    options.add_argument("--factor", type=float, default=3.5, help="widths of ResNet-50 times this")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = options.parse_args()
    task = find_task("imagenet-resnet50")
    task = replace(task, model=task.model.narrowed(options.factor, 0))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        networks = {name: _packed(task, name, Path(folder)) for name in (DENSE, PATH, EARLY)}
        torch.backends.cudnn.benchmark = True
        path = Package(Path(folder) / PATH)
        # Half of float32, and a little for alignment.
        whole = int(0.51 * path.path_bytes(path.leaves[0]))
        trunk = int(0.51 * path.nodes["root"].weight_bytes)
        modes = {
            "whole": {},
            "equal": {"budget": whole},
            "pinned": {"budget": whole, "resident": trunk},
        }
        rows = [
            row
            for mode, settings in modes.items()
            for row in _turns(mode, Path(folder), settings, options.rounds, task)
        ]
    options.device = torch.device("cuda")
    publish_parts(options, {"networks": list(networks.values()), "latency": rows, "bus": [_bus()]})


def _packed(task: Task, name: str, folder: Path) -> dict[str, Any]:
    tree = replace(task.tree, decide_after="layer1") if name == EARLY else task.tree
    dense, net = sketch(replace(task, tree=tree))
    model: nn.Module = dense if name == DENSE else net
    package = pack(model, folder / name, example(task))
    return {
        "system": name,
        "params": sum(p.numel() for p in model.parameters()),
        "path_params": package.path_bytes(package.leaves[0]) // 4,
    }


def _turns(
    mode: str, folder: Path, settings: dict[str, int], rounds: int, task: Task
) -> list[dict[str, Any]]:
    paths = {name: GpuPath(folder / name, **settings) for name in (DENSE, PATH, EARLY)}
    runs: dict[str, list[Any]] = {name: [] for name in paths}
    for number in range(rounds + 3):  # the first three warm up
        x = torch.randn_like(example(task))
        for name, path in paths.items():
            torch.cuda.synchronize()
            prediction = path.predict(x)
            if number > 2:
                runs[name].append(prediction)
    return [
        {
            "memory": mode,
            "system": name,
            "gpu_mb": paths[name].budget / MB,
            "copied_mb": made[0].copied_bytes / MB,
            "ms": statistics.median(run.total_ms for run in made),
            "p99_ms": statistics.quantiles([run.total_ms for run in made], n=100)[98],
            "leaves": len({run.leaf for run in made}),
            "dense_over": statistics.median(
                dense.total_ms / run.total_ms for dense, run in zip(runs[DENSE], made, strict=True)
            ),
        }
        for name, made in runs.items()
    ]


def _bus() -> dict[str, Any]:
    """What one large copy from page-locked memory reaches."""
    host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda", pin_memory=False)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"gb_per_s": 2**30 / min(seconds) / 1e9}


if __name__ == "__main__":
    main()
