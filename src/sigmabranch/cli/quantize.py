"""``sigmabranch quantize``: ONNX nodes in few bits, measured on the test split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sigmabranch import files
from sigmabranch.cli import options
from sigmabranch.cli.screen import Screen, print_result
from sigmabranch.cli.source import read_source
from sigmabranch.data import Split
from sigmabranch.deploy.export import check_format, export_net
from sigmabranch.saving import load
from sigmabranch.sizes import byte_count
from sigmabranch.tasks import open_task_data, shuffled
from sigmabranch.tasks.provenance import provenance

# Training samples among which each node finds those to be calibrated on.
CALIBRATION = 2000
COMPARED = 16
# Of these, those that tell how much a node minds four bits.
SENSED = 500


def command(
    net: Annotated[Path, typer.Argument(help="Folder of a saved network.")],
    data: options.Data = None,
    out: options.OutBeside = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(help="Of a weight: 8 or 4. Repeatable.", show_default="8"),
    ] = None,
    total: Annotated[
        str | None,
        typer.Option(
            help="Also mix 8 and 4 bits, so that all nodes take no more than this, e.g. 1.2MB.",
            metavar="SIZE",
            show_default=False,
        ),
    ] = None,
    result: options.OutFile = None,
    as_json: options.Json = False,
) -> None:
    """Write a network as ONNX nodes in fp32 and in few bits, and measure all of them."""
    check_format("onnx-nodes")
    # These load ONNX Runtime.
    from sigmabranch.deploy.onnx_path import OnnxPath  # noqa: PLC0415
    from sigmabranch.deploy.placement import mix_nodes, place_bits  # noqa: PLC0415
    from sigmabranch.deploy.quantize import quantize_nodes  # noqa: PLC0415

    limit = None if total is None else byte_count(total)
    task, seed = read_source(net, None, None)
    dataset = open_task_data(task, data, torch.device("cpu"))
    order = shuffled(dataset.train, seed).order[:CALIBRATION]
    samples = next(iter(dataset.train.batches(order, len(order))))[0].contiguous()
    folder = out or net.resolve().parent / f"{net.resolve().name}-quantized"
    with Screen().live() as screen:
        screen.say(f"{folder}: fp32")
        notes = {"task": task.to_dict(), "seed": seed, "classes": list(dataset.class_names)}
        export_net(load(net), folder / "fp32", samples[:COMPARED], format="onnx-nodes", notes=notes)
        with OnnxPath(folder / "fp32") as path:
            rows = [_row("fp32", path, dataset.test, None)]
        for count in sorted({*(bits or [8]), *([8, 4] if limit else [])}, reverse=True):
            name = f"int{count}"
            screen.say(f"{folder}: {name}")
            quantize_nodes(folder / "fp32", folder / name, samples, bits=count)
            with OnnxPath(folder / name) as path:
                rows.append(_row(name, path, dataset.test, rows[0]["leaf"]))
        if limit is not None:
            screen.say(f"{folder}: mixed")
            eight, four = folder / "int8", folder / "int4"
            placed = place_bits(eight, four, samples[:SENSED], total=limit)
            mix_nodes({8: eight, 4: four}, placed, folder / "mixed")
            with OnnxPath(folder / "mixed") as path:
                row = _row("mixed", path, dataset.test, rows[0]["leaf"])
            rows.append({**row, "bits": placed})
    for row in rows:
        del row["leaf"]
    measured = {
        "task": task.to_dict(),
        "seed": seed,
        "provenance": provenance(torch.device("cpu")),
        "calibration_samples": len(samples),
        "rows": rows,
    }
    if result is not None:
        files.write_json(result, measured)
    print_result(measured, "\n".join(map(_line, rows)), as_json)


def _row(name: str, path: Any, test: Split, leaf: list[str] | None) -> dict[str, Any]:
    """Accuracy on the test split, and how often the route is another than in fp32."""
    right, leaves = 0, []
    for x, y in test.batches(torch.arange(len(test)), 1):
        logits, found = path(x.contiguous().numpy())
        right += int(logits.argmax()) == int(y)
        leaves.append(found)
    usage = Counter(leaves)
    same = leaf or leaves
    return {
        "name": name,
        "samples": len(leaves),
        "top1": 100 * right / len(leaves),
        "path_bytes": max(map(path.path_bytes, path.leaves)),
        "total_bytes": path.total_bytes,
        "rerouted": sum(a != b for a, b in zip(same, leaves, strict=True)) / len(leaves),
        "usage": {key: usage[key] / len(leaves) for key in path.leaves},
        "leaf": leaves,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']}: {row['top1']:.2f} % top-1 on {row['samples']:,} test samples, "
        f"{row['path_bytes'] / 1e6:.3f} MB read for one input, {row['total_bytes'] / 1e6:.3f} MB "
        f"in all, {row['rerouted']:.1%} rerouted"
    )
