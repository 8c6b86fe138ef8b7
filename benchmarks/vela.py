"""Claim: a compiler that is not ours finds a path cheaper than the dense network, as our counts do.

Arm's Vela compiles models for Ethos-U processors, and estimates the cycles and the traffic of what
it has made. Here it compiles the dense network and every node of its tree, each a LiteRT model in
int8 (weights and activations, calibrated on synthetic inputs, a node on its parent's features). A
path costs the sum of its nodes. Weights are untrained; Vela compresses them, and would compress
trained ones to another size.

u55-256     weights in flash of 0.5 GB/s, feature maps in on-chip memory, which holds them all
u65-512     both in DRAM of 3.75 GB/s behind 384 KB of on-chip memory

cycles      Vela's, at 500 MHz and 1 GHz; ms is these divided by that
weights     bytes that come from flash or DRAM; maps and scales: the same of feature maps, and of
            biases, scales and tables. What passes on-chip memory alone is in none of them
sram_kb     on-chip memory in use at most
on_cpu      operations that Vela leaves to a processor beside it, and counts nothing for: a router's
            log-softmax, which the quantizer keeps in float32, and its mean over a feature
our_bytes   this library's count: parameters at one byte each
our_macs    this library's count: multiply-adds of convolutions and matrix products
dense_over  the dense network's figure divided by this one

    python -m benchmarks.vela            ResNet-50 at 32 px and at 224 px; a quarter of an hour
    python -m benchmarks.vela --quick    a small network; two minutes

It needs the extra vela, in an environment of its own.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import litert_torch
import torch
from ai_edge_quantizer import quantizer, recipe
from benchmarks.harness import parser, publish_parts
from benchmarks.inputs import batch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from sigmabranch.deploy.export.litert_nodes import ChannelLast, channel_last
from sigmabranch.deploy.export.nodes import NodeFunction, Part, node_parts
from sigmabranch.measure import count_parameters
from sigmabranch.tasks import Task, find_task
from sigmabranch.tasks.counting import sketch
from sigmabranch.tree import NodeId, TreeSpec, node_key

Row: TypeAlias = dict[str, Any]

DENSE = "dense"
CALIBRATION = 4  # inputs
PACKAGES = ("ethos-u-vela", "ai-edge-quantizer", "litert-torch")
OFF_CHIP = ("dram", "off_chip_flash")
# Of a path these are the sums over its nodes.
SUMMED = ("ms", "cycles", "weights", "maps", "scales", "our_bytes", "vela_macs", "our_macs")


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What Vela compiles for, in its own names."""

    name: str
    accelerator: str
    system: str
    memory: str


CHIPS = (
    Chip(
        name="u55-256",
        accelerator="ethos-u55-256",
        system="Ethos_U55_High_End_Embedded",
        memory="Shared_Sram",
    ),
    Chip(
        name="u65-512",
        accelerator="ethos-u65-512",
        system="Ethos_U65_High_End",
        memory="Dedicated_Sram_384KB",
    ),
)

SHARES = (1.0, 0.75, 0.5)
# Task → shares of the trunk's channels that stay.
FULL = {"cifar100-resnet50": SHARES, "imagenet-resnet50": SHARES}
QUICK = {"cifar100-small": (1.0, 0.5)}


def main() -> None:
    options = parser(__doc__, "vela")
    options.add_argument("--quick", action="store_true", help="a small network")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = options.parse_args()
    torch.set_num_threads(1)
    nodes: list[Row] = []
    paths: list[Row] = []
    for name, shares in (QUICK if options.quick else FULL).items():
        for share in shares:
            task = slimmed(find_task(name), share)
            compiled = compiled_nodes(task)
            nodes += compiled
            paths += compiled_paths(task.tree, compiled)
    publish_parts(options, {"packages": [_versions()], "nodes": nodes, "paths": paths})


def slimmed(task: Task, share: float) -> Task:
    """The task with that share of the trunk's channels."""
    return replace(task, tree=replace(task.tree, trunk_share=share))


@torch.no_grad()
def compiled_nodes(task: Task, chips: Sequence[Chip] = CHIPS) -> list[Row]:
    """The dense network and every node, on every chip: what Vela says beside what we count."""
    torch.manual_seed(0)
    dense, net = sketch(task)
    inputs, _ = batch(task, CALIBRATION, torch.device("cpu"))
    network = {"network": task.name, "trunk": task.tree.trunk_share or 1.0}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for part in (_whole(dense, inputs), *node_parts(net, inputs)):
            model, ours = int8_model(part, Path(folder)), _counted(part)
            for chip in chips:
                place = {**network, "chip": chip.name, "node": part.key}
                rows.append({**place, **vela(model, chip), **ours})
    return rows


def compiled_paths(tree: TreeSpec, nodes: Sequence[Row]) -> Iterator[Row]:
    """The dense network and every path of one network, on every chip: sums of its nodes' rows."""
    for chip in dict.fromkeys(row["chip"] for row in nodes):
        of_node = {row["node"]: row for row in nodes if row["chip"] == chip}
        dense = _total(DENSE, [of_node[DENSE]])
        yield {**dense, **_over(dense, dense)}
        for leaf in tree.leaves:
            path = _total(node_key(leaf), [of_node[key] for key in path_keys(leaf)])
            yield {**path, **_over(dense, path)}


def path_keys(leaf: NodeId) -> list[str]:
    """Keys of the nodes from the root to a leaf."""
    return [node_key(leaf[:level]) for level in range(len(leaf) + 1)]


def _total(name: str, rows: Sequence[Row]) -> Row:
    return {
        **{key: rows[0][key] for key in ("network", "trunk", "chip")},
        "path": name,
        **{key: sum(row[key] for row in rows) for key in SUMMED},
        "sram_kb": max(row["sram_kb"] for row in rows),
    }


def _over(dense: Row, row: Row) -> Row:
    return {
        "dense_over_ms": dense["ms"] / row["ms"],
        "dense_over_weights": dense["weights"] / row["weights"],
        "dense_over_off_chip": off_chip(dense) / off_chip(row),
        "dense_over_our_bytes": dense["our_bytes"] / row["our_bytes"],
        "dense_over_our_macs": dense["our_macs"] / row["our_macs"],
    }


def off_chip(row: Mapping[str, Any]) -> int:
    """Bytes that cross the chip's border."""
    return row["weights"] + row["maps"] + row["scales"]


def int8_model(part: Part, folder: Path) -> Path:
    """The part as a LiteRT model, in int8 wherever the quantizer knows how."""
    whole, name = folder / f"{part.key}-float32.tflite", folder / f"{part.key}.tflite"
    inputs = [channel_last(tensor).contiguous() for tensor in part.inputs]
    # Both packages print their progress, and warn of their own code.
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        example = tuple(tensor[:1] for tensor in inputs)
        litert_torch.convert(ChannelLast(part.function.folded()), example).export(str(whole))
        quantizing = quantizer.Quantizer(whole, recipe.static_wi8_ai8())
        samples = zip(*(tensor.split(1) for tensor in inputs), strict=True)
        seen = quantizing.calibrate(
            {"serving_default": [_arguments(sample) for sample in samples]}, num_threads=1
        )
        quantizing.quantize(seen).export_model(name)
    return name


def _arguments(sample: Iterable[Tensor]) -> dict[str, Any]:
    return {f"args_{number}": tensor.numpy() for number, tensor in enumerate(sample)}


def vela(model: Path, chip: Chip) -> Row:
    """What Vela says of one model."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ethosu.vela", str(model), "--output-dir", folder]
        command += ["--config", "Arm/vela.ini", "--verbose-performance"]
        command += ["--accelerator-config", chip.accelerator]
        command += ["--system-config", chip.system, "--memory-mode", chip.memory]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (summary,) = _read(Path(folder), "summary")
        layers = _read(Path(folder), "per-layer")
    return {
        "ms": 1e3 * float(summary["inference_time"]),
        "cycles": int(summary["cycles_total"]),
        **_traffic(summary),
        "sram_kb": float(summary["sram_memory_used"]) * 1.024,
        "on_cpu": " ".join(row["Original Operator"] for row in layers if row["Target"] == "CPU"),
        "vela_macs": int(summary["nn_macs"]),
    }


def _read(folder: Path, kind: str) -> list[dict[str, str]]:
    (path,) = folder.glob(f"*_{kind}*.csv")
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def _traffic(summary: Mapping[str, str]) -> dict[str, int]:
    """Bytes read and written beyond the chip's border."""

    def moved(what: str) -> int:
        ways = ("read", "write")
        return sum(int(summary[f"{area}_{what}_{way}_bytes"]) for area in OFF_CHIP for way in ways)

    weights, maps = moved("weight"), moved("feature_map")
    everything = sum(int(summary[f"{area}_total_bytes"]) for area in OFF_CHIP)
    return {"weights": weights, "maps": maps, "scales": everything - weights - maps}


def _whole(dense: nn.Module, inputs: Tensor) -> Part:
    """A dense network as if it were a node."""
    _, structure = pytree.tree_flatten(inputs)
    return Part(
        key=DENSE,
        function=NodeFunction([dense], structure, None),
        inputs=(inputs,),
        passed=None,
        outputs=("logits",),
    )


def _counted(part: Part) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        part.function(*(tensor[:1] for tensor in part.inputs))
    return {
        "our_bytes": count_parameters([part.function]),
        "our_macs": counter.get_total_flops() // 2,
    }


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


if __name__ == "__main__":
    main()
