"""A tree proposed by the data: shape, places, and what becomes of the proposal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import sigmabranch as sb
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.tree import TreeSpec, node_key

# Three groups; the second has two halves, which only the second layer shows.
GROUPS, HALVES, NOISE = slice(0, 3), 3, slice(4, 12)
WIDTH = 12
TREE = TreeSpec(projection_dim=16)


class Scale(nn.Linear):
    """Hands its inputs on, one of them times ``factor``."""

    def __init__(self, factor: float) -> None:
        super().__init__(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.weight.copy_(torch.eye(WIDTH))
            self.weight[HALVES, HALVES] = factor


def network(parts: int = 3) -> sb.Backbone:
    """Layers a, b, c, … of which the first hides the halves and the second shows them."""
    names = tuple("abcde"[:parts])
    layers = {
        name: Scale(factor) for name, factor in zip(names, (0.01, 400, 1, 1, 1), strict=False)
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    model.add_module("head", nn.Linear(WIDTH, 5))
    return sb.Backbone(model=model.eval(), chain=names, stages=names, head=("head",))


def batches(groups: int = 3, count: int = 1200) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(count) % groups
    x = torch.zeros(count, WIDTH)
    x[torch.arange(count), group] = 4.0
    side = torch.arange(count) // groups % 2 * 2.0 - 1
    x[:, HALVES] = torch.where(group == 1, side, 0.0)
    x[:, NOISE] = 0.5 * torch.randn(count, 8, generator=generator)
    return list(zip(x.split(100), group.split(100), strict=True))


@pytest.fixture(scope="module")
def proposal() -> sb.Proposal:
    return sb.propose_tree(network(), batches(), TREE)


def test_the_tree_has_the_shape_of_the_data(proposal):
    tree = proposal.tree
    inner = [node for node in tree.inner if node]
    assert len(tree.children(())) == 3
    assert len(inner) == 1
    assert len(tree.children(inner[0])) == 2
    assert tree.cuts == ("b", "c")
    assert tree.projection_dim == 16
    assert proposal.samples == 1200


def test_every_node_has_its_scores_and_its_reason(proposal):
    assert {*proposal.scores} == {"root", *map(node_key, proposal.tree.specializers)}
    root = proposal.scores["root"]
    assert (root.samples, root.chosen) == (1200, 3)
    assert sum(proposal.scores[str(branch)].samples for branch in range(3)) == 1200
    for leaf in proposal.tree.leaves:
        reason = proposal.scores[node_key(leaf)].reason
        assert reason.startswith("leaf" if len(leaf) == 2 else "stop")
    assert list(proposal.cuts) == ["b", "c"]
    assert all(len(scores.votes) == 2 for scores in proposal.cuts.values())


def test_it_depends_on_the_seed_alone_and_survives_json(proposal):
    again = sb.propose_tree(network(), batches(), TREE)
    assert again == proposal
    read = sb.Proposal.from_dict(json.loads(json.dumps(proposal.to_dict())))
    assert read == proposal
    for damaged in ({}, {**proposal.to_dict(), "more": 1}, {**proposal.to_dict(), "scores": 3}):
        with pytest.raises(ConfigError):
            sb.Proposal.from_dict(damaged)


def test_its_text_is_a_table_of_places_and_nodes(proposal):
    lines = str(proposal).splitlines()
    assert len(lines) == 1 + 2 + len(proposal.scores)
    assert lines[1].startswith("before b") and lines[1].endswith("cut here")
    assert lines[3].startswith("root") and lines[3].endswith(proposal.scores["root"].reason)


def test_conversion_takes_the_proposal_and_its_record_keeps_it(proposal, tmp_path):
    data = batches()
    spec = sb.ConversionSpec(restarts=2, norm_samples=0)
    net = sb.convert(network(), data, proposal, spec=spec)
    assert net.tree == proposal.tree
    assert sb.Proposal.from_dict(net.record["proposal"]) == proposal
    net.save(tmp_path)
    loaded = sb.load(tmp_path, skeleton=network())
    assert sb.ConversionRecord.from_dict(loaded.record).proposal == proposal.to_dict()
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
    plain = sb.convert(network(), data, proposal.tree, spec=spec)
    assert "proposal" not in plain.record


def test_a_root_that_would_not_split_gets_two_leaves_and_says_so():
    found = sb.propose_tree(network(), batches(groups=1), TREE, max_depth=1)
    assert found.tree.leaves == ((0,), (1,))
    root = found.scores["root"]
    assert root.chosen == 2
    assert root.reason.startswith("split in 2, as a tree needs two leaves, although: stop")


def test_places_that_are_given_stay_and_are_not_judged():
    given = replace(TREE, cuts=("b", "d"), widths=(6, 5), projection_dropout=0.2)
    found = sb.propose_tree(network(4), batches(), given)
    assert found.tree.cuts == ("b", "d")
    assert found.tree.widths == (6, 5)
    assert found.tree.projection_dropout == 0.2
    assert found.cuts == {}
    shallow = sb.propose_tree(network(4), batches(), given, max_depth=1)
    assert (shallow.tree.depth, shallow.tree.cuts, shallow.tree.widths) == (1, ("b",), None)


def test_an_early_decision_is_judged_where_it_is_made():
    early = replace(TREE, decide_after="a")
    found = sb.propose_tree(network(4), batches(), early)
    assert found.tree.cuts is None
    assert found.tree.decide_after == "a"
    # What is hidden there is hidden from all routers.
    assert found.tree.leaves == ((0,), (1,), (2,))
    with pytest.raises(ConfigError, match=r"decide_after='z' is no module of the trunk"):
        sb.propose_tree(network(4), batches(), replace(TREE, decide_after="z"))


def test_levels_begin_where_the_data_fall_apart_best():
    """Two sides that differ little until the last layer but one shows them."""
    data = [(torch.cat([x[:, :3] * 0 + 1, x[:, 3:]], 1), y) for x, y in batches()]
    for x, y in data:
        x[:, HALVES] = (y % 2) * 2.0 - 1
    found = sb.propose_tree(network(4), data, TREE, max_depth=1)
    assert found.tree.cuts != ("b",)
    assert found.cuts["c"].silhouette[1] > found.cuts["b"].silhouette[1]


def test_limits_and_networks_that_allow_no_tree_are_refused():
    with pytest.raises(ConfigError, match="max_depth must be at least 1"):
        sb.propose_tree(network(), batches(), TREE, max_depth=0)
    with pytest.raises(ConfigError, match="a split needs at least 2 parts"):
        sb.propose_tree(network(), batches(), TREE, max_branches=1)
    with pytest.raises(ConfigError, match="1 stages, and a tree needs two"):
        sb.propose_tree(network(1), batches(), TREE)
    with pytest.raises(ConfigError, match="cannot cut at 'z'"):
        sb.propose_tree(network(), batches(), replace(TREE, cuts=("b", "z")))
    with pytest.raises(DataError, match="empty"):
        sb.propose_tree(network(), [], TREE)


def test_inputs_alone_will_do_and_no_more_are_read_than_asked(proposal):
    told = []
    found = sb.propose_tree(
        network(),
        [x for x, _ in batches()],
        TREE,
        samples=700,
        progress=lambda *news: told.append(news),
    )
    assert found.samples == 700
    assert told[-1] == ("features for the tree's shape", 700, 700)
    assert found.scores["root"].chosen == 3


def test_a_known_network_needs_no_description_and_is_not_changed(dense):
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(64, 1, 8, 8, generator=generator), torch.zeros(64)) for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    found = sb.propose_tree(dense, data, TREE, min_samples=64)
    assert set(found.cuts) == {"layer2", "layer3", "layer4"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
