"""Folders of ONNX nodes from elsewhere: what the export does not write is refused unseen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx

from sigmabranch.archive import sealed
from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy import onnx_graphs, onnx_sessions
from sigmabranch.deploy.export import export_net
from sigmabranch.deploy.onnx_path import OnnxPath
from sigmabranch.errors import CheckpointError
from sigmabranch.tree import TreeSpec

pytestmark = pytest.mark.usefixtures("one_registry")


@pytest.fixture(scope="module")
def case(dense, batches, tmp_path_factory):
    """A folder of the nodes of a network with two leaves, and inputs."""
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)
    net = convert(dense, batches, TreeSpec.balanced(1, projection_dim=8), spec=spec)
    x = torch.cat([x for x, _ in batches])
    folder = tmp_path_factory.mktemp("case") / "nodes"
    export_net(net, folder, x[:2], format="onnx-nodes")
    return folder, x


def resealed(folder, change=lambda manifest: None):
    """The manifest of a folder, whose files may have changed, written anew."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    change(manifest)
    path.write_text(json.dumps(sealed(manifest)))


def refused(folder):
    with pytest.raises(CheckpointError) as caught:
        OnnxPath(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def outside(model):
    """A weight that lies outside the graph, as text entries."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    return {entry.key: entry for entry in tensor.external_data}


def placed(**entries):
    def change(model):
        for key, value in entries.items():
            outside(model)[key].value = value

    return change


def of_another_shape(model):
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    tensor.dims[0] += 1


def with_attribute(**fields):
    def change(model):
        model.graph.node[0].attribute.append(onnx.AttributeProto(name="more", **fields))

    return change


def with_output_dim(value):
    def change(model):
        dim = model.graph.output[0].type.tensor_type.shape.dim[1]
        if isinstance(value, int):
            dim.dim_value = value
        else:
            dim.dim_param = value

    return change


def of_a_size_that_depends(model):
    node = onnx.helper.make_node("NonZero", [model.graph.input[0].name], ["places"])
    model.graph.node.append(node)


def with_text(model):
    node = onnx.helper.make_node("Cast", [model.graph.input[0].name], ["text"], to=8)
    model.graph.node.append(node)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (placed(location="elsewhere.bin"), "a weight in 'elsewhere.bin' instead of '0.onnx.data'"),
        (placed(location="root.onnx.data"), "a weight in 'root.onnx.data' instead"),
        (placed(offset="999999999"), "where 0.onnx.data has none"),
        (placed(offset="-4096"), "'-4096' as a place of a weight"),
        (placed(length="4"), "where 0.onnx.data has none"),
        (lambda m: setattr(outside(m)["offset"], "key", "checksum"), "instead of"),
        (of_another_shape, "where 0.onnx.data has none"),
        (with_attribute(t={"external_data": [{"key": "location"}]}), "a file named in the attri"),
        (with_attribute(tensors=[{"data_location": 1}]), "a file named in the attribute more"),
        (with_attribute(sparse_tensors=[{}]), "sparse tensors"),
        (lambda m: m.graph.sparse_initializer.add(), "sparse tensors"),
        (with_attribute(g={}), "a loop or a decision"),
        (with_attribute(graphs=[{}]), "a loop or a decision"),
        (lambda m: setattr(m.graph.node[0], "domain", "example.org"), "the foreign operation"),
        (lambda m: m.functions.add(name="Conv"), "functions or a training"),
        (lambda m: m.training_info.add(), "functions or a training"),
        (lambda m: setattr(m.graph.node[0], "op_type", "Nothing"), "without a size"),
        (with_output_dim(7), "sizes cannot be told|outputs of other shapes"),
        (with_output_dim("any"), "without a size"),
        (with_output_dim(-1), "of a negative size"),
        (of_a_size_that_depends, "without a size"),
        (with_text, "a tensor of type 8"),
        (lambda m: setattr(m.graph.output[0], "name", "answer"), "the value answer without"),
    ],
)
def test_a_graph_that_the_export_does_not_write_is_refused(case, tmp_path, change, said):
    folder, _ = case
    shutil.copytree(folder, tmp_path / "nodes")
    path = tmp_path / "nodes" / "0.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    resealed(tmp_path / "nodes")
    with pytest.raises(CheckpointError, match=said) as caught:
        OnnxPath(tmp_path / "nodes")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_are_bounded_before_a_session_is_made(case, monkeypatch):
    folder, _ = case
    with monkeypatch.context() as patch:
        patch.setattr(onnx_graphs, "MOST_GRAPH_BYTES", 1000)
        assert "too large" in refused(folder)
    monkeypatch.setattr(onnx_graphs, "MOST_VALUE_BYTES", 10_000)
    assert "values of more than 10,000 bytes" in refused(folder)


def test_a_file_that_is_no_graph_is_damaged(case, tmp_path):
    folder, _ = case
    shutil.copytree(folder, tmp_path / "nodes")
    (tmp_path / "nodes" / "root.onnx").write_bytes(b"\xff\xff")
    resealed(tmp_path / "nodes")
    assert "it is no ONNX graph" in refused(tmp_path / "nodes")


def test_names_are_those_of_the_manifest(case, tmp_path):
    folder, _ = case
    shutil.copytree(folder, tmp_path / "nodes")
    resealed(tmp_path / "nodes", lambda m: m["nodes"]["0"].update(outputs=["answer"]))
    assert "outputs ['logits'] instead of ['answer']" in refused(tmp_path / "nodes")


def test_weights_that_no_graph_names_are_refused(case, tmp_path):
    folder, _ = case
    shutil.copytree(folder, tmp_path / "nodes")
    with open(tmp_path / "nodes" / "1.onnx.data", "ab") as file:
        file.write(bytes(4096))
    resealed(tmp_path / "nodes")
    assert "1.onnx.data of" in refused(tmp_path / "nodes")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["nodes"].update(root=m["nodes"]["0"]),
        lambda m: m.update(classes=m["classes"] + 1),
        lambda m: m["input"]["shape"].append(1),
        lambda m: m.update(
            routers=[], leaves=[[0]], nodes={k: m["nodes"][k] for k in ("root", "0")}
        ),
        lambda m: m.update(early=True, nodes={**m["nodes"], "decide": m["nodes"]["root"]}),
    ],
    ids=["another node", "classes", "input", "a tree without its router", "early"],
)
def test_nodes_that_do_not_fit_together_are_refused(case, tmp_path, change):
    """Else a router that is not asked would send every input to the first leaf."""
    folder, _ = case
    shutil.copytree(folder, tmp_path / "nodes")
    resealed(tmp_path / "nodes", change)
    assert "do not fit together" in refused(tmp_path / "nodes")


def test_onnx_runtime_is_kept_from_reporting(tmp_path):
    """It makes an identifier and a store of reports as soon as it is imported."""
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPYCACHEPREFIX": str(tmp_path / "py")}
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    program = (
        "import sigmabranch.deploy.onnx_sessions, onnxruntime, os; "
        "print(os.listdir(os.environ['HOME']))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ".cache" not in done.stdout


@pytest.mark.parametrize("moment", ["made", "run"])
def test_what_onnx_runtime_raises_is_one_line(case, monkeypatch, moment):
    folder, x = case

    class Failing:
        def __init__(self, *_, **__):
            if moment == "made":
                raise RuntimeError("no kernel\nfor this")

        def run(self, *_):
            raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(onnx_sessions.onnxruntime, "InferenceSession", Failing)
    with (
        OnnxPath(folder) as path,
        pytest.raises(CheckpointError, match=r"cannot run .*root\.onnx: no kernel for this"),
    ):
        path.predict(x[:1])
