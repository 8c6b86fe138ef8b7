"""Routing and the branched network: probabilities, one path per input, soft against hard."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from sigmabranch.errors import ConfigError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.routing import Router, Routes
from sigmabranch.tree import TreeSpec, node_key

TREES = {
    "one level": TreeSpec.balanced(1, projection_dim=4),
    "the paper's": TreeSpec(projection_dim=4),
    "three levels": TreeSpec.balanced(3, projection_dim=4),
    "uneven": TreeSpec(leaves=((0,), (1, 0), (1, 1, 0), (1, 1, 1)), projection_dim=4),
}
CLASSES, WIDTH = 3, 6


def linear_net(tree: TreeSpec, seed: int = 0) -> SigmaBranchNet:
    """Linear nodes, and gates that halve what :func:`inputs` sends them."""
    torch.manual_seed(seed)
    net = SigmaBranchNet(
        tree=tree,
        trunk=nn.Linear(5, WIDTH),
        specializers={
            node: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for node in tree.specializers
        },
        routers={node: Router(WIDTH, nn.Identity(), tree) for node in tree.inner},
        heads={leaf: nn.Linear(WIDTH, CLASSES) for leaf in tree.leaves},
        plans={},
        source=None,
        record={},
    )
    net.eval()
    for number, node in enumerate(tree.inner):
        with torch.no_grad():
            here = torch.isin(net.hard(inputs()).leaf, torch.tensor(tree.leaves_under(node)))
            log_prob_BK = net.soft(inputs()[here]).branch_log_prob[:, number]
            net.router(node).gate.bias[0] -= (log_prob_BK[:, 0] - log_prob_BK[:, 1]).median() - 1e-3
    return net


def inputs() -> Tensor:
    return torch.randn(64, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=TREES, scope="module")
def net(request) -> SigmaBranchNet:
    return linear_net(TREES[request.param])


@pytest.fixture(scope="module")
def x():
    return inputs()


def calls_of(net: SigmaBranchNet) -> tuple[Counter, list]:
    """How often each node's modules run; and the hooks, to be removed."""
    calls: Counter = Counter()

    def hook(name):
        return lambda *_: calls.update([name])

    named = {"trunk": net.trunk}
    for kind in ("specializers", "routers", "heads"):
        named |= {f"{kind} {key}": module for key, module in getattr(net, kind).items()}
    return calls, [module.register_forward_hook(hook(name)) for name, module in named.items()]


@torch.no_grad()
def test_leaf_probabilities_sum_to_one_and_are_products_along_the_path(net, x):
    soft = net.soft(x)
    leaves, inner = net.tree.leaves, net.tree.inner
    assert soft.logits.shape == (64, len(leaves), CLASSES)
    assert torch.allclose(soft.log_prob.exp().sum(1), torch.ones(64))
    assert torch.allclose(soft.branch_log_prob.exp().sum(2), torch.ones(64, len(inner)))
    for number, leaf in enumerate(leaves):
        product = sum(
            soft.branch_log_prob[:, inner.index(leaf[:level]), leaf[level]]
            for level in range(len(leaf))
        )
        assert torch.allclose(soft.log_prob[:, number], product, atol=1e-6)


@torch.no_grad()
def test_the_soft_pass_runs_every_node_exactly_once(net, x):
    calls, hooks = calls_of(net)
    net.soft(x)
    for hook in hooks:
        hook.remove()
    assert set(calls.values()) == {1}
    assert len(calls) == 1 + len(net.specializers) + len(net.routers) + len(net.heads)


@torch.no_grad()
def test_hard_and_soft_agree_on_the_leaf_both_choose(net, x):
    soft, hard = net.soft(x), net.hard(x)
    assert len(hard.leaf.unique()) == len(net.tree.leaves)
    rows = torch.arange(len(x))
    assert torch.allclose(hard.logits, soft.logits[rows, hard.leaf], atol=1e-6)
    assert torch.allclose(hard.log_prob, soft.log_prob[rows, hard.leaf], atol=1e-6)
    assert torch.equal(hard.leaf, net.routes.hard(soft.branch_log_prob))
    assert torch.equal(net(x), hard.logits)


@torch.no_grad()
def test_one_sample_runs_exactly_one_path(net, x):
    for sample in x[:8].split(1):
        calls, hooks = calls_of(net)
        leaf = net.tree.leaves[int(net.hard(sample).leaf)]
        for hook in hooks:
            hook.remove()
        passed = [leaf[: level + 1] for level in range(len(leaf))]
        expected = {"trunk", f"heads {node_key(leaf)}"}
        expected |= {f"specializers {node_key(node)}" for node in passed}
        expected |= {f"routers {node_key(node[:-1])}" for node in passed}
        assert calls == Counter(expected)


@torch.no_grad()
def test_a_batch_runs_each_node_at_most_once_and_only_where_samples_go(net, x):
    some = x[:3]
    calls, hooks = calls_of(net)
    hard = net.hard(some)
    for hook in hooks:
        hook.remove()
    reached = {node_key(net.tree.leaves[leaf]) for leaf in hard.leaf.tolist()}
    assert {name.split()[1] for name in calls if name.startswith("heads")} == reached
    assert set(calls.values()) == {1}


@torch.no_grad()
def test_grouping_by_branch_does_not_depend_on_the_batch(net, x):
    whole = net.hard(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    shuffled = net.hard(x[order])
    assert torch.equal(shuffled.leaf, whole.leaf[order])
    assert torch.allclose(shuffled.logits, whole.logits[order], atol=1e-6)
    singly = [net.hard(sample) for sample in x.split(1)]
    assert torch.equal(torch.cat([one.leaf for one in singly]), whole.leaf)
    assert torch.allclose(torch.cat([one.logits for one in singly]), whole.logits, atol=1e-6)


@torch.no_grad()
def test_a_path_is_the_hard_pass_of_the_samples_that_take_it(net, x):
    hard, soft = net.hard(x), net.soft(x)
    for number, leaf in enumerate(net.tree.leaves):
        logits, *branches = net.path(leaf)(x)
        assert torch.allclose(logits, soft.logits[:, number], atol=1e-6)
        assert len(branches) == len(leaf)
        for level, log_prob in enumerate(branches):
            inner = net.tree.inner.index(leaf[:level])
            assert torch.allclose(log_prob, soft.branch_log_prob[:, inner], atol=1e-6)
        mine = hard.leaf == number
        assert torch.allclose(logits[mine], hard.logits[mine], atol=1e-6)


@torch.no_grad()
def test_sequential_decisions_are_not_the_likeliest_leaf():
    """p = .6 · .5 on the left, .4 · .9 on the right: the path goes left, the argmax right."""
    branch = torch.tensor([[[0.6, 0.4], [0.51, 0.49], [0.9, 0.1]]]).log()
    assert Routes(TreeSpec()).hard(branch).tolist() == [0]


@torch.no_grad()
def test_routing_stays_in_float32_under_autocast(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        soft, hard = net.soft(x), net.hard(x)
        assert soft.logits.dtype == torch.bfloat16
        feature = net.trunk(x)
    router = net.router(())
    exact = router(feature.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(feature), exact)
        assert router.latent(feature).dtype == torch.float32
    assert soft.log_prob.dtype == soft.branch_log_prob.dtype == hard.log_prob.dtype == torch.float32
    assert torch.allclose(soft.log_prob.exp().sum(1), torch.ones(64), atol=1e-6)


def test_node_parameters_partition_the_network(net):
    per_node = net.node_parameters()
    assert set(per_node) == {"root", *map(node_key, net.tree.specializers)}
    listed = [id(p) for parameters in per_node.values() for p in parameters]
    assert sorted(listed) == sorted(id(p) for p in net.parameters())


@torch.no_grad()
def test_a_node_is_as_likely_as_its_leaves_together(net, x):
    soft = net.soft(x)
    per_node = net.node_log_prob(soft.log_prob)
    assert torch.allclose(per_node["root"], torch.zeros(64), atol=1e-6)
    for node in net.tree.inner:
        children = [per_node[node_key((*node, branch))].exp() for branch in (0, 1)]
        assert torch.allclose(sum(children), per_node[node_key(node)].exp(), atol=1e-6)


def test_gradients_reach_every_parameter_through_the_soft_pass(x):
    net = linear_net(TREES["uneven"]).train()
    soft = net.soft(x)
    (soft.log_prob.exp()[..., None] * soft.logits.square()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_weight_decay_spares_the_gates(net):
    spared = net.no_weight_decay()
    assert spared <= {name for name, _ in net.named_parameters()}
    assert len(spared) == len(net.tree.inner)


def test_only_leaves_have_paths(net):
    with pytest.raises(ConfigError, match="no leaf '9'"):
        net.path((9,))
