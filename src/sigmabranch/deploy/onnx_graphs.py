"""Whether the graphs of a folder are such as the export writes, before ONNX Runtime sees them.

A graph is a program: it can name files anywhere, loop, and ask for any amount of memory while a
session is made of it. What the export writes does none of that, and so nothing else is let in. The
check reads the graphs alone; each is bound by its SHA-256 to what runs later.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from sigmabranch.deploy.export.nodes import DECIDE
from sigmabranch.deploy.package import ancestry, child, parent
from sigmabranch.errors import CheckpointError, MissingDependency
from sigmabranch.tree import node_key

try:
    import onnx
    import onnx_ir as ir
    from google.protobuf.message import DecodeError
    from onnx import AttributeProto, GraphProto, ModelProto, TensorProto
except ImportError as missing:
    raise MissingDependency(missing.name or "onnx", "deploy", "running ONNX nodes") from missing

MOST_GRAPH_BYTES = 16 << 20
# Of all weights and results of one node together.
MOST_VALUE_BYTES = 4 << 30
# What a weight says of its place in the file beside the graph.
_PLACE = {"location", "offset", "length"}
_PAGE = 4096
# ONNX has them for four bits since version 21 of its operations, ONNX Runtime before that.
_QUANTIZERS = {("com.microsoft", "QuantizeLinear"), ("com.microsoft", "DequantizeLinear")}
_SINCE = 21


class Value(NamedTuple):
    """What a tensor is: its element type by ONNX's number, and its shape."""

    type: int
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of memory."""
        try:
            return math.ceil(math.prod(self.shape) * ir.DataType(self.type).bitwidth / 8)
        except (TypeError, ValueError) as error:  # text, for one, has no size
            raise _Foreign(f"a tensor of type {self.type}") from error


Values: TypeAlias = dict[str, Value]
# Inputs and outputs.
_Graph: TypeAlias = tuple[Values, Values]


class _Foreign(Exception):
    """Something in a graph that the export does not write."""


def check_graphs(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Whether each node's graph is one that the export writes, and hands on what the next takes.

    Args:
        folder: holds the files.
        manifest: as read; its files have the lengths that it says.

    Raises:
        CheckpointError: a graph that is damaged, or that the export does not write.
    """
    graphs = {
        key: _checked(folder, node, manifest["files"]) for key, node in manifest["nodes"].items()
    }
    try:
        _check_links(manifest, graphs)
    except _Foreign as error:
        raise CheckpointError(
            f"{folder} is damaged: its nodes do not fit together, {error}; export it again"
        ) from error


def _checked(
    folder: Path, node: Mapping[str, Any], listed: Mapping[str, Mapping[str, Any]]
) -> _Graph:
    """Inputs and outputs of a node's graph, in order."""
    name = node["file"]
    path = folder / name
    if listed[name]["bytes"] > MOST_GRAPH_BYTES:
        raise CheckpointError(f"{path} is no graph that sigmabranch writes: it is too large")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != listed[name]["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs; copy it again")
    data = f"{name}.data"
    try:
        model = ModelProto.FromString(content)
        _check_program(model)
        _check_weights(model.graph, data, listed.get(data, {}).get("bytes", 0))
        inputs, outputs = _sized(model)
        for what, found in (("inputs", inputs), ("outputs", outputs)):
            if list(found) != list(node[what]):
                raise _Foreign(f"{what} {list(found)} instead of {list(node[what])}")
    except DecodeError as error:
        raise CheckpointError(f"{path} is damaged: it is no ONNX graph; export it again") from error
    except _Foreign as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is no graph that sigmabranch writes: it has {reason}; export it again"
        ) from error
    return inputs, outputs


def _check_program(model: ModelProto) -> None:
    """Plain operations of ONNX itself in a row, without a program inside a program."""
    if model.functions or model.training_info:
        raise _Foreign("functions or a training inside")
    for node in model.graph.node:
        if node.domain and (node.domain, node.op_type) not in _QUANTIZERS:
            raise _Foreign(f"the foreign operation {node.domain}.{node.op_type}")
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise _Foreign(f"a loop or a decision, {node.op_type}")
            _check_attribute(attribute)


def _check_attribute(attribute: AttributeProto) -> None:
    if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
        raise _Foreign("sparse tensors")
    for tensor in (attribute.t, *attribute.tensors):
        if tensor.data_location != TensorProto.DEFAULT or tensor.external_data:
            raise _Foreign(f"a file named in the attribute {attribute.name}")


def _check_weights(graph: GraphProto, data: str, size: int) -> None:
    """Whether what is not in the graph is in ``data``, of ``size`` bytes, and fills that."""
    if graph.sparse_initializer:
        raise _Foreign("sparse tensors")
    end = 0
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.DEFAULT and not tensor.external_data:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place.keys() != _PLACE or place["location"] != data:
            raise _Foreign(f"a weight in {place.get('location')!r} instead of {data!r}")
        offset, length = _natural(place["offset"]), _natural(place["length"])
        if length != Value(tensor.data_type, tuple(tensor.dims)).bytes or offset + length > size:
            raise _Foreign(f"the weight {tensor.name} where {data} has none")
        end = max(end, offset + length)
    if size != -(-end // _PAGE) * _PAGE:
        raise _Foreign(f"weights up to byte {end} in {data} of {size} bytes")


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _Foreign(f"{text[:40]!r} as a place of a weight")
    return int(text)


def _sized(model: ModelProto) -> _Graph:
    """Inputs and outputs of a graph in which everything has a size that is known and bounded."""
    claimed = {output.name: _value(output) for output in model.graph.output}
    try:
        graph = onnx.shape_inference.infer_shapes(
            _unsized(model), check_type=True, strict_mode=True, data_prop=True
        ).graph
    except Exception as error:  # some of what it raises is not onnx's own
        raise _Foreign(f"values whose sizes cannot be told ({error})") from error
    weights = {t.name: Value(t.data_type, tuple(t.dims)) for t in graph.initializer}
    inputs = {value.name: _value(value) for value in graph.input}
    outputs = {value.name: _value(value) for value in graph.output}
    if outputs != claimed:
        raise _Foreign("outputs of other shapes than it says")
    values = {value.name: _value(value) for value in graph.value_info} | weights | inputs | outputs
    for node in graph.node:
        for name in node.output:
            if name and name not in values:
                raise _Foreign(f"the value {name} without a size")
    if sum(value.bytes for value in values.values()) > MOST_VALUE_BYTES:
        raise _Foreign(f"values of more than {MOST_VALUE_BYTES:,} bytes")
    return inputs, outputs


def _unsized(model: ModelProto) -> ModelProto:
    """The same in ONNX's own operations, without what it says of the values that it works out."""
    model = copy.deepcopy(model)
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    for node in model.graph.node:
        if node.domain:
            node.domain = ""
    versions = [entry.version for entry in model.opset_import if not entry.domain]
    del model.opset_import[:]
    model.opset_import.add(domain="", version=max([_SINCE, *versions]))
    return model


def _value(info: onnx.ValueInfoProto) -> Value:
    """What a graph says of a value, which must be a tensor of a fixed shape."""
    tensor = info.type.tensor_type
    dims = tensor.shape.dim
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
        raise _Foreign(f"the value {info.name} without a size")
    if any(dim.dim_value < 0 for dim in dims):
        raise _Foreign(f"the value {info.name} of a negative size")
    return Value(tensor.elem_type, tuple(dim.dim_value for dim in dims))


def _check_links(manifest: Mapping[str, Any], graphs: Mapping[str, _Graph]) -> None:
    """Whether each node takes what its parent gives, and answers what its place asks for."""
    routers, early, branches = manifest["routers"], manifest["early"], _branches(manifest)
    feature = [_float(*manifest["input"]["shape"])]
    if early:
        said = _float(1, len(routers), max(branches.values()))
        feature = _handed_on(DECIDE, graphs, feature, {"log_prob": said})
    left = {"root": feature}
    while left:
        key, feature = left.popitem()
        answer = {}
        if not branches[key]:
            answer["logits"] = _float(1, manifest["classes"])
        elif key in routers and not early:
            answer["log_prob"] = _float(1, branches[key])
        feature = _handed_on(key, graphs, feature, answer)
        left |= {child(key, number): feature for number in range(branches[key])}


def _handed_on(
    key: str, graphs: Mapping[str, _Graph], feature: list[Value], answer: Values
) -> list[Value]:
    """The feature that a node makes of ``feature``; its ``answer`` is what it gives after that."""
    inputs, outputs = graphs[key]
    passed = len(outputs) - len(answer)
    if [*inputs.values()] != feature or [*outputs.items()][passed:] != [*answer.items()]:
        raise _Foreign(f"node {key} belongs elsewhere")
    return [*outputs.values()][:passed]


def _branches(manifest: Mapping[str, Any]) -> dict[str, int]:
    """How many children each node of the tree has."""
    leaves = [node_key(tuple(leaf)) for leaf in manifest["leaves"]]
    keys = {key for leaf in leaves for key in ancestry(leaf)}
    children = Counter(parent(key) for key in keys - {"root"})
    return {key: children[key] for key in keys}


def _float(*shape: int) -> Value:
    return Value(TensorProto.FLOAT, shape)
