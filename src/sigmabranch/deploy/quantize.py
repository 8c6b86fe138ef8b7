"""ONNX nodes in few bits: each calibrated on the very inputs that its routers send it.

Weights have 8 or 4 bits, symmetric per output channel; activations have 8, per tensor. Routers stay
in float32, for a rounding there sends an input elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sigmabranch import files
from sigmabranch.archive import MANIFEST
from sigmabranch.deploy.export.onnx_graph import save
from sigmabranch.deploy.export.staging import listing, staged
from sigmabranch.deploy.onnx_path import Array, OnnxPath
from sigmabranch.errors import ConfigError, DataError, MissingDependency

try:
    import onnx
    import onnx_ir as ir
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
except ImportError as missing:
    raise MissingDependency(missing.name or "onnx", "deploy", "quantizing") from missing

_WEIGHTS = {8: QuantType.QInt8, 4: QuantType.QInt4}
# Of one node; more change the ranges of activations little.
CALIBRATION_INPUTS = 128


def quantize_nodes(
    folder: Path | str, out: Path | str, samples: Tensor, *, bits: int = 8
) -> dict[str, Any]:
    """Write a folder of ONNX nodes again with weights of few bits and activations of eight.

    Args:
        folder: written by ``export_net(..., format="onnx-nodes")``; left as it is.
        out: another folder, of the same form.
        samples: (N, ...) float32 inputs, in the order in which they are tried; a node is calibrated
            on the first 128 that are routed to it.
        bits: of a weight, 8 or 4.

    Returns:
        The new manifest; ``calibrated`` says on how many inputs each node was.

    Raises:
        ConfigError: other bits, or ``out`` is ``folder``.
        DataError: a node to which no sample goes.
        CheckpointError: ``folder`` holds no nodes, or ``out`` cannot be written or holds something
            else.
    """
    if bits not in _WEIGHTS:
        raise ConfigError(f"weights cannot have {bits} bits: choose 8 or 4")
    if Path(out).resolve() == Path(folder).resolve():
        raise ConfigError(f"{folder} is what is quantized: choose another folder to write to")
    with OnnxPath(folder) as source:
        described = source.manifest
        arrived = _arrived(source, samples)
    for key in described["nodes"]:
        if not arrived[key]:
            raise DataError(f"no calibration sample goes to node {key}: give more samples")
    with staged(out) as stage, _quiet():
        for key, node in described["nodes"].items():
            _quantize(Path(folder) / node["file"], stage, arrived[key], _WEIGHTS[bits])
        manifest = {
            **described,
            "bits": bits,
            "calibrated": {key: len(inputs) for key, inputs in arrived.items()},
            "files": listing(stage),
        }
        files.write_json(stage / MANIFEST, manifest)
    return manifest


def _arrived(source: OnnxPath, samples: Tensor) -> dict[str, list[Mapping[str, Array]]]:
    """For each node what the routers send it, at most so many."""
    arrived: dict[str, list[Mapping[str, Array]]] = {key: [] for key in source.manifest["nodes"]}
    for sample in samples.split(1):
        for run in source.runs(sample.numpy()):
            if len(arrived[run.key]) < CALIBRATION_INPUTS:
                arrived[run.key].append(run.inputs)
        if all(len(inputs) == CALIBRATION_INPUTS for inputs in arrived.values()):
            break
    return arrived


class _Arrived(CalibrationDataReader):  # type: ignore[misc]
    """One node's inputs, one by one."""

    def __init__(self, inputs: list[Mapping[str, Array]]) -> None:
        self._rest = iter(inputs)

    def get_next(self) -> Mapping[str, Array] | None:
        return next(self._rest, None)


def _quantize(
    node: Path, stage: Path, inputs: list[Mapping[str, Array]], weights: QuantType
) -> None:
    """Write one node, its weights beside it as the export does."""
    written = stage / node.name
    quantize_static(
        node,
        written,
        _Arrived(inputs),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        # Unsigned activations saturate on processors without VNNI.
        activation_type=QuantType.QInt8,
        weight_type=weights,
        nodes_to_exclude=[*_router_nodes(onnx.load(node, load_external_data=False).graph)],
    )
    save(ir.load(written), written)


def _router_nodes(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of the operations that only the router's answer needs."""
    producer = {output: node for node in graph.node for output in node.output}

    def needed(names: list[str]) -> set[str]:
        found, queue = set(), list(names)
        while queue:
            node = producer.get(queue.pop())
            if node is not None and node.name not in found:
                found.add(node.name)
                queue += node.input
        return found

    outputs = [output.name for output in graph.output]
    if "log_prob" in outputs:
        yield from needed(["log_prob"]) - needed([name for name in outputs if name != "log_prob"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice to preprocess, which the export has done."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
