"""``sigmabranch simulate``: latency and bytes on storage that is not at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Annotated, Any

import torch
import typer

from sigmabranch import files, report
from sigmabranch.cli import options
from sigmabranch.cli.screen import print_result
from sigmabranch.deploy import Package, Runtime
from sigmabranch.deploy.package import ancestry
from sigmabranch.deploy.segment import Segment
from sigmabranch.deploy.simulate import (
    INTERFACES,
    Storage,
    checking_rate,
    floor,
    latency,
    path_steps,
    streamed_bytes,
)
from sigmabranch.errors import ConfigError
from sigmabranch.sizes import byte_count
from sigmabranch.tree import is_shared

RATES = ("25MB", "50MB", "100MB", "200MB", "400MB", "800MB", "1600MB", "12800MB")
BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
STREAM = 1000
WARM, TIMED = 2, 5


def command(
    packages: Annotated[list[Path], typer.Argument(help="Folders made by pack, to be compared.")],
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Bytes a second, e.g. 100MB, or one of {', '.join(INTERFACES)}. Repeatable.",
            metavar="SIZE",
            show_default="25MB to 12800MB",
        ),
    ] = None,
    compute: Annotated[
        str | None,
        typer.Option(
            help="Multiply-adds a second of the device, e.g. 5G; measured here if left out.",
            metavar="MACS",
            show_default=False,
        ),
    ] = None,
    persistence: Annotated[
        float,
        typer.Option(
            help="Probability that an input takes the leaf of the last one.", min=0, max=1
        ),
    ] = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the JSON and the plots.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say how long an input takes and what it reads, for storage and memory of any size."""
    # Another device's checksums are not known, and taken to cost nothing.
    checked = math.inf if compute else checking_rate()
    storages = [replace(_storage(text), checked_per_second=checked) for text in bandwidth or RATES]
    opened = {path.name: Package(path) for path in packages}
    if len(opened) < len(packages):
        raise ConfigError("the packages need folders of different names")
    result: dict[str, Any] = {"latency": [], "stream": [], "persistence": persistence}
    for name, package in opened.items():
        seconds = _by_macs(compute) if compute else _measured(package)
        result["latency"] += _latencies(name, package, storages, seconds)
        result["stream"] += _streams(name, package, list(opened.values()), persistence)
    if out is not None:
        report.write_simulation(result, out)
        files.write_json(out / "simulation.json", result)
    print_result(result, report.simulation_table(result).to_text(), as_json)


def _storage(text: str) -> Storage:
    return INTERFACES.get(text) or Storage(bytes_per_second=byte_count(text))


def _by_macs(text: str) -> Callable[[Segment], float]:
    rate = byte_count(f"{text}B")  # the same prefixes
    return lambda segment: segment.macs / rate


def _measured(package: Package) -> Callable[[Segment], float]:
    """Seconds of each segment on this machine: multiply-adds at the pace of its depth's node."""
    torch.set_num_threads(1)
    x = torch.zeros(package.input_shape)
    with Runtime.open(package.folder) as runtime:
        traces = [runtime.predict(x).trace for _ in range(WARM + TIMED)][WARM:]
    path = [node for node in package.path(traces[0].leaf) if not is_shared(node.key)]
    macs = [sum(block.macs for block in node.blocks) for node in path]
    ms = [min(trace.node(node.key).compute_ms for trace in traces) for node in path]
    pace = [took / max(done, 1) for took, done in zip(ms, macs, strict=True)]

    def seconds(segment: Segment) -> float:
        depth = min(len(ancestry(segment.node)), len(pace)) - 1
        return segment.macs * pace[depth] / 1e3

    return seconds


def _latencies(
    name: str,
    package: Package,
    storages: Sequence[Storage],
    seconds: Callable[[Segment], float],
) -> Iterator[dict[str, Any]]:
    """One row per storage: the mean over the leaves by their usage, nothing in memory."""
    share = {leaf: package.usage.get(leaf, 1.0) for leaf in package.leaves}
    total = sum(share.values())
    for storage in storages:
        ms = {"ms": 0.0, "foreseen_ms": 0.0, "floor_ms": 0.0, "mb": 0.0}
        for leaf, weight in share.items():
            steps = path_steps(package, leaf, seconds)
            foreseen = path_steps(package, leaf, seconds, foreseen=True)
            part = weight / total
            ms["ms"] += part * 1e3 * latency(steps, storage)
            ms["foreseen_ms"] += part * 1e3 * latency(foreseen, storage)
            ms["floor_ms"] += part * 1e3 * floor(steps, storage)
            ms["mb"] += part * package.path_bytes(leaf) / 1e6
        yield {"package": name, "mb_per_s": storage.bytes_per_second / 1e6, **ms}


def _streams(
    name: str, package: Package, all_packages: Sequence[Package], persistence: float
) -> Iterator[dict[str, Any]]:
    """One row per budget: bytes moved per input of a stream."""
    largest = max(_total(other) for other in all_packages)
    leaves, random = list(package.leaves), Random(0)
    weights = [package.usage.get(leaf, 1.0) for leaf in leaves]
    taken = random.choices(leaves, weights)
    while len(taken) < STREAM:
        stays = random.random() < persistence
        taken.append(taken[-1] if stays else random.choices(leaves, weights)[0])
    for share in BUDGETS:
        budget = int(share * largest)
        try:
            moved = mean(streamed_bytes(package, budget, taken)) / 1e6
        except ConfigError:  # less than the largest block
            continue
        yield {"package": name, "budget_mb": budget / 1e6, "mb_per_input": moved}


def _total(package: Package) -> int:
    return sum(node.weight_bytes for node in package.nodes.values())
