"""Over random trees, binary and not: what a tree says about itself is consistent."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sigmabranch.errors import ConfigError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.routing import Router, Routes, stacked
from sigmabranch.training import FinetuneRecipe, branched_loss
from sigmabranch.tree import TreeSpec, node_key


@st.composite
def trees(draw, max_leaves: int = 9) -> TreeSpec:
    """A tree grown by splitting leaves in two to four, wherever the draw falls."""
    most = draw(st.integers(2, 4))
    leaves = [()]
    while not leaves[1:] or (len(leaves) + most <= max_leaves + 1 and draw(st.booleans())):
        leaf = leaves.pop(draw(st.integers(0, len(leaves) - 1)))
        leaves += [(*leaf, branch) for branch in range(draw(st.integers(2, most)))]
    return TreeSpec(leaves=tuple(sorted(leaves)))


def linear_net(tree: TreeSpec, seed: int) -> SigmaBranchNet:
    torch.manual_seed(seed)
    tree = TreeSpec(leaves=tree.leaves, projection_dim=3)
    return SigmaBranchNet(
        tree=tree,
        trunk=nn.Identity(),
        specializers={node: nn.Linear(4, 4) for node in tree.specializers},
        routers={
            node: Router(4, nn.Identity(), tree, len(tree.children(node))) for node in tree.inner
        },
        heads={leaf: nn.Linear(4, 2) for leaf in tree.leaves},
        plans={},
        source=None,
        record={},
    ).eval()


@given(trees())
def test_every_inner_node_has_at_least_two_children_and_every_leaf_none(tree):
    nodes = {(), *tree.specializers}
    for node in nodes:
        children = tree.children(node)
        assert {*children} == {other for other in nodes if other and other[:-1] == node}
        assert children == tuple(sorted(children))
        assert len(children) >= 2 if node in tree.inner else not children
        assert len(children) <= tree.most_branches
    assert nodes == {*tree.inner, *tree.leaves}
    assert sum(len(tree.children(node)) for node in tree.inner) == len(nodes) - 1


@given(trees())
def test_nodes_come_level_by_level_and_keys_are_unique(tree):
    order = [(), *tree.specializers]
    assert all(order.index(node[:-1]) < order.index(node) for node in tree.specializers)
    assert len({node_key(node) for node in order}) == len(order)
    for nodes in (tree.inner, tree.specializers):
        assert [len(node) for node in nodes] == sorted(len(node) for node in nodes)


@given(trees())
def test_the_leaves_under_a_node_are_those_under_its_children(tree):
    assert tree.leaves_under(()) == tuple(range(len(tree.leaves)))
    for node in tree.inner:
        below = [number for child in tree.children(node) for number in tree.leaves_under(child)]
        assert tuple(below) == tree.leaves_under(node)
    for number, leaf in enumerate(tree.leaves):
        assert tree.leaves_under(leaf) == (number,)


@given(trees())
def test_every_path_runs_every_level_exactly_once(tree):
    for leaf in tree.leaves:
        passed = [leaf[: level + 1] for level in range(len(leaf))]
        levels = [level for node in passed for level in tree.levels_of(node)]
        assert levels == list(range(1, tree.depth + 1))


@given(trees())
def test_side_by_side_specializers_are_counted_with_the_short_leaves(tree):
    for level in range(1, tree.depth + 1):
        running = [node for node in tree.specializers if level in tree.levels_of(node)]
        assert tree.parallel(level) == len(running)


@given(trees(), st.data())
def test_rule_widths_divide_by_the_root_of_the_specializers_and_never_exceed_the_source(tree, data):
    source = data.draw(st.lists(st.integers(1, 4096), min_size=tree.depth, max_size=tree.depth))
    for level, (width, limit) in enumerate(
        zip(tree.level_widths(source), source, strict=True), start=1
    ):
        assert 1 <= width <= limit
        assert width == max(1, round(limit / math.sqrt(tree.parallel(level))))


@given(trees(), st.integers(2, 64), st.integers(1, 4096))
def test_rounded_widths_are_the_nearest_multiple_or_the_whole_source(tree, multiple, limit):
    rounded = TreeSpec(leaves=tree.leaves, round_to=multiple)
    for level, width in enumerate(rounded.level_widths([limit] * tree.depth), start=1):
        exact = limit / math.sqrt(tree.parallel(level))
        assert width <= limit
        if width < limit:
            assert width % multiple == 0
            assert abs(width - exact) <= multiple / 2 or width == multiple


@given(trees(), st.integers(1, 300), st.floats(0, 0.99), st.booleans())
def test_a_tree_survives_json(tree, dim, dropout, given_widths):
    tree = TreeSpec(
        leaves=tree.leaves,
        widths=tuple(range(1, tree.depth + 1)) if given_widths else None,
        cuts=tuple("abcdefghijk"[: tree.depth]) if given_widths else None,
        projection_dim=dim,
        projection_dropout=dropout,
    )
    assert TreeSpec.from_dict(json.loads(json.dumps(tree.to_dict()))) == tree


@settings(max_examples=50)
@given(trees(), st.data())
def test_a_tree_without_one_of_its_leaves_is_refused_or_has_a_branch_less(tree, data):
    gone = data.draw(st.integers(0, len(tree.leaves) - 1))
    siblings = tree.children(tree.leaves[gone][:-1])
    # Only a third or later branch may go, and only the last one.
    assume(len(siblings) == 2 or siblings[-1] != tree.leaves[gone])
    leaves = tuple(leaf for number, leaf in enumerate(tree.leaves) if number != gone)
    with pytest.raises(ConfigError):
        TreeSpec(leaves=leaves)


@settings(max_examples=50)
@given(trees(), st.randoms(use_true_random=False))
def test_leaves_out_of_order_are_refused(tree, random):
    shuffled = list(tree.leaves)
    random.shuffle(shuffled)
    assume(tuple(shuffled) != tree.leaves)
    with pytest.raises(ConfigError, match="left-to-right"):
        TreeSpec(leaves=tuple(shuffled))


@given(trees(), st.integers(0, 2**16))
def test_index_tables_walk_the_tree_as_a_person_would(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    branches = [
        torch.randn(8, len(tree.children(node)), generator=generator).log_softmax(-1)
        for node in tree.inner
    ]
    branch_BIK = stacked(branches)
    assert branch_BIK.shape == (8, len(tree.inner), tree.most_branches)
    assert torch.allclose(branch_BIK.exp().sum(-1), torch.ones(8, len(tree.inner)))
    found = Routes(tree).hard(branch_BIK)
    for sample in range(8):
        node = ()
        while node not in tree.leaves:
            said = branches[tree.inner.index(node)][sample].tolist()
            node = (*node, said.index(max(said)))
        assert tree.leaves[found[sample]] == node


@given(trees())
def test_a_draw_goes_to_the_first_branch_of_every_node(tree):
    even = [torch.zeros(2, len(tree.children(node))).log_softmax(-1) for node in tree.inner]
    assert Routes(tree).hard(stacked(even)).tolist() == [0, 0]


@settings(max_examples=25)
@given(trees(max_leaves=6), st.integers(0, 2**16))
def test_leaf_probabilities_of_any_tree_sum_to_one(tree, seed):
    net = linear_net(tree, seed)
    x = torch.randn(6, 4)
    with torch.no_grad():
        soft, hard = net.soft(x), net.hard(x)
    assert torch.allclose(soft.log_prob.exp().sum(1), torch.ones(6))
    chosen = soft.logits[torch.arange(6), hard.leaf]
    assert torch.allclose(hard.logits, chosen, atol=1e-6)
    assert torch.equal(net.leaf_of(soft), hard.leaf)


@settings(max_examples=25)
@given(trees(max_leaves=6), st.integers(0, 2**16))
def test_the_soft_answer_of_sure_routers_is_the_hard_one(tree, seed):
    net = linear_net(tree, seed)
    x = torch.randn(6, 4)
    with torch.no_grad():
        for node in tree.inner:
            net.router(node).gate.weight *= 1e4
            net.router(node).gate.bias *= 1e4
        soft, hard = net.soft(x), net.hard(x)
    mixed = (soft.log_prob.exp()[..., None] * soft.logits).sum(1)
    sure = soft.log_prob.exp().amax(1) > 1 - 1e-6
    assert torch.allclose(mixed[sure], hard.logits[sure], atol=1e-4)


@settings(max_examples=25)
@given(trees(max_leaves=6), st.integers(0, 2**16), st.sampled_from([0.0, 1.0]))
def test_gradients_are_finite_however_uneven_the_tree(tree, seed, weight):
    net = linear_net(tree, seed).train()
    soft = net.soft(torch.randn(6, 4))
    recipe = FinetuneRecipe(balance_weight=weight, resp_prior=True)
    branched_loss(soft, torch.zeros(6, dtype=torch.int64), recipe).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
