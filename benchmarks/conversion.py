"""Claim: conversion takes time in proportion to the calibration images, and hardly any memory.

Every size runs in a process of its own, because a process's peak memory never falls. The floor is
one pass of the images through the trunk, measured in turn with the conversions; the extra memory
is the peak during conversion above what network and images had taken before. The dense network is
freshly initialised: time does not depend on its weights.

    python -m benchmarks.conversion                                  four sizes, a small ResNet
    python -m benchmarks.conversion --task cifar100-resnet50         one full-width conversion
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from typing import Any

import psutil
import torch
from benchmarks.harness import interleaved, parser, publish
from benchmarks.inputs import task_inputs
from torch import nn

from sigmabranch.backbones import as_backbone
from sigmabranch.conversion import convert
from sigmabranch.tasks import find_task, ordered

SIZES = {"cifar100-small": [1000, 2000, 4000, 8000]}
ONE_SIZE = [1000]
MIB = 2**20


def measured(options: argparse.Namespace, samples: int) -> dict[str, Any]:
    """Time and memory of converting on ``samples`` images, in this process."""
    task = find_task(options.task)
    torch.manual_seed(0)
    dense = task.model.build().to(options.device).eval()
    loader = ordered(task_inputs(task, samples, options.data, options.device))
    backbone = as_backbone(dense)
    levels = backbone.levels(task.tree.depth, task.tree.cuts)
    trunk = nn.Sequential(*backbone.modules(levels.trunk))

    def one_pass(model: nn.Module) -> None:
        with torch.no_grad():
            for x, _ in loader:
                model(x)

    one_pass(trunk)
    one_pass(dense)
    before = psutil.Process().memory_info().rss
    net = convert(dense, loader, task.tree, spec=task.conversion)
    peak = _peak_bytes()
    timings = interleaved(
        {
            "trunk": lambda: one_pass(trunk),
            "dense": lambda: one_pass(dense),
            "convert": lambda: convert(dense, loader, task.tree, spec=task.conversion),
        },
        options.rounds,
        warm=True,
    )
    return {
        "images": samples,
        "seconds": timings.median("convert"),
        "trunk_pass_seconds": timings.median("trunk"),
        "dense_pass_seconds": timings.median("dense"),
        "trunk_passes": timings.ratio("convert", to="trunk"),
        "ms_per_image": 1e3 * timings.median("convert") / samples,
        "peak_mib": peak / MIB,
        "extra_mib": (peak - before) / MIB,
        "net_mib": sum(p.numel() * p.element_size() for p in net.parameters()) / MIB,
    }


def _peak_bytes() -> int:
    """Largest resident memory of this process so far; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    options = parser(__doc__, "conversion", rounds=3)
    options.add_argument("--task", default="cifar100-small")
    options.add_argument("--sizes", type=int, nargs="+", help="calibration images")
    options.add_argument("--data", help="folder of the task's data; synthetic images if absent")
    options = options.parse_args()
    options.sizes = options.sizes or SIZES.get(options.task, ONE_SIZE)
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for samples in options.sizes:
        with spawn.Pool(1) as pool:
            rows.append(pool.apply(measured, (options, samples)))
        print(f"{samples} images: {rows[-1]['seconds']:.1f} s", file=sys.stderr)
    publish(options, rows)


if __name__ == "__main__":
    main()
