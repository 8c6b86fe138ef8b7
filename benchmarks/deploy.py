"""Claim: streaming one path beats streaming the dense network, and a pruned one, by a multiple.

ResNet-50 at 224 px and batch 1, all systems in the same runtime: a block is computed as soon as it
has been read. Weights are untrained, which changes neither bytes nor times; the trees are converted
with balanced clusters, so that every leaf has inputs, which are drawn at random. Systems take
turns; a round is one input for each.

cold     nothing is in memory
pinned   the first 6.1 MB are, on every side: the trunk of the tree
bytes    the operating system's count of what this process read from storage
model    what the simulator says for the same path, from its measured computing time

    python -m benchmarks.deploy            25 MB/s to what the disk gives; twenty minutes
    python -m benchmarks.deploy --quick    a small network, slow storage; a minute
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmarks.harness import parser, publish_parts
from benchmarks.inputs import batch, synthetic
from torch import Tensor, nn

from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy import Package, Runtime, Trace, pack
from sigmabranch.deploy.simulate import Storage, checking_rate, latency, path_steps, streamed_bytes
from sigmabranch.net import SigmaBranchNet
from sigmabranch.peers.catalog import find_system
from sigmabranch.sizes import byte_count
from sigmabranch.tasks import Task, find_task, ordered

MB = 10**6
LEARNED, MEASURED = 100, 300  # inputs of a stream, before and while bytes are counted
PARTS = ("bytes", "latency", "model", "stream", "memory")
DENSE, PRUNED, PATH, EARLY = "dense", "fpgm-40", "path", "path, early decision"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and on what storage.

    Attributes:
        task: gives the network.
        early: where the routers of the early tree read.
        rates: bandwidths in MB/s; None as fast as the storage is.
        pinned: bytes kept in memory in the pinned rounds.
        budget: of the stream, in MB.
        predictions: of the memory measurement.
    """

    task: Task
    early: str
    rates: tuple[int | None, ...]
    pinned: str
    budget: float
    predictions: int


FULL = Setting(
    task=find_task("imagenet-resnet50"),
    early="layer1",
    rates=(25, 50, 100, 200, 400, 800, None),
    pinned="6.1MB",
    budget=42.0,
    predictions=2_000,
)
QUICK = Setting(
    task=find_task("cifar100-small"),
    early="layer1",
    rates=(2, 10),
    pinned="130KB",
    budget=0.95,
    predictions=10_000,
)


def main() -> None:
    options = parser(__doc__, "deploy", rounds=5)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    options.add_argument("--quick", action="store_true", help="a small network, slow storage")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options.add_argument("--folder", type=Path, help="for the packages, on real storage")
    options = options.parse_args()
    torch.set_num_threads(1)
    setting = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        systems, inputs = packed(setting, Path(folder))
        measure: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
            "bytes": lambda: cold_bytes(systems, inputs),
            "latency": lambda: latencies(setting, systems, inputs, options.rounds),
            "model": lambda: modelled(setting, systems, inputs, options.rounds),
            "stream": lambda: streams(setting, systems, inputs),
            "memory": lambda: [memory(setting, systems, inputs)],
        }
        parts = {name: list(measure[name]()) for name in options.parts}
    publish_parts(options, parts)


@dataclass(frozen=True, kw_only=True)
class System:
    """A package, and what a runtime needs to open it."""

    name: str
    package: Package
    model: nn.Module

    def open(self, **options: Any) -> Runtime:
        branched = isinstance(self.model, SigmaBranchNet)
        skeleton = None if branched else self.model  # pruned networks have no other
        return Runtime.open(self.package.folder, skeleton=skeleton, **options)


def packed(setting: Setting, folder: Path) -> tuple[list[System], Tensor]:
    """All systems, and inputs for them."""
    task = setting.task
    torch.manual_seed(0)
    dense = task.model.build().eval()
    calibration = synthetic(task, 64, torch.device("cpu"))
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=64, samples=64)
    early = replace(task.tree, decide_after=setting.early)
    models = {
        DENSE: dense,
        PRUNED: find_system("fpgm").changed({"rate": 0.4, "convention": "inner"}).sketch(task),
        PATH: convert(dense, ordered(calibration), task.tree, spec=spec),
        EARLY: convert(dense, ordered(calibration), early, spec=spec),
    }
    inputs, _ = batch(task, 64, torch.device("cpu"))
    systems = [
        System(name=name, package=pack(model, folder / str(number), inputs[:1]), model=model)
        for number, (name, model) in enumerate(models.items())
    ]
    return systems, inputs


def cold_bytes(systems: Sequence[System], inputs: Tensor) -> Iterator[dict[str, Any]]:
    """What one input reads with nothing in memory, for every leaf that an input reaches."""
    for system in systems:
        with system.open(prefetch=False) as runtime:
            seen: set[str] = set()
            for x in inputs:
                runtime.forget()
                before = read_bytes()
                prediction = runtime.predict(x)
                counted = read_bytes() - before
                if prediction.leaf in seen:
                    continue
                seen.add(prediction.leaf)
                expected = system.package.path_bytes(prediction.leaf)
                yield {
                    "system": system.name,
                    "leaf": prediction.leaf,
                    "path_bytes": expected,
                    "read_bytes": prediction.trace.bytes_read,
                    "os_read_bytes": counted,
                    "ratio": counted / expected,
                }
                if len(seen) == len(system.package.leaves):
                    break


def latencies(
    setting: Setting, systems: Sequence[System], inputs: Tensor, rounds: int
) -> Iterator[dict[str, Any]]:
    """Milliseconds an input at every bandwidth, cold and pinned, the systems taking turns."""
    for rate in setting.rates:
        limit = None if rate is None else rate * MB
        with ExitStack() as stack:
            runtimes = {
                system.name: stack.enter_context(system.open(bytes_per_second=limit))
                for system in systems
            }
            for pinned in ("cold", "pinned"):
                yield from _turns(setting, runtimes, inputs, rounds, rate, pinned)


def _turns(
    setting: Setting,
    runtimes: dict[str, Runtime],
    inputs: Tensor,
    rounds: int,
    rate: int | None,
    pinned: str,
) -> Iterator[dict[str, Any]]:
    chosen = random.Random(0)
    traces: dict[str, list[Trace]] = {name: [] for name in runtimes}
    for number in range(rounds + 1):  # the first is for warming up
        x = inputs[chosen.randrange(len(inputs))]
        for name, runtime in runtimes.items():
            if number == 0:
                runtime.predict(x)
            runtime.forget(keep=0 if pinned == "cold" else setting.pinned)
            trace = runtime.predict(x).trace
            if number:
                traces[name].append(trace)
    for name, runs in traces.items():
        ratios = [a.total_ms / b.total_ms for a, b in zip(traces[DENSE], runs, strict=True)]
        pruned = [a.total_ms / b.total_ms for a, b in zip(traces[PRUNED], runs, strict=True)]
        yield {
            "mb_per_s": rate or "unlimited",
            "memory": pinned,
            "system": name,
            "ms": statistics.median(trace.total_ms for trace in runs),
            "min_ms": min(trace.total_ms for trace in runs),
            "compute_ms": statistics.median(trace.compute_ms for trace in runs),
            "read_mb": statistics.mean(trace.bytes_read for trace in runs) / MB,
            "wasted_mb": statistics.mean(trace.wasted_bytes for trace in runs) / MB,
            "dense_over": statistics.median(ratios),
            "pruned_over": statistics.median(pruned),
        }


def modelled(
    setting: Setting, systems: Sequence[System], inputs: Tensor, rounds: int
) -> Iterator[dict[str, Any]]:
    """What the simulator says beside what is measured, nothing guessed on either side."""
    checked = checking_rate()
    for rate in filter(None, setting.rates):
        storage = Storage(bytes_per_second=rate * MB, checked_per_second=checked)
        for system in systems:
            with system.open(bytes_per_second=rate * MB, prefetch=False) as runtime:
                runtime.predict(inputs[0])
                for memory, kept in (("cold", 0), ("pinned", byte_count(setting.pinned))):
                    ratios, measured = [], []
                    for x in inputs[:rounds]:
                        runtime.forget(keep=kept)
                        trace = runtime.predict(x).trace
                        measured.append(trace.total_ms)
                        ratios.append(_model_ms(runtime, trace, storage, kept) / trace.total_ms)
                    yield {
                        "mb_per_s": rate,
                        "memory": memory,
                        "system": system.name,
                        "ms": statistics.median(measured),
                        "model_over": statistics.median(ratios),
                    }


def _model_ms(runtime: Runtime, trace: Trace, storage: Storage, kept: int) -> float:
    """The simulator's time for the same path, each node computing as long as it did."""
    package = runtime.package
    seconds = {
        entry.node: entry.compute_ms / 1e3 / sum(block.macs for block in node.blocks)
        for entry, node in zip(trace.nodes, package.path(trace.leaf), strict=True)
    }
    steps = path_steps(
        package,
        trace.leaf,
        lambda segment: segment.macs * seconds[segment.node],
        resident_bytes=kept,
    )
    return 1e3 * latency(steps, storage)


def streams(
    setting: Setting, systems: Sequence[System], inputs: Tensor
) -> Iterator[dict[str, Any]]:
    """Bytes moved per input of a stream whose leaf persists with probability 0.9."""
    budget = int(setting.budget * MB)
    for system in systems:
        with system.open(budget=budget, prefetch=False) as runtime:
            of_leaf: dict[str, list[Tensor]] = {}
            for x in inputs:
                of_leaf.setdefault(runtime.predict(x).leaf, []).append(x)
            # Where there is one leaf, every input takes it.
            for persistence in (0.9, 0.0) if len(of_leaf) > 1 else (1.0,):
                taken = _stream(system.package.leaves, persistence)
                moved = streamed_bytes(system.package, budget, taken)[LEARNED:]
                yield {
                    "system": system.name,
                    "persistence": persistence,
                    "budget_mb": setting.budget,
                    "inputs": MEASURED,
                    "simulated_mb_per_input": statistics.mean(moved) / MB,
                    "measured_mb_per_input": _measured_stream(runtime, of_leaf, taken),
                }


def _stream(leaves: Sequence[str], persistence: float) -> list[str]:
    """The leaves that one input after the other takes."""
    chosen, taken = random.Random(0), [leaves[0]]
    while len(taken) < LEARNED + MEASURED:
        stays = chosen.random() < persistence
        taken.append(taken[-1] if stays else chosen.choice(leaves))
    return taken


def _measured_stream(
    runtime: Runtime, of_leaf: dict[str, list[Tensor]], taken: Sequence[str]
) -> float:
    """The same stream by the operating system's count."""
    before = 0
    for number, leaf in enumerate(taken):
        if number == LEARNED:
            before = read_bytes()
        inputs = of_leaf[leaf]
        runtime.predict(inputs[number % len(inputs)])
    return (read_bytes() - before) / MEASURED / MB


def memory(setting: Setting, systems: Sequence[System], inputs: Tensor) -> dict[str, Any]:
    """Growth of the process over many predictions of the branched network."""
    system = next(system for system in systems if system.name == PATH)
    budget = int(setting.budget * MB)
    gc.collect()
    before = psutil.Process().memory_info().rss
    with system.open(budget=budget) as runtime:
        times = []
        for number in range(setting.predictions):
            times.append(runtime.predict(inputs[number * 7 % len(inputs)]).trace.total_ms)
        gc.collect()
        grown = psutil.Process().memory_info().rss - before
        return {
            "system": system.name,
            "predictions": len(times),
            "budget_mb": setting.budget,
            "grown_mb": grown / MB,
            "peak_weights_mb": runtime.peak_bytes / MB,
            "p50_ms": statistics.median(times),
            "p99_ms": statistics.quantiles(times, n=100)[98],
        }


def read_bytes() -> int:
    """What this process has read from storage, by the operating system's count."""
    return psutil.Process().io_counters().read_bytes


if __name__ == "__main__":
    main()
