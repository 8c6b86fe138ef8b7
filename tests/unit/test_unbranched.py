"""Networks without branches, one path or dense: all that a tree can do but route."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import sigmabranch as sb
from conftest import randomise
from sigmabranch.archive import MANIFEST
from sigmabranch.backbones import ViT, ViTSpec
from sigmabranch.conversion import blueprint, plan_budget
from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.tasks import find_task
from sigmabranch.training import Recipe
from sigmabranch.tree import TreeSpec
from sigmabranch.view import Network

KINDS = ("path", "dense")
SPEC = sb.ConversionSpec(norm_samples=64)


@pytest.fixture(scope="module")
def path(dense, batches) -> sb.SigmaBranchNet:
    return randomise(sb.single_path(dense, batches, spec=SPEC))


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind, dense, path, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    path.save(folder, {"seed": 1}) if kind == "path" else sb.save_dense(dense, folder, {"seed": 1})
    return folder


@pytest.fixture(scope="module")
def model(folder) -> nn.Module:
    return sb.load(folder)


def images(batches) -> torch.Tensor:
    return torch.cat([x for x, _ in batches])


# -- on disk -------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_saved_comes_back_and_says_the_same(kind, model, dense, path, batches):
    original, x = {"path": path, "dense": dense}[kind], images(batches)
    assert type(model) is type(original) and not model.training
    assert list(model.state_dict()) == list(original.state_dict())
    assert torch.equal(model(x), original(x))


def test_a_path_keeps_its_plan_and_record(dense, path, batches, tmp_path):
    path.save(tmp_path)
    again = sb.load(tmp_path)
    assert (again.tree, again.record, again.source) == (path.tree, path.record, path.source)
    assert again.tree == TreeSpec.unbranched()
    channels = again.record["nodes"]["root"]
    assert [len(stage["kept"]) for stage in channels] == again.record["widths"]
    assert json.loads((tmp_path / MANIFEST).read_text())["kind"] == "branched"


@torch.no_grad()
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_record_rebuilds_its_path(dense, batches, share):
    tree = TreeSpec(trunk_share=share)
    made = sb.single_path(dense, batches, tree, spec=SPEC)
    again = sb.rebuild(dense, made.record, batches)
    assert torch.equal(again(images(batches)), made(images(batches)))


@torch.no_grad()
@pytest.mark.parametrize("entry", ["gather", "inner"])
def test_a_path_through_a_residual_stream_comes_back(entry, tmp_path):
    """One that gathers does so in the middle of its only node."""
    shape = {"image_size": 8, "patch": 4, "width": 16, "depth": 4, "heads": 2, "classes": 3}
    vit = randomise(ViT(ViTSpec(in_channels=1, **shape)))
    data = [(torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)]
    data = [(x, torch.zeros(len(x), dtype=torch.int64)) for (x,) in data]
    path = sb.single_path(vit, data, TreeSpec(projection_dim=4, entry=entry), spec=SPEC)
    assert (path.plans[()].gather is not None) == (entry == "gather")
    path.save(tmp_path / "net")
    assert torch.equal(sb.load(tmp_path / "net")(data[0][0]), path(data[0][0]))
    sb.pack(path, tmp_path / "package", data[0][0])
    with sb.Runtime.open(tmp_path / "package") as runtime:
        torch.testing.assert_close(runtime(data[0][0][:1]), path(data[0][0][:1]))


class Own(nn.Module):
    """A network that no adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(6, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.classify = nn.Linear(16, 5)

    def forward(self, x):
        return self.classify(self.last(self.first(self.stem(x))).mean((2, 3)))


@torch.no_grad()
def test_ones_own_dense_network_needs_a_skeleton_as_a_tree_does(batches, tmp_path):
    own, x = randomise(Own()), images(batches)
    sb.save_dense(own, tmp_path / "dense")
    with pytest.raises(CheckpointError, match="pass one of the same shape as skeleton"):
        sb.load(tmp_path / "dense")
    blank = Own()
    before = copy.deepcopy(blank.state_dict())
    assert torch.equal(sb.load(tmp_path / "dense", skeleton=blank)(x), own(x))
    assert all(torch.equal(before[name], value) for name, value in blank.state_dict().items())
    path = sb.single_path(own, batches, TreeSpec.balanced(1, projection_dim=4), spec=SPEC)
    path.save(tmp_path / "path")
    assert torch.equal(sb.load(tmp_path / "path", skeleton=blank)(x), path(x))
    with pytest.raises(CheckpointError, match="does not fit its manifest"):
        sb.load(tmp_path / "dense", skeleton=nn.Linear(3, 4))


# -- running and measuring -----------------------------------------------------------------------


@torch.no_grad()
def test_every_pass_of_a_path_gives_its_one_answer(path, batches):
    x = images(batches)
    soft, hard = path.soft(x), path.hard(x)
    assert torch.equal(soft.logits[:, 0], path(x)) and torch.equal(hard.logits, path(x))
    assert soft.logits.shape[1] == 1 and soft.branch_log_prob.shape == (len(x), 0, 0)
    assert not soft.log_prob.any() and not hard.log_prob.any()
    assert not hard.leaf.any() and not path.leaf_of(soft).any()
    assert torch.equal(path.path(())(x)[0], path(x))
    explained = path.explain(x[:1])[0]
    assert (explained.leaf, explained.decisions, explained.probability) == ("root", (), 1.0)
    assert str(explained).endswith("leaf root (100.0%)")


def test_evaluation_gives_accuracy_and_no_routing_figure(model, batches):
    figures = sb.evaluate(model, batches)
    assert figures.keys() == {"samples", "top1", "top5", "loss"}
    assert figures == sb.evaluate_dense(model, batches)
    with pytest.raises(ConfigError, match="has no leaf by class"):
        sb.evaluate(model, batches, class_leaf=[0] * 5)


def test_a_path_counts_as_one_node(path, dense, batches):
    pytest.importorskip("fvcore")
    counted = sb.count(path, batches[0][0], dense=dense)
    params = sum(p.numel() for p in path.parameters())
    assert counted["net"]["active_params"] == counted["net"]["total_params"] == params
    assert [row["node"] for row in counted["nodes"]] == ["root"] == list(counted["paths"])
    assert counted["nodes"][0]["macs"] == counted["net"]["macs"] < counted["dense"]["macs"]


def test_fine_tuning_a_path_is_training_it(path, batches):
    pytest.importorskip("lightning_fabric")
    settings = {"epochs": 2, "batch_size": 32}
    one, other = copy.deepcopy(path), copy.deepcopy(path)
    sb.finetune(one, batches, sb.FinetuneRecipe(**settings, balance_weight=0.1), device="cpu")
    sb.train(other, batches, Recipe(**settings), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.trunk.conv1.weight, path.trunk.conv1.weight)


# -- on a device ---------------------------------------------------------------------------------


@torch.no_grad()
def test_its_package_streams_and_says_the_same(kind, model, batches, tmp_path):
    x = images(batches)
    package = sb.pack(model, tmp_path, x)
    assert package.leaves == ("root",)
    with sb.Runtime.open(tmp_path, budget=package.path_bytes("root")) as runtime:
        found = runtime.predict(x[:1])
        assert Network(runtime, lambda _: {}).described()["kind"] == kind
    assert found.leaf == "root"
    torch.testing.assert_close(found.logits, model(x[:1])[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="usage names '0-0': the leaves are root"):
        sb.pack(model, tmp_path, x, usage={"0-0": 1.0})


def test_a_path_has_no_other_leaf_than_its_trunk(path):
    with pytest.raises(ConfigError, match="no leaf '0': choose from root"):
        path.path((0,))


@torch.no_grad()
@pytest.mark.parametrize("format", ["pt2", "onnx", "onnx-nodes"])
def test_its_exports_say_the_same(model, batches, tmp_path, one_registry, format):
    if format != "pt2":
        pytest.importorskip("onnxscript")
    from sigmabranch.deploy.export import export_net

    x = images(batches)
    exported = export_net(model, tmp_path, x[:6], format=format)
    (check,) = exported.checks
    assert (check.leaf, check.routed, check.forced) == ("root", 6, 4)
    expected, tight = model(x[:1]), {"rtol": 1e-4, "atol": 1e-4}
    if format == "pt2":
        logits, leaf = torch.export.load(tmp_path / "model.pt2").module()(x[:1])
        assert int(leaf) == 0
        torch.testing.assert_close(logits, expected, **tight)
    elif format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "tree.onnx")
        logits, leaf = session.run(None, {"input": x[:1].numpy()})
        assert leaf == 0
        torch.testing.assert_close(torch.from_numpy(logits), expected, **tight)
    else:
        from sigmabranch.deploy.onnx_path import OnnxPath
        from sigmabranch.deploy.quantize import quantize_nodes

        quantize_nodes(tmp_path, tmp_path / "int8", x)
        with OnnxPath(tmp_path) as nodes, OnnxPath(tmp_path / "int8") as few:
            assert nodes.leaves == few.leaves == ("root",)
            torch.testing.assert_close(nodes.predict(x[0]).logits, expected[0], **tight)
            off = (few.predict(x[0]).logits - expected[0]).norm() / expected[0].norm()
            assert 0 < off < 0.3


# -- what cannot be ------------------------------------------------------------------------------


def test_a_tree_of_one_leaf_is_the_trunk_alone():
    alone = TreeSpec.unbranched()
    assert (alone.leaves, alone.depth, alone.inner, alone.specializers) == (((),), 0, (), ())
    assert (alone.most_branches, alone.children(())) == (0, ())
    assert TreeSpec.from_dict(json.loads(json.dumps(alone.to_dict()))) == alone
    for leaves in ((), ((0,),), ((0, 0),)):
        with pytest.raises(ConfigError):
            TreeSpec(leaves=leaves)


def test_nothing_is_converted_to_a_tree_of_one_leaf(dense, batches):
    alone, x = TreeSpec.unbranched(), batches[0][0][:1]
    calls = (
        lambda: sb.convert(dense, batches, alone),
        lambda: sb.single_path(dense, batches, alone),
        lambda: blueprint(dense, x, alone),
        lambda: plan_budget(dense, x, "40%", alone),
        lambda: replace(find_task("digits-resnet"), tree=alone),
        lambda: find_task("digits-resnet").with_settings(["tree.leaves=[[]]"]),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="the tree has a single leaf: name two or more"):
            call()
