"""Few bits: nodes are calibrated on their own inputs, routers stay exact, answers stay near."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx

from sigmabranch.archive import sealed
from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy.export import export_net
from sigmabranch.deploy.onnx_path import OnnxPath
from sigmabranch.deploy.onnx_sessions import Sessions
from sigmabranch.deploy.placement import mix_nodes, place_bits
from sigmabranch.deploy.quantize import quantize_nodes
from sigmabranch.errors import CheckpointError, ConfigError, DataError, StorageError
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
    with torch.no_grad():
        hard = net.hard(x[:8])
    with OnnxPath(folder / "fp32", budget=_largest(folder / "fp32")) as path:
        for number in range(8):
            logits, leaf = path(x[number : number + 1].numpy())
            assert leaf == node_key(net.tree.leaves[hard.leaf[number]])
            np.testing.assert_allclose(logits[0], hard.logits[number], rtol=1e-3, atol=1e-4)


def test_what_was_read_is_let_go_of_once_a_session_has_been_made(case, monkeypatch):
    _, _, folder, _ = case
    read, content = [], Sessions._content

    def remembered(sessions, name, size):
        memory = content(sessions, name, size)
        read.append(weakref.ref(memory.obj))
        return memory

    monkeypatch.setattr(Sessions, "_content", remembered)
    with OnnxPath(folder / "fp32") as path:
        path._sessions.get("root")
        gc.collect()
        assert len(read) == 2 and not any(memory() for memory in read)


def test_a_closed_path_says_so(case):
    _, x, folder, _ = case
    path = OnnxPath(folder / "fp32")
    path.predict(x[:1])
    path.close()
    path.close()
    with pytest.raises(ConfigError, match="is closed: open it again"):
        path.predict(x[:1])


def test_quantizing_leaves_no_thread_behind(case, tmp_path):
    _, x, folder, _ = case
    before = threading.active_count()
    quantize_nodes(folder / "fp32", tmp_path, x)
    assert threading.active_count() == before


def _largest(folder) -> int:
    """Bytes of the largest node."""
    manifest = json.loads((folder / "manifest.json").read_text())
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    nodes = [node["file"] for node in manifest["nodes"].values()]
    return max(sizes[name] + sizes[f"{name}.data"] for name in nodes)


def test_only_the_path_is_read_within_the_budget_and_what_fits_stays(case):
    _, x, folder, _ = case
    with (
        OnnxPath(folder / "int8") as roomy,
        OnnxPath(folder / "int8", budget=_largest(folder / "int8")) as tight,
    ):
        for path in (roomy, tight):
            first = path.predict(x[:1])
            assert first.trace.bytes_read == path.path_bytes(first.leaf)
            assert first.trace.hit_bytes == 0
        again, anew = roomy.predict(x[:1]), tight.predict(x[:1])
        assert again.trace.bytes_read == 0
        assert again.trace.hit_bytes == roomy.path_bytes(again.leaf)
        assert anew.trace.bytes_read > 0
        torch.testing.assert_close(again.logits, anew.logits)
        roomy.forget()
        assert roomy.predict(x[:1]).trace.bytes_read == roomy.path_bytes(again.leaf)
    with pytest.raises(ConfigError, match=f"largest node takes {_largest(folder / 'int8')}"):
        OnnxPath(folder / "int8", budget=_largest(folder / "int8") - 1)


def test_a_path_that_is_known_early_is_read_ahead(dense, batches, tmp_path):
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)
    tree = TreeSpec.balanced(1, projection_dim=8, decide_after="layer1")
    x = torch.cat([x for x, _ in batches])
    export_net(convert(dense, batches, tree, spec=spec), tmp_path, x[:4], format="onnx-nodes")
    with OnnxPath(tmp_path) as path:
        runs = path.runs(x[:1].numpy())
        assert [next(runs).key, next(runs).key] == ["decide", "root"]
        path._sessions._reader.submit(int).result()  # all that was asked for has been read
        read = path._sessions.read()
        assert len(read) == 3
        assert next(runs).key in read


@pytest.fixture(scope="module")
def fewer(case):
    """The same network's nodes in four bits."""
    _, x, folder, _ = case
    quantize_nodes(folder / "fp32", folder / "int4", x, bits=4)
    return folder / "int4"


def test_bits_are_placed_where_they_matter_within_a_total(case, fewer, tmp_path):
    _, x, folder, _ = case
    with OnnxPath(folder / "int8") as large, OnnxPath(fewer) as small:
        most, least = large.total_bytes, small.total_bytes
    assert set(place_bits(folder / "int8", fewer, x[:4], total=most).values()) == {8}
    assert set(place_bits(folder / "int8", fewer, x[:4], total=least).values()) == {4}
    with pytest.raises(ConfigError, match=f"the nodes take {least}"):
        place_bits(folder / "int8", fewer, x[:4], total=least - 1)
    total = (most + least) // 2
    bits = place_bits(folder / "int8", fewer, x[:16], total=total)
    assert {*bits.values()} == {4, 8}
    mix_nodes({8: folder / "int8", 4: fewer}, bits, tmp_path / "mixed")
    with OnnxPath(tmp_path / "mixed") as mixed:
        assert mixed.total_bytes <= total
        assert mixed.manifest["bits"] == bits
        for key, count in bits.items():
            origin = fewer if count == 4 else folder / "int8"
            name = f"{key}.onnx.data"
            assert (tmp_path / "mixed" / name).read_bytes() == (origin / name).read_bytes()
        mixed(x[:1].numpy())


def test_a_leaf_that_no_sample_takes_is_the_first_to_lose_bits(case, fewer):
    net, x, folder, _ = case
    with torch.no_grad():
        leaf = net.hard(x).leaf
    with OnnxPath(folder / "int8") as large:
        total = large.total_bytes - 1
    for taken in (0, 1):
        bits = place_bits(folder / "int8", fewer, x[leaf == taken][:4], total=total)
        assert bits[str(1 - taken)] == 4
        assert bits[str(taken)] == 8


def test_eight_bits_stay_near_and_take_a_quarter(case):
    _, x, folder, _ = case
    pairs = []
    with OnnxPath(folder / "fp32") as exact, OnnxPath(folder / "int8") as near:
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
    with pytest.raises(ConfigError, match="choose another folder to write to"):
        quantize_nodes(folder / "fp32", folder / "fp32", x)


def test_quantized_nodes_never_replace_a_saved_network(case, tmp_path):
    net, x, folder, manifest = case
    net.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for write in (
        lambda: export_net(net, tmp_path, x[:4], format="onnx-nodes"),
        lambda: quantize_nodes(folder / "fp32", tmp_path, x),
        lambda: mix_nodes({8: folder / "int8"}, dict.fromkeys(manifest["nodes"], 8), tmp_path),
    ):
        with pytest.raises(CheckpointError, match="would be lost: choose another folder"):
            write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_flipped_bit_of_the_nodes_manifest_is_found(case, tmp_path, kind):
    _, _, folder, _ = case
    shutil.copytree(folder / kind, tmp_path / "nodes")
    path = tmp_path / "nodes" / "manifest.json"
    whole = path.read_bytes()
    for place in (whole.index(b"leaves") + 14, whole.index(b"classes") + 10, len(whole) // 2):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="is damaged"):
            OnnxPath(tmp_path / "nodes")


def test_nodes_written_before_manifests_had_a_hash_run(case, tmp_path):
    _, x, folder, _ = case
    shutil.copytree(folder / "fp32", tmp_path / "nodes")
    manifest = json.loads((folder / "fp32" / "manifest.json").read_text())
    del manifest["sha256"], manifest["written_by"]
    (tmp_path / "nodes" / "manifest.json").write_text(json.dumps(manifest))
    with OnnxPath(folder / "fp32") as new, OnnxPath(tmp_path / "nodes") as old:
        assert torch.equal(new.predict(x[:1]).logits, old.predict(x[:1]).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("files"), "files must be dict"),
        (lambda m: m.pop("input"), "not a input"),
        (lambda m: m.update(input=7), "a input is a set of named values"),
        (lambda m: m["input"].update(shape=["a"]), "input shape must be int"),
        (lambda m: m["files"].update({"0.onnx": 9}), "the bytes and sha256 of '0.onnx'"),
        (lambda m: m["files"].pop("0.onnx"), "it lists no file of node 0"),
        (lambda m: m.update(nodes={}), "its nodes are not its tree's"),
        (lambda m: m.update(nodes=[]), "nodes must be dict"),
        (lambda m: m["nodes"].update({"0": 7}), "a node 0 is a set of named values"),
        (lambda m: m["nodes"]["0"].pop("inputs"), "not a node 0"),
        (lambda m: m["nodes"]["0"].update(outputs=[1]), "node 0 outputs must be str"),
        (lambda m: m["nodes"].update({"2": m["nodes"]["1"]}), "its nodes are not its tree's"),
        (lambda m: m.update(leaves=[[0], [0]]), "tree leaves must be distinct"),
        (lambda m: m.update(leaves=[]), "at least two leaves"),
        (lambda m: m.update(leaves=[5]), "is damaged"),
        (lambda m: m.update(leaves=7), "leaves must be list"),
        (lambda m: m.update(leaves=[[0], [1, 0], [1, 1]]), "its nodes are not its tree's"),
        (lambda m: m.update(routers=[]), "its nodes are not its tree's"),
        (lambda m: m.update(early=True), "its nodes are not its tree's"),
        (lambda m: m.update(early="no"), "early must be bool"),
        (lambda m: m.update(notes=[]), "notes must be dict"),
    ],
)
def test_a_manifest_of_nodes_that_asks_for_the_impossible_is_refused(
    case, tmp_path, change, message
):
    _, _, folder, _ = case
    shutil.copytree(folder / "int8", tmp_path / "nodes")
    manifest = json.loads((folder / "int8" / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "nodes" / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(CheckpointError, match=message) as caught:
        OnnxPath(tmp_path / "nodes")
    assert "\n" not in str(caught.value)


def test_damaged_nodes_are_refused(case, tmp_path):
    _, x, folder, _ = case
    with pytest.raises(CheckpointError, match="holds no ONNX nodes"):
        OnnxPath(tmp_path)
    for name in ("0.onnx", "1.onnx", "root.onnx"):
        (tmp_path / name).write_bytes((folder / "int8" / name).read_bytes())
    manifest = json.loads((folder / "int8" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is missing"):
        OnnxPath(tmp_path)
    for name in manifest["files"]:
        damage = b"x" if name.endswith(".data") else b""
        content = (folder / "int8" / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) - len(damage)] + damage)
    with OnnxPath(tmp_path) as path, pytest.raises(StorageError, match="is damaged"):
        path(x[:1].numpy())
    (tmp_path / "root.onnx").write_bytes((tmp_path / "root.onnx").read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 differs"):
        OnnxPath(tmp_path)
