"""ExecuTorch: one program, a file of weights per node, and each node runs with its own alone."""

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

runtime = pytest.importorskip(
    "executorch.runtime", reason="needs the executorch extra: run make test-exports"
)


@pytest.fixture(scope="module")
def export(net, x, tmp_path_factory) -> Export:
    return export_net(net, tmp_path_factory.mktemp("executorch"), x, format="executorch")


def method(folder: Path, key: str):
    """A node's method, which its program must outlive."""
    manifest = json.loads((folder / "manifest.json").read_text())
    file = manifest["nodes"][key]["file"]
    data = folder / file if file else None
    program = runtime.Runtime.get().load_program(folder / "tree.pte", data_path=data)
    loaded = program.load_method(key)
    return lambda tensors: loaded.execute(tensors) if program else None


def run(folder: Path, row: Tensor) -> tuple[Tensor, int]:
    """What docs/export.md says how to do."""
    manifest = json.loads((folder / "manifest.json").read_text())
    path, tensors, decided = [], [row], {}
    if manifest["early"]:
        *tensors, log_prob = method(folder, "decide")(tensors)
        decided = dict(zip(manifest["routers"], log_prob[0], strict=True))
    tensors = method(folder, "root")(tensors)
    while path not in manifest["leaves"]:
        here = "-".join(map(str, path)) or "root"
        log_prob = decided[here] if decided else tensors.pop()
        path.append(int(log_prob.argmax()))
        tensors = method(folder, "-".join(map(str, path)))(tensors)
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


def test_a_nodes_weights_lie_in_its_own_file_and_the_program_is_small(export, net):
    for key, parameters in net.node_parameters().items():
        held = sum(p.numel() * p.element_size() for p in parameters)
        assert 0.9 * held < export.files[f"{key}.ptd"]["bytes"] < 1.2 * held
    assert export.files["tree.pte"]["bytes"] < 30_000


@pytest.mark.parametrize("key", ["root", "0", "1", "1-0", "1-1"])
def test_a_node_runs_with_no_other_nodes_file(export, net, tmp_path, key):
    for name in ("tree.pte", "manifest.json", f"{key}.ptd"):
        shutil.copy(export.folder / name, tmp_path)
    shape = (1, 3, 4, 4) if key == "root" else (1, net.router(()).channels, 4, 4)
    outputs = method(tmp_path, key)([torch.ones(shape)])
    assert all(output.isfinite().all() for output in outputs)
    other = "0" if key == "root" else "root"
    with pytest.raises((RuntimeError, OSError)):
        method(tmp_path, other)


def test_siblings_with_equal_weights_have_a_file_each(equal_siblings, x, tmp_path):
    export = export_net(equal_siblings, tmp_path, x, format="executorch")
    assert export.files["0.ptd"]["bytes"] == export.files["1.ptd"]["bytes"]
    assert_equal(equal_siblings, tmp_path, x)


def test_early_decisions_and_features_of_several_tensors(early, tmp_path):
    net, x = early
    export_net(net, tmp_path, x, format="executorch")
    assert_equal(net, tmp_path, x)


def test_an_operation_without_a_kernel_is_named_in_one_line(sampled, tmp_path):
    with pytest.raises(UnsupportedOperation, match="farthest_points") as caught:
        export_net(sampled, tmp_path / "out", torch.randn(2, 9, 3), format="executorch")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
