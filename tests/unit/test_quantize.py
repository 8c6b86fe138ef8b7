"""Few bits: nodes are calibrated on their own inputs, routers stay exact, answers stay near."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx

from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy.export import export_net
from sigmabranch.deploy.onnx_path import OnnxPath
from sigmabranch.deploy.quantize import quantize_nodes
from sigmabranch.errors import CheckpointError, ConfigError, DataError
from sigmabranch.tree import TreeSpec, node_key


@pytest.fixture(scope="module")
def case(dense, batches, tmp_path_factory):
    """A network of two leaves, its inputs, its nodes in fp32 and in eight bits."""
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)
    net = convert(dense, batches, TreeSpec.balanced(1, projection_dim=8), spec=spec)
    x = torch.cat([x for x, _ in batches])
    folder = tmp_path_factory.mktemp("nodes")
    export_net(net, folder / "fp32", x[:4], format="onnx-nodes")
    manifest = quantize_nodes(folder / "fp32", folder / "int8", x)
    return net, x, folder, manifest


def test_the_path_in_fp32_is_the_networks(case):
    net, x, folder, _ = case
    path = OnnxPath(folder / "fp32", keep=1)
    with torch.no_grad():
        hard = net.hard(x[:8])
    for number in range(8):
        logits, leaf = path(x[number : number + 1].numpy())
        assert leaf == node_key(net.tree.leaves[hard.leaf[number]])
        np.testing.assert_allclose(logits[0], hard.logits[number], rtol=1e-3, atol=1e-4)


def test_eight_bits_stay_near_and_take_a_quarter(case):
    _, x, folder, _ = case
    exact, near = OnnxPath(folder / "fp32"), OnnxPath(folder / "int8")
    pairs = []
    for sample in x[:32].split(1):
        *_, (_, _, expected) = exact.runs(sample.numpy())
        *_, (_, _, found) = near.runs(sample.numpy())
        pairs.append((expected["logits"], found["logits"]))
    expected, found = map(np.concatenate, zip(*pairs, strict=True))
    assert 0 < np.abs(found - expected).mean() < 0.15 * np.abs(expected).mean()
    graph = onnx.load(folder / "int8" / "0.onnx")
    kinds = {tensor.data_type for tensor in graph.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}


def test_each_node_is_calibrated_on_what_is_routed_to_it(case):
    net, x, _, manifest = case
    with torch.no_grad():
        leaf = net.hard(x).leaf
    assert manifest["calibrated"] == {
        "root": len(x),
        "0": int((leaf == 0).sum()),
        "1": int((leaf == 1).sum()),
    }


def test_routers_keep_their_precision(case):
    _, _, folder, _ = case
    exact = onnx.load(folder / "fp32" / "root.onnx").graph
    found = onnx.load(folder / "int8" / "root.onnx").graph
    norm = next(node for node in found.node if node.op_type == "LayerNormalization")
    weights = {tensor.name for tensor in exact.initializer}
    assert norm.input[1] in weights  # read as it was, not through a dequantizer
    gemms = [node for node in found.node if node.op_type in ("Gemm", "MatMul")]
    assert gemms and all(node.input[1] in weights for node in gemms)


def test_a_leaf_without_inputs_and_other_bits_are_refused_and_leave_nothing(case, tmp_path):
    net, x, folder, _ = case
    with torch.no_grad():
        one_sided = x[net.hard(x).leaf == 0]
    with pytest.raises(DataError, match="no calibration sample goes to node 1: give more"):
        quantize_nodes(folder / "fp32", tmp_path / "out", one_sided)
    with pytest.raises(ConfigError, match="choose 8 or 4"):
        quantize_nodes(folder / "fp32", tmp_path / "out", x, bits=3)
    assert not (tmp_path / "out").exists()


def test_damaged_nodes_are_refused(case, tmp_path):
    _, _, folder, _ = case
    with pytest.raises(CheckpointError, match="holds no ONNX nodes"):
        OnnxPath(tmp_path)
    for name in ("0.onnx", "1.onnx", "root.onnx"):
        (tmp_path / name).write_bytes((folder / "int8" / name).read_bytes())
    manifest = json.loads((folder / "int8" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is missing"):
        OnnxPath(tmp_path)
    for name in manifest["files"]:
        (tmp_path / name).write_bytes((folder / "int8" / name).read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        OnnxPath(tmp_path)
