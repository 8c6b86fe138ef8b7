"""LiteRT: a model per node, channel-last at every boundary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sigmabranch.deploy.export import Export, export_net
from sigmabranch.errors import UnsupportedOperation
from sigmabranch.net import SigmaBranchNet

interpreter = pytest.importorskip(
    "ai_edge_litert.interpreter", reason="needs the litert extra: run make test-exports"
)


@pytest.fixture(scope="module")
def export(net, x, tmp_path_factory) -> Export:
    return export_net(net, tmp_path_factory.mktemp("litert"), x, format="litert")


def outputs(folder: Path, key: str, tensors: list[Tensor]) -> list[Tensor]:
    runner = interpreter.Interpreter(str(folder / f"{key}.tflite")).get_signature_runner()
    found = runner(**{f"args_{n}": tensor.numpy() for n, tensor in enumerate(tensors)})
    return [torch.from_numpy(found[f"output_{number}"]) for number in range(len(found))]


def run(folder: Path, row: Tensor) -> tuple[Tensor, int]:
    """What docs/export.md says how to do."""
    manifest = json.loads((folder / "manifest.json").read_text())
    path, decided = [], {}
    tensors = [row.movedim(1, -1).reshape(manifest["input"]["shape"])]
    if manifest["early"]:
        *tensors, log_prob = outputs(folder, "decide", tensors)
        decided = dict(zip(manifest["routers"], log_prob[0], strict=True))
    tensors = outputs(folder, "root", tensors)
    while path not in manifest["leaves"]:
        here = "-".join(map(str, path)) or "root"
        log_prob = decided[here] if decided else tensors.pop()
        path.append(int(log_prob.argmax()))
        tensors = outputs(folder, "-".join(map(str, path)), tensors)
    return tensors[0], manifest["leaves"].index(path)


@torch.no_grad()
def assert_equal(net: SigmaBranchNet, folder: Path, x: Tensor) -> None:
    expected = net.hard(x)
    found = [run(folder, row) for row in x.split(1)]
    assert [leaf for _, leaf in found] == expected.leaf.tolist()
    logits = torch.cat([logits for logits, _ in found])
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_the_files_say_what_the_network_says(export, net, x):
    assert set(net.hard(x).leaf.tolist()) == {0, 1, 2}
    assert_equal(net, export.folder, x)
    assert [check.leaf for check in export.checks] == ["0", "1-0", "1-1"]
    assert all(check.routed > 0 and check.max_rel < 1e-4 for check in export.checks)


def test_convolutions_read_what_lies_at_channel_last_boundaries(export, net):
    manifest = json.loads((export.folder / "manifest.json").read_text())
    assert manifest["input"]["shape"] == [1, 4, 4, 3]
    for key in ("root", "0", "1", "1-0"):
        model = interpreter.Interpreter(str(export.folder / f"{key}.tflite"))
        channels = 3 if key == "root" else net.router(()).channels
        assert model.get_input_details()[0]["shape"].tolist() == [1, 4, 4, channels]
        assert model._get_ops_details()[0]["op_name"] == "CONV_2D"


@pytest.mark.parametrize("key", ["root", "0", "1", "1-0", "1-1"])
def test_a_node_runs_with_no_other_nodes_file(export, net, tmp_path, key):
    shutil.copy(export.folder / f"{key}.tflite", tmp_path)
    shape = (1, 4, 4, 3) if key == "root" else (1, 4, 4, net.router(()).channels)
    assert all(output.isfinite().all() for output in outputs(tmp_path, key, [torch.ones(shape)]))


def test_early_decisions_and_features_of_several_tensors(early, tmp_path):
    net, x = early
    export_net(net, tmp_path, x, format="litert")
    assert_equal(net, tmp_path, x)


def test_nothing_is_printed_where_a_result_may_be_expected(early, tmp_path, capsys):
    net, x = early
    export_net(net, tmp_path, x, format="litert")
    assert capsys.readouterr().out == ""


def test_an_operation_without_a_kernel_is_named_in_one_line(sampled, tmp_path):
    with pytest.raises(UnsupportedOperation, match="farthest_points") as caught:
        export_net(sampled, tmp_path / "out", torch.randn(2, 9, 3), format="litert")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
