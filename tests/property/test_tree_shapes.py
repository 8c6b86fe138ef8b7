"""Over random binary trees: what a tree says about itself is consistent."""

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
from sigmabranch.routing import Router, Routes
from sigmabranch.tree import TreeSpec, node_key


@st.composite
def trees(draw, max_leaves: int = 9) -> TreeSpec:
    """A tree grown by splitting leaves, one after the other, wherever the draw falls."""
    leaves = [(0,), (1,)]
    for _ in range(draw(st.integers(0, max_leaves - 2))):
        leaf = leaves.pop(draw(st.integers(0, len(leaves) - 1)))
        leaves += [(*leaf, 0), (*leaf, 1)]
    return TreeSpec(leaves=tuple(sorted(leaves)))


@given(trees())
def test_every_inner_node_has_both_children_and_every_leaf_none(tree):
    nodes = {(), *tree.specializers}
    for node in nodes:
        children = {(*node, 0), (*node, 1)} & nodes
        assert len(children) == (2 if node in tree.inner else 0)
    assert nodes == {*tree.inner, *tree.leaves}
    assert len(tree.inner) == len(tree.leaves) - 1


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
        left, right = (tree.leaves_under((*node, branch)) for branch in (0, 1))
        assert left + right == tree.leaves_under(node)
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
def test_a_tree_without_one_of_its_leaves_is_refused(tree, data):
    gone = data.draw(st.integers(0, len(tree.leaves) - 1))
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
    branch_BIK = torch.randn(8, len(tree.inner), 2, generator=generator).log_softmax(-1)
    found = Routes(tree).hard(branch_BIK)
    for sample, branch_IK in enumerate(branch_BIK.tolist()):
        node = ()
        while node not in tree.leaves:
            left, right = branch_IK[tree.inner.index(node)]
            node = (*node, int(right > left))
        assert tree.leaves[found[sample]] == node


@settings(max_examples=25)
@given(trees(max_leaves=6), st.integers(0, 2**16))
def test_leaf_probabilities_of_any_tree_sum_to_one(tree, seed):
    torch.manual_seed(seed)
    tree = TreeSpec(leaves=tree.leaves, projection_dim=3)
    net = SigmaBranchNet(
        tree=tree,
        trunk=nn.Identity(),
        specializers={node: nn.Linear(4, 4) for node in tree.specializers},
        routers={node: Router(4, nn.Identity(), tree) for node in tree.inner},
        heads={leaf: nn.Linear(4, 2) for leaf in tree.leaves},
        plans={},
        source=None,
        record={},
    ).eval()
    x = torch.randn(6, 4)
    with torch.no_grad():
        soft, hard = net.soft(x), net.hard(x)
    assert torch.allclose(soft.log_prob.exp().sum(1), torch.ones(6))
    chosen = soft.logits[torch.arange(6), hard.leaf]
    assert torch.allclose(hard.logits, chosen, atol=1e-6)
