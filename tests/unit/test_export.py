"""Exported networks: every format says what the network says, and reads one path of the weights."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sigmabranch as sb
from pairs import Paired, Value
from sigmabranch import files
from sigmabranch.backbones import GlobalAveragePool
from sigmabranch.deploy.export import Export, export_net, formats
from sigmabranch.deploy.export.check import check_leaves
from sigmabranch.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DataError,
    MissingDependency,
    UnsupportedOperation,
)
from sigmabranch.net import SigmaBranchNet
from sigmabranch.points import farthest_points, take_points
from sigmabranch.routing import Router
from sigmabranch.tree import TreeSpec

pytestmark = [
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
        reason="needs the deploy extra",
    ),
    pytest.mark.usefixtures("one_registry"),
]

# The others have environments of their own, and their tests tests/exports.
FORMATS = ("pt2", "onnx", "onnx-nodes")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
UNEVEN = TreeSpec(leaves=((0,), (1, 0), (1, 1)), projection_dim=4)
# A node's convolution has a megabyte, so that pages and small tensors do not matter.
WIDTH, CLASSES = 512, 5

RESIDENT = """
import json, sys
import numpy as np
import onnxruntime

def resident():
    total, ours = 0, False
    for line in open("/proc/self/smaps"):
        head = line.split()[0]
        if not head.endswith(":"):
            ours = line.rstrip().endswith("tree.onnx.data")
        elif ours and head == "Rss:":
            total += 1024 * int(line.split()[1])
    return total

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
created = resident()
_, leaf = session.run(None, {"input": np.load(sys.argv[2])})
ranges = json.loads(session.get_modelmeta().custom_metadata_map["sigmabranch.ranges"])
sizes = {key: size for key, (_, size) in ranges.items()}
print(json.dumps([created, resident(), int(leaf[0]), sizes]))
"""


COMMANDS = """
import json, sys
from sigmabranch.cli import main
for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        print(end.code)
"""


def block(inputs: int, width: int) -> nn.Module:
    conv = nn.Conv2d(inputs, width, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def branched(tree: TreeSpec, trunk: nn.Module, width: int, part=block, pool=GlobalAveragePool):
    """One part a node, between a trunk of that width and linear heads."""
    heads = {leaf: nn.Sequential(pool(), nn.Linear(width, CLASSES)) for leaf in tree.leaves}
    return SigmaBranchNet(
        tree=tree,
        trunk=trunk,
        specializers={node: part(width, width) for node in tree.specializers},
        routers={node: Router(width, pool(), tree) for node in tree.inner},
        heads=heads,
        plans={},
        source=None,
        record={},
    ).eval()


@torch.no_grad()
def halve(net: SigmaBranchNet, x: Tensor) -> SigmaBranchNet:
    """Set the gates so that each node sends half of what it gets either way."""
    for number, node in enumerate(net.tree.inner):
        here = torch.isin(net.hard(x).leaf, torch.tensor(net.tree.leaves_under(node)))
        log_prob_BK = net.soft(x[here]).branch_log_prob[:, number]
        net.router(node).gate.bias[0] -= log_prob_BK.diff().neg().median() - 1e-3
    return net


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net(x) -> SigmaBranchNet:
    """Four megabytes, three leaves at two depths, norms whose folding changes the weights."""
    torch.manual_seed(0)
    net = branched(UNEVEN, nn.Sequential(block(3, WIDTH)), WIDTH)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return halve(net, x)


@pytest.fixture(scope="module")
def exports(net, x, tmp_path_factory) -> dict[str, Export]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: export_net(net, folder / name, x, format=name) for name in FORMATS}


def session(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def run_pt2(folder: Path, x: Tensor) -> list[tuple[Tensor, int]]:
    module = torch.export.load(folder / "model.pt2").module()
    return [(logits, int(leaf)) for logits, leaf in map(module, x.split(1))]


def run_onnx(folder: Path, x: Tensor) -> list[tuple[Tensor, int]]:
    tree = session(folder / "tree.onnx")
    outputs = [tree.run(["logits", "leaf"], {"input": row.numpy()}) for row in x.split(1)]
    return [(torch.from_numpy(logits), int(leaf[0])) for logits, leaf in outputs]


def run_onnx_nodes(folder: Path, x: Tensor) -> list[tuple[Tensor, int]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    nodes = manifest["nodes"]
    graphs = {key: session(folder / node["file"]) for key, node in nodes.items()}

    def outputs(key: str, tensors: list) -> dict:
        given = dict(zip(nodes[key]["inputs"], tensors, strict=True))
        return dict(zip(nodes[key]["outputs"], graphs[key].run(None, given), strict=True))

    def one(row: Tensor) -> tuple[Tensor, int]:
        path, tensors, decided = [], [row.numpy()], {}
        if manifest["early"]:
            found = outputs("decide", tensors)
            decided = dict(zip(manifest["routers"], found.pop("log_prob")[0], strict=True))
            tensors = list(found.values())
        found = outputs("root", tensors)
        while "logits" not in found:
            here = "-".join(map(str, path)) or "root"
            log_prob = decided[here] if decided else found.pop("log_prob")
            path.append(int(log_prob.argmax()))
            found = outputs("-".join(map(str, path)), list(found.values()))
        return torch.from_numpy(found["logits"]), manifest["leaves"].index(path)

    return [one(row) for row in x.split(1)]


RUN = {"pt2": run_pt2, "onnx": run_onnx, "onnx-nodes": run_onnx_nodes}


@torch.no_grad()
def assert_equal(net: SigmaBranchNet, found: list[tuple[Tensor, int]], x: Tensor) -> None:
    expected = net.hard(x)
    assert [leaf for _, leaf in found] == expected.leaf.tolist()
    logits = torch.cat([logits for logits, _ in found])
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)


# -- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_what_the_network_says(exports, net, x, name):
    assert set(net.hard(x).leaf.tolist()) == {0, 1, 2}
    assert_equal(net, RUN[name](exports[name].folder, x), x)


@pytest.mark.parametrize("name", FORMATS)
def test_every_leaf_was_compared_before_the_files_got_their_names(exports, name):
    export = exports[name]
    assert [check.leaf for check in export.checks] == ["0", "1-0", "1-1"]
    for check in export.checks:
        assert check.routed > 0
        assert check.forced > 0
        assert check.max_rel < 1e-4
    assert {path.name for path in export.folder.iterdir()} == set(export.files)
    assert json.loads(json.dumps(export.to_dict()))["format"] == name


@pytest.mark.parametrize("name", FORMATS)
def test_the_listed_bytes_and_hashes_are_those_of_the_files(exports, name):
    for file, entry in exports[name].files.items():
        path = exports[name].folder / file
        assert entry == {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def test_the_manifest_of_the_nodes_lists_every_other_file_truly(exports):
    export = exports["onnx-nodes"]
    manifest = json.loads((export.folder / "manifest.json").read_text())
    listed = {name: entry for name, entry in export.files.items() if name != "manifest.json"}
    assert manifest["files"] == listed
    assert manifest["leaves"] == [[0], [1, 0], [1, 1]]
    assert manifest["classes"] == CLASSES
    assert manifest["input"] == {"shape": [1, 3, 4, 4], "dtype": "float32"}
    assert set(manifest["nodes"]) == {"root", "0", "1", "1-0", "1-1"}
    assert manifest["nodes"]["1"]["outputs"] == ["feature", "log_prob"]
    assert manifest["nodes"]["0"]["outputs"] == ["logits"]


@pytest.mark.parametrize("key", ["root", "0", "1", "1-0", "1-1"])
def test_a_nodes_file_loads_without_the_others(exports, tmp_path, key):
    for name in (f"{key}.onnx", f"{key}.onnx.data"):
        shutil.copy(exports["onnx-nodes"].folder / name, tmp_path)
    alone = session(tmp_path / f"{key}.onnx")
    shape = alone.get_inputs()[0].shape
    outputs = alone.run(None, {"input": torch.ones(shape).numpy()})
    assert all(torch.from_numpy(output).isfinite().all() for output in outputs)


def graphs_of(graph) -> list:
    nested = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [graph, *(inner for part in nested for inner in graphs_of(part))]


def test_the_graphs_pass_the_checker_and_hold_no_trace_of_where_they_were_made(exports):
    import onnx

    paths = [*exports["onnx"].folder.glob("*.onnx"), *exports["onnx-nodes"].folder.glob("*.onnx")]
    assert len(paths) == 6
    for path in paths:
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert not model.functions
        for graph in graphs_of(model.graph):
            for part in (graph, *graph.node, *graph.initializer, *graph.value_info):
                assert not part.metadata_props
                assert not part.doc_string
        assert path.stat().st_size < 20_000
        assert b"site-packages" not in path.read_bytes()
    assert b"site-packages" not in (exports["pt2"].folder / "model.pt2").read_bytes()


def test_a_nodes_weights_are_one_run_of_the_file_in_the_trees_order(exports):
    import onnx

    folder = exports["onnx"].folder
    model = onnx.load(folder / "tree.onnx", load_external_data=False)
    ranges = json.loads({p.key: p.value for p in model.metadata_props}["sigmabranch.ranges"])
    assert list(ranges) == ["root", "0", "1", "1-0", "1-1"]
    for (offset, size), (after, _) in itertools.pairwise(ranges.values()):
        assert offset % 4096 == 0
        assert offset + size <= after
    assert sum(ranges["1-1"]) == (folder / "tree.onnx.data").stat().st_size
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.name.startswith("specializers."):
            key = tensor.name.split(".")[1]
            offset, size = ranges[key]
            assert offset <= int(place["offset"])
            assert int(place["offset"]) + int(place["length"]) <= offset + size


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_the_runtime_reads_the_weights_of_one_path(exports, x, tmp_path):
    import numpy as np

    np.save(tmp_path / "x.npy", x[:1].numpy())
    path = exports["onnx"].folder / "tree.onnx"
    command = [sys.executable, "-c", RESIDENT, path, tmp_path / "x.npy"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    created, resident, leaf, bytes_of = json.loads(done.stdout)
    specializers = [["0"], ["1", "1-0"], ["1", "1-1"]][leaf]
    on_path = sum(bytes_of[key] for key in ("root", *specializers))
    assert created < 0.1 * on_path
    assert 0.9 * on_path < resident < 1.1 * on_path < sum(bytes_of.values())


# -- features and routers of other kinds ---------------------------------------------------------


@pytest.fixture(scope="module")
def early() -> tuple[SigmaBranchNet, Tensor]:
    """A network whose router reads a pair of tensors in the middle of the trunk; and inputs."""
    torch.manual_seed(0)
    tree = TreeSpec.balanced(1, projection_dim=4, decide_after="0")
    trunk = nn.Sequential(Paired(5, 8), Paired(8, 8))
    net, x = branched(tree, trunk, 8, part=Paired, pool=Value), torch.randn(8, 5)
    return halve(net, x), x


def test_early_decisions_and_features_of_several_tensors_become_one_program(early, tmp_path):
    net, x = early
    export_net(net, tmp_path, x, format="pt2")
    assert_equal(net, run_pt2(tmp_path, x), x)


def test_early_decisions_get_a_file_and_features_as_many_names_as_tensors(early, tmp_path):
    net, x = early
    export_net(net, tmp_path, x, format="onnx-nodes")
    assert_equal(net, run_onnx_nodes(tmp_path, x), x)
    nodes = json.loads((tmp_path / "manifest.json").read_text())["nodes"]
    assert nodes["decide"]["outputs"] == ["feature_0", "feature_1", "log_prob"]
    assert nodes["root"]["outputs"] == ["feature_0", "feature_1"]
    assert nodes["0"]["inputs"] == ["input_0", "input_1"]


class Sampled(nn.Module):
    def forward(self, cloud: Tensor) -> Tensor:
        return take_points(cloud, farthest_points(cloud, 4)).flatten(1)


def test_an_operation_that_onnx_lacks_is_named_in_one_line(tmp_path):
    tree = TreeSpec.balanced(1, projection_dim=4)
    net = branched(tree, Sampled(), 12, part=nn.Linear, pool=nn.Identity)
    with pytest.raises(UnsupportedOperation, match="farthest_points: export as pt2") as caught:
        export_net(net, tmp_path / "out", torch.randn(2, 9, 3), format="onnx-nodes")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# -- what is refused -----------------------------------------------------------------------------


def eager(net: SigmaBranchNet):
    """The network as if it were what was written."""

    def written(leaf):
        def run(sample):
            if leaf is None:
                hard = net.hard(sample)
                return hard.logits, int(hard.leaf)
            return net.path(leaf)(sample)[0], net.tree.leaves.index(leaf)

        return run

    return written


def changed(net: SigmaBranchNet, what: str) -> SigmaBranchNet:
    """A copy with one thing wrong."""
    wrong = copy.deepcopy(net)
    with torch.no_grad():
        if what == "a weight":
            wrong.head((1, 1))[1].weight[0] *= 1.01
        elif what == "not a number":
            wrong.head((0,))[1].bias[0] = float("nan")
        else:
            wrong.router((1,)).gate.weight.neg_()
    return wrong


@torch.no_grad()
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a weight", "differs from the network at leaf 1-1 by"),
        ("not a number", "differs from the network at leaf 0 by nan"),
        ("a router", "arrives at leaf 1-. where the network arrives at 1-."),
    ],
)
def test_a_wrong_export_leaves_nothing_behind(net, x, tmp_path, monkeypatch, what, message):
    def write(_, folder: Path, sample: Tensor):
        (folder / "model").write_bytes(b"wrong")
        return eager(changed(net, what))

    monkeypatch.setattr(formats, "_writer", lambda _: write)
    with pytest.raises(ConversionError, match=message):
        export_net(net, tmp_path / "out", x, format="pt2")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_network_itself_passes_its_check(net, x):
    assert [check.max_abs for check in check_leaves(net, eager(net), x)] == [0, 0, 0]


def test_a_draw_that_rounding_tips_is_no_difference(net, x):
    tied = changed(net, "a weight")
    with torch.no_grad():
        tied.router(()).gate.weight.zero_()
        tied.router(()).gate.bias.zero_()
        tipped = changed(tied, "a weight")
        tipped.head((1, 1))[1].weight.copy_(tied.head((1, 1))[1].weight)
        tipped.router(()).gate.bias[1] = 1e-6
        assert tipped.hard(x).leaf.tolist() != tied.hard(x).leaf.tolist()
        checks = check_leaves(tied, eager(tipped), x)
    assert [check.routed for check in checks] == [0, 0, 0]


def test_an_unknown_format_an_empty_example_and_a_file_for_a_folder_are_refused(net, x, tmp_path):
    with pytest.raises(ConfigError, match="unknown format 'pb': choose from pt2, onnx"):
        export_net(net, tmp_path / "out", x, format="pb")
    with pytest.raises(DataError, match="at least one example"):
        export_net(net, tmp_path / "out", x[:0], format="pt2")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*file"):
        export_net(net, tmp_path / "file", x, format="pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("onnx", "onnxruntime", "deploy"),
        ("onnx-nodes", "onnxruntime", "deploy"),
        ("executorch", "executorch", "executorch"),
        ("litert", "litert_torch", "litert"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    net, x, tmp_path, monkeypatch, name, package, extra
):
    for module in ("onnx_graph", "onnx_tree", "onnx_nodes", "executorch_tree", "litert_nodes"):
        monkeypatch.delitem(sys.modules, f"sigmabranch.deploy.export.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingDependency, match=rf"{package}.*: pip install 'sigma-branch\[{extra}\]"
    ):
        export_net(net, tmp_path / "out", x, format=name)
    assert not (tmp_path / "out").exists()


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(task, tmp_path_factory) -> Path:
    """Folders of a dense network of the digits' task and of what is made from it."""
    from sigmabranch.saving import save_dense

    folder = tmp_path_factory.mktemp("saved")
    task = task.with_settings(["tree.depth=1"])
    notes = {"task": task.to_dict(), "seed": 0}
    torch.manual_seed(0)
    dense = task.model.build()
    save_dense(dense, folder / "dense", notes)
    batches = [(torch.randn(40, 1, 8, 8), torch.arange(40) % 10)]
    sb.convert(dense, batches, task.tree).save(folder / "branched", notes)
    return folder


def test_the_command_exports_beside_the_network_and_prints_one_object(saved, capsys):
    pytest.importorskip("sklearn")
    from sigmabranch.cli.export import command

    command(net=saved / "branched", format="onnx-nodes", as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["folder"] == str(saved / "branched-onnx-nodes")
    assert [check["leaf"] for check in printed["checks"]] == ["0", "1"]
    assert {path.name for path in (saved / "branched-onnx-nodes").iterdir()} == {*printed["files"]}


def test_the_command_refuses_in_one_line_with_code_2(saved):
    pytest.importorskip("sklearn")
    commands = [
        ["export", str(saved / "branched"), "--format", "pb"],
        ["export", str(saved / "dense"), "--format", "pb"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["2", "2"]
    for line in done.stderr.splitlines():
        assert line.startswith(
            "sigmabranch: unknown format 'pb': choose from pt2, onnx, onnx-nodes"
        )
    assert {path.name for path in saved.iterdir()} <= {"dense", "branched", "branched-onnx-nodes"}
