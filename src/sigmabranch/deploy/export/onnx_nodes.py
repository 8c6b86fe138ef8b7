"""``root.onnx``, ``0.onnx``, ``0-1.onnx``, …: one ONNX graph and one file of weights per node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sigmabranch.deploy.export.check import Written
from sigmabranch.deploy.export.nodes import Part, Walk, node_parts, write_manifest
from sigmabranch.deploy.export.onnx_graph import as_graph, save, session
from sigmabranch.deploy.export.program import traced
from sigmabranch.deploy.onnx_graphs import check_graphs
from sigmabranch.deploy.onnx_path import FORMAT, read_nodes
from sigmabranch.errors import CheckpointError, UnsupportedOperation
from sigmabranch.net import SigmaBranchNet


def write(net: SigmaBranchNet, folder: Path, sample: Tensor) -> Written:
    """Write all nodes for inputs of the shape of ``sample`` (1, ...), and the manifest last.

    Raises:
        UnsupportedOperation: torch.export cannot follow a node, or ONNX has no word for an
            operation.
    """
    nodes = {part.key: write_part(part, folder) for part in node_parts(net, sample)}
    write_manifest(net, folder, sample, format=FORMAT, nodes=nodes)
    try:
        check_graphs(folder, read_nodes(folder))
    except CheckpointError as error:  # what cannot be run must not be written
        raise UnsupportedOperation(f"ONNX nodes cannot say this network: {error}") from error
    return Walk(net, _Sessions(folder, nodes))


def write_part(part: Part, folder: Path) -> dict[str, Any]:
    """Write one node; returns its entry in the manifest."""
    name = f"{part.key}.onnx"
    program = traced(part.function, part.inputs)
    save(as_graph(program, part.input_names, part.outputs), folder / name)
    return {"file": name, "inputs": list(part.input_names), "outputs": list(part.outputs)}


class _Sessions:
    """The written files, to be run by key."""

    def __init__(self, folder: Path, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        self.nodes = nodes
        self.sessions = {key: session(folder / node["file"]) for key, node in nodes.items()}

    def __call__(self, key: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        arrays = [tensor.numpy() for tensor in tensors]
        inputs = dict(zip(self.nodes[key]["inputs"], arrays, strict=True))
        return [torch.from_numpy(output) for output in self.sessions[key].run(None, inputs)]
