"""Claim: in eight bits too, streaming one path beats streaming the dense network by a multiple.

ResNet-50 at 224 px and batch 1, quantized alike and run by ONNX Runtime on throttled storage, with
nothing in memory. This engine starts a file when all of it is there, so what can overlap are files:
a dense network in one file waits for all of itself; in three of about equal size, it computes one
while the next is read. A path's three files are known one by one, or, with early decision, at once.
Weights are untrained, which changes neither bytes nor times. Systems take turns.

    python -m benchmarks.deploy_int8                about ten minutes, most of them quantizing
    python -m benchmarks.deploy_int8 --task cifar100-small --rates 2
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.deploy import read_bytes
from benchmarks.harness import parser, publish_parts
from benchmarks.inputs import batch, synthetic
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sigmabranch import files
from sigmabranch.archive import MANIFEST
from sigmabranch.backbones import as_backbone
from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy.blocks import node_parts
from sigmabranch.deploy.export import export_net
from sigmabranch.deploy.export.nodes import SCHEMA, NodeFunction, Part
from sigmabranch.deploy.export.onnx_nodes import write_part
from sigmabranch.deploy.export.staging import listing
from sigmabranch.deploy.onnx_path import FORMAT, OnnxPath
from sigmabranch.deploy.package import child
from sigmabranch.deploy.quantize import quantize_nodes
from sigmabranch.tasks import Task, find_task, ordered

MB = 10**6
CALIBRATION = 32
WHOLE, PARTS, PATH, EARLY = "dense, one file", "dense, three files", "path", "path, early decision"


def main() -> None:
    options = parser(__doc__, "deploy-int8", rounds=5)
    options.add_argument("--task", default="imagenet-resnet50")
    options.add_argument("--rates", type=int, nargs="+", default=[25, 50, 100, 200], help="MB/s")
    options.add_argument("--folder", type=Path, help="for the files, on real storage")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        inputs = written(find_task(options.task), Path(folder))
        rows = [
            row
            for rate in options.rates
            for row in latencies(Path(folder), inputs, rate, options.rounds)
        ]
    publish_parts(options, {"latency": rows})


def written(task: Task, folder: Path) -> Tensor:
    """All systems in eight bits, a folder each; and inputs for them."""
    torch.manual_seed(0)
    dense = task.model.build().eval()
    split = synthetic(task, 64, torch.device("cpu"))
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=64, samples=64)
    inputs, _ = batch(task, 64, torch.device("cpu"))
    (body, _), *_ = node_parts(as_backbone(dense)).values()
    with torch.no_grad():
        for name, count in ((WHOLE, 1), (PARTS, 3)):
            write_chain(sections(body, count), folder / "fp32" / name, inputs[:1])
        for name, early in ((PATH, None), (EARLY, "layer1")):
            tree = replace(task.tree, decide_after=early)
            net = convert(dense, ordered(split), tree, spec=spec)
            export_net(net, folder / "fp32" / name, inputs[:8], format="onnx-nodes")
    for name in (WHOLE, PARTS, PATH, EARLY):
        quantize_nodes(folder / "fp32" / name, folder / name, inputs[:CALIBRATION])
    return inputs


def sections(body: nn.Module, count: int) -> list[nn.Sequential]:
    """A network in parts of about equal size."""
    modules = list(body.children())
    sizes = [sum(value.numel() for value in module.state_dict().values()) for module in modules]
    parts: list[list[nn.Module]] = [[] for _ in range(count)]
    done = 0
    for module, size in zip(modules, sizes, strict=True):
        parts[min(count - 1, count * (done + size // 2) // sum(sizes))].append(module)
        done += size
    return [nn.Sequential(*part) for part in parts]


def write_chain(parts: Sequence[nn.Module], folder: Path, sample: Tensor) -> None:
    """A network without branches as ONNX nodes."""
    folder.mkdir(parents=True)
    nodes: dict[str, Mapping[str, Any]] = {}
    key, feature = "root", sample
    for number, module in enumerate(parts):
        key = child(key, 0) if number else key
        function = NodeFunction([module], pytree.tree_flatten(feature)[1], None)
        passed = function.body(feature)
        name = "logits" if number == len(parts) - 1 else "feature"
        part = Part(key=key, function=function, inputs=(feature,), passed=passed, outputs=(name,))
        nodes[key], feature = write_part(part, folder), passed
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "leaves": [[0] * (len(parts) - 1)],
        "routers": [],
        "early": False,
        "input": {"shape": list(sample.shape), "dtype": "float32"},
        "classes": feature.shape[1],
        "nodes": nodes,
        "files": listing(folder),
    }
    files.write_json(folder / MANIFEST, manifest)


def latencies(folder: Path, inputs: Tensor, rate: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds an input, nothing in memory, the systems taking turns."""
    with ExitStack() as stack:
        paths = {
            name: stack.enter_context(OnnxPath(folder / name, bytes_per_second=rate * MB))
            for name in (WHOLE, PARTS, PATH, EARLY)
        }
        runs: dict[str, list[Any]] = {name: [] for name in paths}
        counted: dict[str, int] = {}
        for number in range(rounds + 1):  # the first is for warming up
            for name, path in paths.items():
                path.forget()
                before = read_bytes()
                prediction = path.predict(inputs[number : number + 1])
                counted[name] = read_bytes() - before
                if number:
                    runs[name].append(prediction.trace)
    for name, traces in runs.items():
        yield {
            "mb_per_s": rate,
            "system": name,
            "ms": statistics.median(trace.total_ms for trace in traces),
            "compute_ms": statistics.median(trace.compute_ms for trace in traces),
            "read_mb": traces[-1].bytes_read / MB,
            "os_read_mb": counted[name] / MB,
            **{
                f"over_{'file' if other == WHOLE else 'parts'}": statistics.median(
                    a.total_ms / b.total_ms for a, b in zip(runs[other], traces, strict=True)
                )
                for other in (WHOLE, PARTS)
            },
        }


if __name__ == "__main__":
    main()
