"""A torch.export program as an ONNX graph, and the file of weights beside it.

Weights lie in the order in which they are read: node after node of the tree, depth first, and
within a node by first use. A runtime that maps the file then touches one run of pages per node, and
reading ahead brings what is needed next.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript  # noqa: F401 (torch.onnx needs it)
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch.export import ExportedProgram

from sigmabranch.errors import UnsupportedOperation
from sigmabranch.tree import NodeId, TreeSpec, node_key

_OPSET = 20
# Smaller tensors stay in the graph: shapes and constants that runtimes read while they load it.
_INLINE_BYTES = 1024
# Nodes begin at pages, tensors at cache lines.
_NODE_ALIGNMENT, _TENSOR_ALIGNMENT = 4096, 64
RANGES = "sigmabranch.ranges"


def as_graph(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The ONNX graph of a program, batch norms folded, without a trace of where it was made.

    Raises:
        UnsupportedOperation: ONNX has no word for an operation.
    """
    with _quiet():
        try:
            exported: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                optimize=True,
                verify=False,
                verbose=False,
                opset_version=_OPSET,
                input_names=inputs,
                output_names=outputs,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UnsupportedOperation(_unsaid(error)) from error
    model = exported.model
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in _values(graph):
            value.metadata_props.clear()
            value.doc_string = None
    return model


def save(model: ir.Model, path: Path, tree: TreeSpec | None = None) -> None:
    """Write the graph to ``path`` and its larger tensors to ``path`` + ``.data``.

    The graph's metadata name the bytes of each tree node, ``sigmabranch.ranges``: node key →
    [offset, length].

    Args:
        model: of a whole tree or of one node.
        path: of the graph.
        tree: the tree that the graph's decisions make; None for a node, which makes none.
    """
    data = path.with_name(f"{path.name}.data")
    ranges: dict[str, list[int]] = {}
    with open(data, "wb") as file:
        for node, value in _by_node(model.graph, tree):
            tensor: Any = value.const_value
            is_new = node_key(node) not in ranges
            offset = _padded(file.tell(), _NODE_ALIGNMENT if is_new else _TENSOR_ALIGNMENT)
            file.seek(offset)
            file.write(tensor.tobytes())
            begin = ranges.setdefault(node_key(node), [offset, 0])
            begin[1] = file.tell() - begin[0]
            value.const_value = ir.ExternalTensor(
                data.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name or "",
                base_dir=path.parent,
            )
        file.truncate(_padded(file.tell(), _NODE_ALIGNMENT))  # so that direct reads reach the end
    model.metadata_props[RANGES] = json.dumps(ranges)
    ir.save(model, path)
    onnx.checker.check_model(path, full_check=True)


def decision(graph: ir.Graph) -> ir.Node:
    """The ``If`` that a graph ends with."""
    return cast(ir.Node, graph.outputs[0].producer())


def branches(node: ir.Node, count: int) -> list[ir.Graph]:
    """The graphs of the ``count`` branches of a decision, which is a chain of ``If``.

    The first asks for the last branch, and what it does else is to ask for the one before.
    """
    taken, left = (node.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    return [left, taken] if count == 2 else [*branches(decision(left), count - 1), taken]


def session(
    model: Path | bytes, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """A quiet session on one thread: a check runs small things, once."""
    options = options or onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _by_node(graph: ir.Graph, tree: TreeSpec | None) -> list[tuple[NodeId, ir.Value]]:
    """Tensors worth a place outside the graph, with the tree node that reads them, in its order."""
    readers: dict[ir.Value, NodeId] = {}
    for node, value in _reads(graph, (), tree):
        if value.const_value is not None and value.const_value.nbytes >= _INLINE_BYTES:
            readers[value] = _common(readers.get(value, node), node)
    # Stable: within a node, tensors stay in the order of their first use.
    return sorted(((node, value) for value, node in readers.items()), key=lambda item: item[0])


def _reads(
    graph: ir.Graph, node: NodeId, tree: TreeSpec | None
) -> Iterator[tuple[NodeId, ir.Value]]:
    for operation in graph:
        yield from ((node, value) for value in operation.inputs if value is not None)
        if operation.op_type == "If" and tree is not None:
            children = tree.children(node)
            for child, branch in zip(children, branches(operation, len(children)), strict=True):
                yield from _reads(branch, child, tree)


def _common(one: NodeId, other: NodeId) -> NodeId:
    length = next(
        (level for level, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1),
        min(len(one), len(other)),
    )
    return one[:length]


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from (*graph.inputs, *graph.initializers.values())
    for operation in graph:
        yield from operation.outputs


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _unsaid(error: Exception) -> str:
    """The exporter's page of advice as one line."""
    chain: BaseException | None = error
    text = ""
    while chain is not None:
        text, chain = f"{text} {chain}", chain.__cause__
    found = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if found is None:
        return f"ONNX cannot say this network: {str(error).strip().splitlines()[0]}"
    return (
        f"ONNX has no operation for {found[1]}: export as pt2, or run the network with sigmabranch"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own code, which no caller can act on."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
