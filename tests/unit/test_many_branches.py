"""Nodes with more than two children, from conversion to every way of running them."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

import sigmabranch as sb
from sigmabranch.backbones import as_backbone
from sigmabranch.conversion import Shards, blueprint, rebuild
from sigmabranch.conversion.growth import Growth
from sigmabranch.deploy.export import export_net
from sigmabranch.deploy.export.program import HardPath, traced
from sigmabranch.deploy.gpu_path import siblings_in_order
from sigmabranch.deploy.program import Program
from sigmabranch.errors import ConfigError
from sigmabranch.measure import cost
from sigmabranch.peers import find_system
from sigmabranch.peers.rerouted import FlatNet, HashRouter
from sigmabranch.routing import Router
from sigmabranch.tasks import find_task
from sigmabranch.tree import TreeSpec, node_key

# Three branches at the root: a leaf, a node with two children, a node with three.
LEAVES = ((0,), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2))
UNEVEN = TreeSpec(leaves=LEAVES, projection_dim=8)
EARLY = replace(UNEVEN, decide_after="layer1")
SPEC = sb.ConversionSpec(centred=True, norm_samples=64, restarts=4)
SMALL = TreeSpec(leaves=((0,), (1,), (2, 0), (2, 1)), projection_dim=4)
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the deploy extra",
)


@torch.no_grad()
def spread(net: sb.SigmaBranchNet, x: Tensor) -> None:
    """Set the gates so that no branch is likelier than another on average."""
    for number, node in enumerate(net.tree.inner):
        here = torch.isin(net.hard(x).leaf, torch.tensor(net.tree.leaves_under(node)))
        said_BK = net.soft(x[here]).branch_log_prob[:, number]
        net.router(node).gate.bias -= said_BK[:, : len(net.tree.children(node))].mean(0)


@pytest.fixture(scope="module")
def x(batches) -> Tensor:
    return torch.cat([x for x, _ in batches])


@pytest.fixture(scope="module", params=[UNEVEN, EARLY], ids=["sequential", "early"])
def net(request, dense, batches, x) -> sb.SigmaBranchNet:
    """Converted, trained for an epoch, and its gates set so that every leaf has inputs."""
    net = sb.convert(dense, batches, request.param, spec=SPEC)
    recipe = sb.FinetuneRecipe(epochs=1, lr=0.01, balance_weight=1.0, node_grad_scale=True)
    sb.finetune(net, batches, recipe, device="cpu")
    spread(net, x)
    return net


@torch.no_grad()
def test_every_leaf_has_inputs_and_the_soft_pass_knows_the_hard_ones(net, x):
    soft, hard = net.soft(x), net.hard(x)
    assert len(hard.leaf.unique()) == 6
    assert torch.equal(net.leaf_of(soft), hard.leaf)
    assert torch.allclose(soft.log_prob.exp().sum(1), torch.ones(len(x)))
    assert torch.allclose(soft.branch_log_prob.exp().sum(2), torch.ones(len(x), 3), atol=1e-6)
    chosen = soft.logits[torch.arange(len(x)), hard.leaf]
    torch.testing.assert_close(hard.logits, chosen, rtol=1e-4, atol=1e-5)


def test_the_record_holds_a_row_and_a_choice_of_channels_for_each_branch(net):
    record = sb.ConversionRecord.from_dict(json.loads(json.dumps(net.record)))
    assert [len(record.splits[node].gate_bias) for node in net.tree.inner] == [3, 2, 3]
    for node in net.tree.inner:
        split, children = record.splits[node], net.tree.children(node)
        assert len(split.sizes) == len(split.gate_weight) == len(children)
        assert all(len(mean) == len(children) for mean in split.channel_mean.values())
        assert -1 <= split.centroid_cosine <= 1
        shared = {tuple(record.nodes[child][0].shared) for child in children}
        assert len(shared) == 1
        assert all(channels.max_error < 1e-4 for c in children for channels in record.nodes[c])
    assert sum(record.splits[()].sizes) == record.samples


def test_a_network_is_built_again_from_its_record(dense, batches, x):
    net = sb.convert(dense, batches, UNEVEN, spec=SPEC)
    again = rebuild(dense, net.record, batches)
    with torch.no_grad():
        assert torch.equal(net(x), again(x))


def test_it_is_evaluated_saved_and_loaded(net, batches, x, tmp_path):
    figures = sb.evaluate(net, batches)
    assert len(figures["usage"]) == len(figures["leaves"]) == 6
    assert 0 < figures["balance"] <= 1
    net.save(tmp_path)
    loaded = sb.load(tmp_path)
    assert loaded.tree == net.tree
    with torch.no_grad():  # training left its weights channels-last, which rounds otherwise
        torch.testing.assert_close(loaded(x), net(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_package_of_it_says_the_same(net, x, tmp_path):
    package = sb.pack(net, tmp_path, x[:1])
    assert package.leaves == tuple(map(node_key, LEAVES))
    with sb.Runtime.open(tmp_path) as runtime:
        for row in x[:24].split(1):
            expected, found = net.hard(row), runtime.predict(row)
            assert found.leaf == node_key(LEAVES[int(expected.leaf)])
            torch.testing.assert_close(found.logits, expected.logits[0], rtol=1e-3, atol=1e-4)


def linear(decide_after: str | None = None) -> tuple[sb.SigmaBranchNet, Tensor]:
    """Linear nodes, which are quick to export, and inputs for every leaf."""
    torch.manual_seed(0)
    tree = replace(SMALL, decide_after=decide_after)
    net = sb.SigmaBranchNet(
        tree=tree,
        trunk=nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16)),
        specializers={
            node: nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for node in tree.specializers
        },
        routers={
            node: Router(16, nn.Identity(), tree, len(tree.children(node))) for node in tree.inner
        },
        heads={leaf: nn.Linear(16, 4) for leaf in tree.leaves},
        plans={},
        source=None,
        record={},
    ).eval()
    x = torch.randn(32, 6)
    spread(net, x)
    return net, x


@needs_onnx
@pytest.mark.usefixtures("one_registry")
@pytest.mark.parametrize(
    ("name", "decide_after"), [("pt2", None), ("onnx-nodes", None), ("onnx-nodes", "0")]
)
def test_every_export_says_the_same_at_every_leaf(tmp_path, name, decide_after):
    """The export refuses by itself whatever differs, on inputs routed and forced to each leaf."""
    net, x = linear(decide_after)
    export = export_net(net, tmp_path, x, format=name)
    assert [check.leaf for check in export.checks] == [*map(node_key, SMALL.leaves)]
    assert min(check.routed for check in export.checks) > 0
    assert min(check.forced for check in export.checks) > 0


@needs_onnx
@pytest.mark.usefixtures("one_registry")
@torch.no_grad()
def test_one_graph_says_the_same_and_names_the_bytes_of_each_node(tmp_path):
    import onnx
    import onnxruntime

    net, x = linear()
    export_net(net, tmp_path, x, format="onnx")
    model = onnx.load(tmp_path / "tree.onnx", load_external_data=False)
    ranges = json.loads({p.key: p.value for p in model.metadata_props}["sigmabranch.ranges"])
    assert list(ranges) == ["root", "0", "1", "2", "2-0", "2-1"]
    session = onnxruntime.InferenceSession(
        tmp_path / "tree.onnx", providers=["CPUExecutionProvider"]
    )
    for row in x.split(1):
        logits, leaf = session.run(None, {"input": row.numpy()})
        expected = net.hard(row)
        assert int(leaf[0]) == int(expected.leaf)
        torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("bias", "leaf"), [((0, 0, 0), (0,)), ((0, 1, 1), (1,))])
def test_a_draw_goes_to_the_lowest_branch_in_an_exported_program_too(bias, leaf):
    net, x = linear()
    for node in net.tree.inner:
        net.router(node).gate.weight.zero_()
    net.router(()).gate.bias.copy_(torch.tensor(bias))
    exported = traced(HardPath(net), (x[:1],)).module()
    assert SMALL.leaves[int(net.hard(x[:1]).leaf)] == leaf
    assert SMALL.leaves[int(exported(x[:1])[1])] == leaf


def test_it_is_counted_without_data(dense, batches):
    net = blueprint(dense, batches[0][0][:1], UNEVEN)
    counted = cost(net, batches[0][0][:1])
    assert {*counted["paths"]} == {*map(node_key, LEAVES)}
    assert len(counted["nodes"]) == 9
    assert net.router(()).gate.out_features == 3
    assert net.router((1,)).gate.out_features == 2


@pytest.mark.parametrize("setting", [{"balanced": True}, {"clusters": "classes"}])
def test_halving_the_samples_of_three_branches_is_refused(dense, batches, setting):
    with pytest.raises(ConfigError, match="a node of the tree has 3 branches") as caught:
        sb.convert(dense, batches, UNEVEN, spec=sb.ConversionSpec(**setting))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", ["random", "uniform"])
def test_every_choice_of_channels_serves_all_branches(dense, batches, x, channels):
    spec = replace(SPEC, channels=channels, norm_samples=0)
    net = sb.convert(dense, batches, UNEVEN, spec=spec)
    with torch.no_grad():
        assert net(x).isfinite().all()


def seeds(dense, batches, tree: TreeSpec) -> dict:
    arguments = (tree, sb.ConversionSpec(), None, Shards(), None)
    growth = Growth(as_backbone(dense), batches, *arguments)
    return {node: growth._seed(node) for node in ((), *tree.specializers)}


def test_no_two_nodes_share_a_seed_and_binary_paths_keep_theirs(dense, batches):
    found = seeds(dense, batches, TreeSpec.balanced(3, 4))
    assert len({*found.values()}) == len(found)
    binary = seeds(dense, batches, TreeSpec.balanced(3))
    assert binary[()] == 1
    assert binary[(1, 0, 1)] == 0b1101
    assert all(found[node] == seed for node, seed in binary.items())


# -- what else walks the tree --------------------------------------------------------------------


@torch.no_grad()
def test_a_flat_router_reaches_the_leaf_it_finds_likeliest(dense, batches, x):
    flat = FlatNet(sb.convert(dense, batches, UNEVEN, spec=SPEC)).eval()
    soft, hard = flat.soft(x), flat.hard(x)
    assert torch.equal(hard.leaf, soft.log_prob.argmax(1))
    assert torch.allclose(soft.branch_log_prob.exp().sum(2), torch.ones(len(x), 3), atol=1e-5)
    chosen = soft.logits[torch.arange(len(x)), hard.leaf]
    torch.testing.assert_close(hard.logits, chosen, rtol=1e-4, atol=1e-5)


def test_a_hash_deals_inputs_out_to_all_branches():
    router = HashRouter(6, torch.nn.Identity(), seed=0, branches=3)
    log_prob = router(torch.randn(300, 6, generator=torch.Generator().manual_seed(0)))
    assert log_prob.shape == (300, 3)
    assert min(log_prob.argmax(1).bincount().tolist()) > 60


def test_decisionet_asks_for_a_binary_tree():
    task = replace(find_task("digits-resnet"), tree=TreeSpec.balanced(1, 3))
    with pytest.raises(ConfigError, match="use a binary tree"):
        find_system("decisionet-tree").check(task)


def test_a_gpu_path_takes_a_tree_of_equals_and_refuses_any_other(dense, batches, tmp_path):
    example = batches[0][0][:1]
    even = sb.pack(blueprint(dense, example, TreeSpec.balanced(2, 3)), tmp_path / "even", example)
    levels = siblings_in_order(even, Program(even))
    assert {len(siblings) for siblings in levels} == {1, 3, 9}
    uneven = sb.pack(blueprint(dense, example, UNEVEN), tmp_path / "uneven", example)
    with pytest.raises(ConfigError, match="use the Runtime"):
        siblings_in_order(uneven, Program(uneven))
