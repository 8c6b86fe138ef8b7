"""What the network says of a path is what the hard pass did."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import sigmabranch as sb
from sigmabranch.errors import DataError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.peers.rerouted import FlatNet
from sigmabranch.routing import Router
from sigmabranch.tree import NodeId, TreeSpec, node_key

CLASSES, WIDTH, SAMPLES = 7, 6, 48


def random_leaves(seed: int, most_branches: int) -> tuple[NodeId, ...]:
    """Leaves of a tree grown by splitting leaves anywhere, into any number of branches."""
    draw = random.Random(seed)
    leaves: list[NodeId] = [()]
    for _ in range(draw.randint(2, 6)):
        leaf = leaves.pop(draw.randrange(len(leaves)))
        leaves += [(*leaf, branch) for branch in range(draw.randint(2, most_branches))]
    return tuple(sorted(leaves))


def random_net(leaves: tuple[NodeId, ...], seed: int = 0, **fields) -> SigmaBranchNet:
    tree = TreeSpec(leaves=leaves, projection_dim=5, **fields)
    torch.manual_seed(seed)
    net = SigmaBranchNet(
        tree=tree,
        trunk=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)),
        specializers={
            node: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for node in tree.specializers
        },
        routers={node: Router(WIDTH, nn.Identity(), tree) for node in tree.inner},
        heads={leaf: nn.Linear(WIDTH, CLASSES) for leaf in tree.leaves},
        plans={},
        source=None,
        record={},
    )
    for node in tree.inner:
        children = sum(child[:-1] == node for child in tree.specializers)
        net.router(node).gate = nn.Linear(tree.projection_dim, children)
        net.router(node).gate.weight.data *= 3
    return net.eval()


def inputs() -> Tensor:
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("most_branches", [2, 4])
@pytest.mark.parametrize("early", [None, "0"])
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_an_explanation_is_the_hard_pass_bit_for_bit(seed, early, most_branches):
    net = random_net(random_leaves(seed, most_branches), seed, decide_after=early)
    x = inputs()
    hard, soft = net.hard(x), net.soft(x)
    explained = net.explain(x)
    assert [one.leaf for one in explained] == [
        node_key(net.tree.leaves[leaf]) for leaf in hard.leaf.tolist()
    ]
    assert [one.log_prob for one in explained] == hard.log_prob.tolist()
    best = hard.logits.softmax(1).topk(5)
    assert [one.top for one in explained] == [
        tuple(zip(labels, values, strict=True))
        for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    for row, one in enumerate(explained):
        leaf = net.tree.leaves[hard.leaf[row]]
        nodes = [leaf[:level] for level in range(len(leaf))]
        assert [decision.node for decision in one.decisions] == [*map(node_key, nodes)]
        assert [decision.branch for decision in one.decisions] == list(leaf)
        for node, decision in zip(nodes, one.decisions, strict=True):
            children = sum(child[:-1] == node for child in net.tree.specializers)
            said = soft.branch_log_prob[row, net.tree.inner.index(node), :children].exp()
            assert decision.probabilities == pytest.approx(said.tolist(), abs=1e-6)
            assert decision.probabilities[decision.branch] == max(decision.probabilities)
        product = 1.0
        for decision in one.decisions:
            product *= decision.probabilities[decision.branch]
        assert one.probability == pytest.approx(product, rel=1e-5)


def test_the_trees_under_test_are_uneven_and_their_leaves_are_reached():
    trees = [random_leaves(seed, most) for seed in range(4) for most in (2, 4)]
    assert any(len({*map(len, leaves)}) > 1 for leaves in trees)
    assert any(branch > 1 for leaves in trees for leaf in leaves for branch in leaf)
    for leaves in trees:
        assert len({one.leaf for one in random_net(leaves).explain(inputs())}) > 1


def test_an_input_is_explained_alike_alone_and_in_any_batch():
    net, x = random_net(random_leaves(1, 2)), inputs()
    together, backwards = net.explain(x), net.explain(x.flip(0))[::-1]
    alone = [net.explain(sample)[0] for sample in x.split(1)]
    for others in (backwards, alone):
        for one, other in zip(together, others, strict=True):
            assert one.leaf == other.leaf
            assert one.log_prob == pytest.approx(other.log_prob, abs=1e-5)
            assert [label for label, _ in one.top[:1]] == [label for label, _ in other.top[:1]]


def test_explaining_leaves_nothing_behind():
    net, x = random_net(random_leaves(0, 2)).train(), inputs()
    net.explain(x)
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    with pytest.raises(DataError, match="batch is empty"):
        net.explain(x[:0])
    assert not any(module._forward_hooks for module in net.modules())


def test_a_converted_network_explains_images(dense, batches):
    net = sb.convert(dense, batches, TreeSpec(projection_dim=8))
    x = batches[0][0]
    hard, explained = net.hard(x), net.explain(x)
    assert [one.log_prob for one in explained] == hard.log_prob.tolist()
    assert {len(one.top) for one in explained} == {5}
    assert isinstance(explained[0], sb.Explanation)
    for one in explained:
        assert [p for _, p in one.top] == sorted((p for _, p in one.top), reverse=True)
        assert sum(p for _, p in one.top) == pytest.approx(1, abs=1e-5)  # there are five classes


def test_fewer_classes_than_five_are_all_listed():
    tree = TreeSpec(leaves=((0,), (1,)), projection_dim=5)
    net = random_net(tree.leaves)
    for leaf in tree.leaves:
        net.heads[node_key(leaf)] = nn.Linear(WIDTH, 3)
    assert {len(one.top) for one in net.explain(inputs())} == {3}


def test_one_router_above_all_leaves_is_one_decision():
    flat = FlatNet(random_net(((0, 0), (0, 1), (1,)))).eval()
    x = inputs()
    for one, leaf in zip(flat.explain(x), flat.hard(x).leaf.tolist(), strict=True):
        (decision,) = one.decisions
        assert (decision.node, decision.branch) == ("root", leaf)
        assert len(decision.probabilities) == 3
        assert one.probability == pytest.approx(decision.probabilities[leaf])


def test_a_person_reads_the_path_in_two_lines_and_a_program_in_json():
    one = net_of_known_answers().explain(torch.zeros(1, WIDTH))[0]
    classes, path = str(one).splitlines()
    assert classes.startswith("class 2 (")
    assert path == "leaf 1-0 (60.0%): root → 1 of 25.0% | 75.0%; 1 → 0 of 80.0% | 20.0%"
    written = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert written["leaf"] == "1-0"
    assert written["probability"] == pytest.approx(0.6)
    assert written["decisions"][1] == {
        "node": "1",
        "probabilities": pytest.approx([0.8, 0.2]),
        "branch": 0,
    }
    assert written["top"][0]["class"] == 2
    values = [entry["probability"] for entry in written["top"]]
    assert all(one > other for one, other in pairwise(values))
    assert re.findall(r"(\d) \(", classes) == [str(entry["class"]) for entry in written["top"]]


def net_of_known_answers() -> SigmaBranchNet:
    """Routers that say 25 to 75 and 80 to 20 whatever they see, and heads that prefer class 2."""
    net = random_net(((0,), (1, 0), (1, 1)))
    with torch.no_grad():
        for node, shares in (((), [0.25, 0.75]), ((1,), [0.8, 0.2])):
            net.router(node).gate.weight.zero_()
            net.router(node).gate.bias.copy_(torch.tensor(shares).log())
        for head in net.heads.values():
            head.weight.zero_()
            head.bias.copy_(torch.tensor([0.0, 1.0, 4.0, 2.0, -1.0, 3.0, -2.0]))
    return net
