"""Trees by example: the paper's, uneven ones, and what is refused."""

from __future__ import annotations

import pytest

from sigmabranch.errors import ConfigError
from sigmabranch.tree import TreeSpec, node_key

UNEVEN = ((0,), (1, 0), (1, 1, 0), (1, 1, 1))


def test_the_papers_widths_for_resnet50():
    assert TreeSpec().level_widths((1024, 2048)) == (724, 1024)
    assert TreeSpec(round_to=8).level_widths((1024, 2048)) == (728, 1024)


def test_the_default_is_the_balanced_tree_of_two_levels():
    assert TreeSpec() == TreeSpec.balanced(2)
    assert TreeSpec().inner == ((), (0,), (1,))
    assert len(TreeSpec.balanced(3).leaves) == 8


def test_a_short_leaf_runs_the_remaining_levels_by_itself():
    tree = TreeSpec(leaves=UNEVEN)
    assert tree.depth == 3
    assert tree.inner == ((), (1,), (1, 1))
    assert list(tree.levels_of((0,))) == [1, 2, 3]
    assert list(tree.levels_of((1, 0))) == [2, 3]
    assert list(tree.levels_of((1, 1))) == [2]
    assert [tree.parallel(level) for level in (1, 2, 3)] == [2, 3, 4]
    assert tree.level_widths((100, 100, 100)) == (71, 58, 50)


def test_nodes_may_have_more_than_two_children_and_not_all_as_many():
    tree = TreeSpec(leaves=((0,), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)))
    assert tree.children(()) == ((0,), (1,), (2,))
    assert tree.children((1,)) == ((1, 0), (1, 1))
    assert tree.children((2, 2)) == ()
    assert tree.most_branches == 3
    assert tree.inner == ((), (1,), (2,))
    assert [tree.parallel(level) for level in (1, 2)] == [3, 6]
    assert tree.level_widths((90, 60)) == (52, 24)


def test_a_balanced_tree_has_as_many_leaves_as_asked():
    tree = TreeSpec.balanced(2, 3)
    assert tree.leaves[:4] == ((0, 0), (0, 1), (0, 2), (1, 0))
    assert len(tree.leaves) == 9
    assert TreeSpec.balanced(1, branches=1024).most_branches == 1024


@pytest.mark.parametrize(("depth", "branches"), [(2, 1), (2, 0), (10, 3), (1, 1025)])
def test_branches_out_of_reach_are_refused(depth, branches):
    with pytest.raises(ConfigError, match="at least 2 branches and at most 1024 leaves"):
        TreeSpec.balanced(depth, branches)


def test_node_names():
    assert [node_key(node) for node in ((), (0,), (1, 0))] == ["root", "0", "1-0"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"leaves": ((0,),)}, "two leaves"),
        ({"leaves": ((0,), (2,))}, r"root has branches \[0, 2\]: number them 0, 1"),
        ({"leaves": ((-1,), (0,), (1,))}, "without a gap"),
        ({"leaves": ((0,), (1, 0))}, r"node 1 has branches \[0\]: .* at least two"),
        ({"leaves": ((0,), (1, 0), (1, 1), (2, 1), (2, 2))}, "node 2 has branches"),
        ({"leaves": ((0,), (0, 0), (0, 1), (1,))}, "leaf 0 has children"),
        ({"leaves": ((0,), (0,), (1,))}, "distinct"),
        ({"widths": (8,)}, "1 entries for 2 levels"),
        ({"widths": (8, 0)}, "positive"),
        ({"cuts": ("a", "b", "c")}, "3 entries for 2 levels"),
        ({"round_to": 0}, "at least 1"),
        ({"projection_dim": 0}, "at least 1"),
        ({"projection_dropout": 1.0}, r"\[0, 1\)"),
    ],
)
def test_what_is_no_tree_is_refused(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        TreeSpec(**fields)


def test_widths_beyond_the_source_and_a_wrong_number_of_levels_are_refused():
    with pytest.raises(ConfigError, match=r"level 2 is 65 channels wide.*only 64"):
        TreeSpec(widths=(8, 65)).level_widths((32, 64))
    with pytest.raises(ConfigError, match="2 levels, the network gives 3"):
        TreeSpec().level_widths((8, 8, 8))


@pytest.mark.parametrize("depth", [-1, 0, 40])
def test_a_depth_out_of_reach_is_refused(depth):
    with pytest.raises(ConfigError, match="depth must be from 1 to 10"):
        TreeSpec.balanced(depth)


@pytest.mark.parametrize(
    "value",
    [
        {"leafs": []},
        {"leaves": 3},
        {"leaves": [["a"], ["b"]]},
        {"widths": 7},
        {"widths": ["a", "b"]},
        {"round_to": "two"},
        {"widths": [7.5, 8]},
        {"projection_dim": 16.5},
        {"projection_dropout": "much"},
    ],
)
def test_json_that_is_no_tree_is_refused(value):
    with pytest.raises(ConfigError):
        TreeSpec.from_dict(value)
