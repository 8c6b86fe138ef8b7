"""``tree.onnx``: the whole tree as one ONNX graph with nested ``If``, weights beside it."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from sigmabranch.deploy.export.check import Run, Written
from sigmabranch.deploy.export.onnx_graph import as_graph, branches, decision, save, session
from sigmabranch.deploy.export.program import HardPath, traced
from sigmabranch.errors import ConversionError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.tree import NodeId, TreeSpec

FILE = "tree.onnx"
# Outweighs what any router says, and float32 still holds it.
_FORCE = 1e4


def write(net: SigmaBranchNet, folder: Path, sample: Tensor) -> Written:
    """Write ``tree.onnx`` and ``tree.onnx.data`` for inputs of the shape of ``sample`` (1, ...).

    Raises:
        UnsupportedOperation: torch.export cannot follow the network, or ONNX has no word for an
            operation.
    """
    program = traced(HardPath(net), (sample,))
    save(as_graph(program, ["input"], ["logits", "leaf"]), folder / FILE, net.tree)

    def written(leaf: NodeId | None) -> Run:
        if leaf is None:
            return _run(session(folder / FILE))
        return _run(_forced(folder / FILE, net.tree, leaf))

    return written


def _run(tree: onnxruntime.InferenceSession) -> Run:
    def run(sample: Tensor) -> tuple[Tensor, int]:
        logits, leaf = tree.run(None, {"input": sample.numpy()})
        return torch.from_numpy(logits), int(leaf[0])

    return run


def _forced(path: Path, tree: TreeSpec, leaf: NodeId) -> onnxruntime.InferenceSession:
    """The written graph, and its own weights, with the routers on the way to ``leaf`` overruled.

    A bias in front of their softmax does it, so that the comparison behind it still counts. (Equal
    biases are one tensor of the graph, which several routers may share.)
    """
    model = ir.load(path)
    graph = model.graph
    for level, branch in enumerate(leaf):
        choice, count = decision(graph), len(tree.children(leaf[:level]))
        _overrule(_softmax(choice), branch, count, level)
        graph = branches(choice, count)[branch]
    options = onnxruntime.SessionOptions()
    # Of a graph in memory the runtime does not know where its weights are.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    return session(ir.serde.serialize_model(model).SerializeToString(), options)


def _overrule(softmax: ir.Node, branch: int, count: int, level: int) -> None:
    bias = np.zeros((1, count), np.float32)
    bias[0, branch] = _FORCE
    constant = ir.node("Constant", [], {"value": ir.tensor(bias)})
    overruled = ir.node("Add", [softmax.inputs[0], constant.outputs[0]])
    constant.outputs[0].name, overruled.outputs[0].name = f"bias_{level}", f"overruled_{level}"
    cast(ir.Graph, softmax.graph).insert_before(softmax, [constant, overruled])
    softmax.replace_input_with(0, overruled.outputs[0])


def _softmax(choice: ir.Node) -> ir.Node:
    """The router's last operation: the nearest of its kind that the decision is computed from."""
    values = deque(choice.inputs)
    while values:
        value = values.popleft()
        node = None if value is None else value.producer()
        if node is not None and node.op_type == "LogSoftmax":
            return node
        values.extend(node.inputs if node is not None else ())
    raise ConversionError("a decision of the ONNX graph is not made by a router: export as pt2")
