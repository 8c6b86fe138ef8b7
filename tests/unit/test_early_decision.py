"""Early decision: all routers read one feature of the trunk, so a path is known before it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import sigmabranch as sb
from conftest import randomise
from sigmabranch.backbones import PointNet2Spec, WideResNetSpec
from sigmabranch.backbones.timm import create_timm, load_timm
from sigmabranch.conversion import blueprint, rebuild
from sigmabranch.errors import CheckpointError, ConfigError, MissingDependency
from sigmabranch.measure import cost, evaluate
from sigmabranch.peers import find_system
from sigmabranch.peers.rerouted import FlatNet
from sigmabranch.tasks import Chain, Task, count_task
from sigmabranch.tree import node_key

TREE = sb.TreeSpec(projection_dim=8, decide_after="layer1")
UNEVEN = replace(TREE, leaves=((0,), (1, 0), (1, 1)))
PLAIN = sb.ConversionSpec(norm_samples=0, restarts=2, centred=True)


@pytest.fixture(scope="module")
def net(dense, batches) -> sb.SigmaBranchNet:
    return sb.convert(dense, batches, TREE, spec=replace(PLAIN, norm_samples=64))


@pytest.fixture(scope="module")
def x(batches):
    return batches[0][0]


def cloud_network() -> tuple[nn.Module, torch.Tensor]:
    spec = PointNet2Spec(
        centroids=(16, 8),
        radii=(0.5, 1.0),
        neighbours=(6, 4),
        widths=((8, 12), (12, 16), (16, 24, 32)),
        connected=(24, 12),
        classes=5,
    )
    return randomise(spec.build()), 0.5 * torch.randn(24, 32, 3)


def wide_network() -> tuple[nn.Module, torch.Tensor]:
    spec = WideResNetSpec(
        depth=16, widths=(8, 12, 16), strides=(1, 2, 2), stem_width=4, in_channels=1, classes=5
    )
    return randomise(spec.build()), torch.randn(24, 1, 8, 8)


def timm_network() -> tuple[nn.Module, torch.Tensor]:
    try:
        load_timm()
    except MissingDependency:
        pytest.skip("timm is not installed")
    return randomise(create_timm("test_resnet", num_classes=5)), torch.randn(12, 3, 32, 32)


# -- decisions -----------------------------------------------------------------------------------


@torch.no_grad()
def test_one_decision_at_the_trunks_end_is_the_sequential_one(dense, batches, x):
    tree = sb.TreeSpec.balanced(1, projection_dim=8)
    sequential = sb.convert(dense, batches, tree, spec=PLAIN)
    early = sb.convert(dense, batches, replace(tree, decide_after="layer3"), spec=PLAIN)
    assert not sequential.early and early.early
    mine, theirs = early.state_dict(), sequential.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for run in ("soft", "hard"):
        pairs = zip(getattr(early, run)(x), getattr(sequential, run)(x), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@torch.no_grad()
def test_routes_are_decided_by_the_early_feature_alone(dense, batches, x):
    """Nothing that runs after the decision can change it, and NaN would show in any read."""
    net = sb.convert(dense, batches, UNEVEN, spec=PLAIN)
    expected = net.hard(x)
    assert len(expected.leaf.unique()) == 3
    for module in (net.trunk_parts()[1], net.specializers):
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
    hard, soft = net.hard(x), net.soft(x)
    assert torch.equal(hard.leaf, expected.leaf)
    assert torch.equal(hard.log_prob, expected.log_prob)
    assert torch.equal(net.leaf_of(soft), expected.leaf)


@torch.no_grad()
def test_the_parts_of_the_trunk_and_the_routers_give_the_path(net, x):
    until, rest = net.trunk_parts()
    seen, hard = until(x), net.hard(x)
    assert torch.equal(rest(seen), net.trunk(x))
    for row in range(len(x)):
        node: tuple[int, ...] = ()
        while node not in net.tree.leaves:
            node = (*node, int(net.router(node)(seen[row : row + 1]).argmax()))
        assert net.tree.leaves[hard.leaf[row]] == node


@torch.no_grad()
def test_one_input_or_a_batch_soft_or_hard_reach_the_same_leaf_and_logits(net, x):
    soft, hard = net.soft(x), net.hard(x)
    singly = [net.hard(row[None]) for row in x]
    assert torch.equal(torch.cat([one.leaf for one in singly]), hard.leaf)
    assert torch.equal(net.leaf_of(soft), hard.leaf)
    assert len(hard.leaf.unique()) > 2
    logits = torch.cat([one.logits for one in singly])
    torch.testing.assert_close(logits, hard.logits, rtol=1e-4, atol=1e-5)
    rows = torch.arange(len(x))
    torch.testing.assert_close(soft.logits[rows, hard.leaf], hard.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(soft.log_prob[rows, hard.leaf], hard.log_prob)
    torch.testing.assert_close(soft.log_prob.exp().sum(1), torch.ones(len(x)))


def test_one_input_runs_the_routers_of_its_path_before_the_trunk_goes_on(net, x):
    called: list[str] = []
    names = {net.trunk[-1]: "trunk"}
    names |= {net.router(node): f"router {node_key(node)}" for node in net.tree.inner}
    hooks = [
        module.register_forward_hook(lambda m, *_: called.append(names[m])) for module in names
    ]
    with torch.no_grad():
        leaf = net.tree.leaves[int(net.hard(x[:1]).leaf)]
    for hook in hooks:
        hook.remove()
    assert called == ["router root", f"router {leaf[0]}", "trunk"]


def test_a_rest_of_the_trunk_that_works_in_place_spoils_no_decision(dense, batches, x):
    """The activation after ``bn1`` overwrites what the routers have read."""
    tree = replace(TREE, decide_after="bn1")
    net = sb.convert(dense, batches, tree, spec=PLAIN)
    assert isinstance(net.trunk_parts()[1][0], nn.ReLU)
    with torch.no_grad():
        assert torch.equal(net.leaf_of(net.soft(x)), net.hard(x).leaf)
        for number, leaf in enumerate(tree.leaves):
            _, *branches = net.path(leaf)(x)
            assert torch.equal(branches[0], net.soft(x).branch_log_prob[:, 0]), number
        leaves = torch.cat([net.hard(inputs).leaf for inputs, _ in batches])
    sizes = net.record["splits"]
    assert leaves.bincount(minlength=4).tolist() == [*sizes["0"]["sizes"], *sizes["1"]["sizes"]]
    net.soft(x).branch_log_prob.sum().backward()  # nor a gradient
    assert all(p.grad is not None for p in net.routers.parameters())


# -- conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["random", "pca"])
def test_every_level_is_clustered_on_the_early_feature(dense, batches, projection):
    spec = replace(PLAIN, projection=projection)
    net = sb.convert(dense, batches, TREE, spec=spec)
    with torch.no_grad():
        until = net.trunk_parts()[0]
        leaf = torch.cat([net.hard(x).leaf for x, _ in batches])
        seen = torch.cat([until(x) for x, _ in batches])
    for node in TREE.inner:
        router = net.router(node)
        assert router.channels == 16
        under = torch.isin(leaf, torch.tensor(TREE.leaves_under(node)))
        right = torch.isin(leaf[under], torch.tensor(TREE.leaves_under((*node, 1))))
        sizes = net.record["splits"][node_key(node)]["sizes"]
        assert [int((~right).sum()), int(right.sum())] == sizes
        if projection == "pca":
            with torch.no_grad():
                axis_D = router.linear(router.projection[0](seen[under])).var(0)
            assert torch.equal(axis_D, axis_D.sort(descending=True).values)


def test_class_clusters_route_by_the_early_feature(dense, batches):
    net = sb.convert(dense, batches, TREE, spec=replace(PLAIN, clusters="classes"))
    assert sb.conversion.class_targets(net.record).sum() == 5
    assert evaluate(net, batches)["samples"] == 96


NETWORKS = [
    (wide_network, ("layer1", "conv1")),
    (cloud_network, ("sa2", "sa1")),
    (timm_network, ("layer1",)),
]


@pytest.mark.parametrize(("make", "places"), NETWORKS)
def test_every_family_decides_early_and_keeps_the_dense_logits(make, places, tmp_path):
    torch.manual_seed(0)
    dense, x = make()
    loader = [(x, torch.arange(len(x)) % 5)]
    widths = tuple(dense_widths(dense, x))
    for place in places:
        tree = sb.TreeSpec(projection_dim=8, decide_after=place, widths=widths)
        net = sb.convert(dense, loader, tree, spec=PLAIN)
        with torch.no_grad():
            logits, expected = net.soft(x).logits, dense(x)[:, None]
            assert torch.equal(net.leaf_of(net.soft(x)), net.hard(x).leaf)
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    net.save(tmp_path)
    again = sb.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.hard(x).leaf, net.hard(x).leaf)


def dense_widths(dense: nn.Module, x: torch.Tensor) -> list[int]:
    """Channels behind the last two stages."""
    backbone = sb.backbones.as_backbone(dense)
    widths, feature = {}, x[:1]
    with torch.no_grad():
        for path in backbone.chain:
            feature = dense.get_submodule(path)(feature)
            if path in backbone.stages:
                widths[path] = backbone.pool(feature).shape[1]
    return list(widths.values())[-2:]


def test_an_early_network_comes_back_from_disk_and_from_its_record(
    net, dense, batches, x, tmp_path
):
    net.save(tmp_path)
    again = sb.load(tmp_path)
    record = json.loads(json.dumps(net.record))
    assert (again.tree, again.record) == (TREE, net.record)
    for copy in (again, rebuild(dense, record, batches)):
        assert copy.early
        for name, tensor in net.state_dict().items():
            assert torch.allclose(copy.state_dict()[name].float(), tensor.float()), name
        with torch.no_grad():
            assert torch.equal(copy.hard(x).leaf, net.hard(x).leaf)


def test_networks_records_and_tasks_from_before_are_sequential(net, task):
    old = {key: value for key, value in TREE.to_dict().items() if key != "decide_after"}
    assert sb.TreeSpec.from_dict(old) == replace(TREE, decide_after=None)
    settings = task.to_dict()
    del settings["tree"]["decide_after"]
    assert Task.from_dict(settings) == task


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["layer4", "fc", "layer1.0", ""])
def test_a_place_outside_the_trunk_is_refused_with_the_choices(dense, batches, x, place):
    tree = replace(TREE, decide_after=place)
    for make in (
        lambda: sb.convert(dense, batches, tree),
        lambda: blueprint(dense, x[:1], tree),
    ):
        with pytest.raises(ConfigError, match=r"is no module of the trunk.*layer1, layer2$"):
            make()


def test_a_feature_without_channels_is_refused():
    torch.manual_seed(0)
    dense, x = cloud_network()
    tree = sb.TreeSpec(decide_after="points", widths=(20, 12))
    with pytest.raises(ConfigError, match="'points' leaves routers no channel to read"):
        blueprint(dense, x, tree)


def test_a_manifest_that_decides_outside_the_trunk_is_refused(net, tmp_path):
    net.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["tree"]["decide_after"] = "layer4"
    del manifest["sha256"], manifest["written_by"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is no module of the trunk"):
        sb.load(tmp_path)


# -- counting, peers, fine-tuning ----------------------------------------------------------------


@pytest.mark.skipif(find_spec("fvcore") is None, reason="fvcore is not installed")
def test_nodes_add_up_to_the_paths_and_to_the_whole(net, dense, x):
    counted = cost(net, x, dense=dense)
    rows = {row["node"]: row for row in counted["nodes"]}
    assert sum(row["params"] for row in rows.values()) == counted["net"]["total_params"]
    assert counted["net"]["total_params"] == sum(p.numel() for p in net.parameters())
    assert rows["root"]["macs"] > cost(net.trunk, x)["dense"]["macs"]
    for leaf, path in counted["paths"].items():
        passed = [rows["root"], rows[leaf[0]], rows[leaf]]
        assert sum(row["params"] for row in passed) == path["active_params"]
        assert sum(row["macs"] for row in passed) == path["macs"]
    assert rows["root"]["width"] is None  # of the trunk's end no router tells
    assert [rows[key]["width"] for key in ("0", "0-1")] == net.record["widths"]


def test_a_flat_router_reads_the_early_feature_too(net, x):
    flat = FlatNet(net).eval()
    with torch.no_grad():
        latent_BD = flat.router(()).latent(flat.trunk_parts()[0](x))
        flat.router(()).gate.weight.copy_(latent_BD[:4] - latent_BD.mean(0))
        flat.router(()).gate.bias.zero_()
        soft, hard = flat.soft(x), flat.hard(x)
    assert torch.equal(flat.leaf_of(soft), hard.leaf)
    assert len(hard.leaf.unique()) > 1
    rows = torch.arange(len(x))
    torch.testing.assert_close(soft.logits[rows, hard.leaf], hard.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(soft.log_prob[rows, hard.leaf], hard.log_prob)


def test_rows_name_the_place_whatever_the_network_calls_it(task):
    rows = [find_system(name).task(task) for name in ("early-trunk", "early-inside")]
    assert [row.tree.decide_after for row in rows] == ["layer1", "maxpool"]
    with pytest.raises(ConfigError, match="trunk_left is 5, but the trunk has 5 modules"):
        find_system("sigma-branch", {"trunk_left": 5}).check(task)
    with pytest.raises(ConfigError, match="at least 0"):
        find_system("sigma-branch", {"trunk_left": -1})


def test_a_task_is_converted_fine_tuned_and_measured(task, tmp_path):
    pytest.importorskip("sklearn")
    early = task.with_settings(["tree.decide_after=bn1"])
    chain = Chain(early, tmp_path)
    before, net = chain.converted().state_dict(), chain.branched()
    assert net.early
    after = net.state_dict()
    assert not torch.equal(before["routers.0.gate.weight"], after["routers.0.gate.weight"])
    figures = chain.measured()
    assert figures["cost"] == json.loads(json.dumps(count_task(early)))
    assert sum(figures["branched"]["usage"]) == pytest.approx(1)
