"""DecisioNet: its tree of classes, its gates, its loss, and what one path of it costs."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import randomise
from sigmabranch.backbones import ResNetSpec, WideResNetSpec
from sigmabranch.errors import ConfigError, DataError, MissingDependency
from sigmabranch.measure import Dynamic, cost
from sigmabranch.measure.cost import count_parameters
from sigmabranch.peers import decision_net, decisionet
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.decision_net import Gated, gate
from sigmabranch.peers.decisionet import DecisioNet, DecisionObjective
from sigmabranch.peers.label_tree import EITHER, LEFT, OFF_ITS_WAY, RIGHT, class_codes, confusions
from sigmabranch.tasks import Chain, Stopped, find_task
from sigmabranch.tasks.counting import example
from sigmabranch.training import FinetuneRecipe, Recipe
from sigmabranch.training.optim import NodeScale
from sigmabranch.tree import TreeSpec

pytest.importorskip("scipy")
pytest.importorskip("fvcore")

LOPSIDED = TreeSpec(leaves=((0,), (1, 0), (1, 1)))
TINY = (
    "model.layers=[1,1,1]",
    "model.planes=[2,3,4]",
    "model.strides=[1,2,1]",
    "model.stem_width=4",
    "tree.projection_dim=4",
    "data.train_limit=80",
    "data.test_limit=40",
    "dense.epochs=1",
    "dense.batch_size=40",
    "finetune.epochs=1",
    "finetune.batch_size=40",
    "conversion.restarts=2",
)


@pytest.fixture(scope="module")
def task():
    return find_task("digits-resnet").with_settings(TINY)


@pytest.fixture(scope="module")
def lopsided(task):
    """A network whose paths differ in length, with every weight drawn anew."""
    system = DecisioNet(topology="tree")
    net = randomise(system.sketch(replace(task, tree=replace(LOPSIDED, projection_dim=4)))).eval()
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    root = net.nodes["root"]
    with torch.no_grad():
        root.unit.bias -= root(net.trunk(images)).median()  # so that both ways are taken
    return net


@pytest.fixture
def images():
    return torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def grouped(*groups: list[list[int]]) -> torch.Tensor:
    """Confusions: 0.1 within a pair, 0.02 within a group of pairs, none beyond; rows sum to one."""
    classes = sum(len(pair) for group in groups for pair in group)
    matrix = torch.zeros(classes, classes, dtype=torch.float64)
    for group in groups:
        members = torch.tensor([c for pair in group for c in pair])
        matrix[members[:, None], members] = 0.02
        for pair in group:
            matrix[torch.tensor(pair)[:, None], torch.tensor(pair)] = 0.1
    matrix.fill_diagonal_(0)
    return matrix + torch.diag(1 - matrix.sum(1))


def test_a_gradient_is_scaled_as_the_trees_is(lopsided, images):
    labels = torch.zeros(len(images), dtype=torch.int64)
    scaled = FinetuneRecipe(node_grad_scale=True)
    for recipe, given in ((scaled, True), (FinetuneRecipe(), False), (Recipe(), False)):
        torch.manual_seed(0)
        network = copy.deepcopy(lopsided).train()
        output = DecisionObjective(recipe, 1.0)(network.gated, images, labels, 0.0)
        assert (output.leaf_prob is not None) == given
        if given:
            assert float(output.leaf_prob.sum()) == pytest.approx(1.0)
            output.loss.backward()
            NodeScale(network, len(LOPSIDED.leaves), images.device)(output.leaf_prob)
    owned = [p for parameters in network.node_parameters().values() for p in parameters]
    rest = [*network.trunk.parameters(), *network.nodes["root"].parameters()]
    assert {id(p) for p in [*owned, *rest]} == {id(p) for p in network.parameters()}
    assert len(owned) + len(rest) == len(list(network.parameters()))


# -- the tree of classes -------------------------------------------------------------------------


def test_confused_classes_stay_together():
    found = class_codes(grouped([[0, 5], [2, 7]], [[1, 3], [4, 6]]), TreeSpec.balanced(2))
    assert found.dtype == torch.float32
    root, left, right = found.T.tolist()
    assert root == [LEFT, RIGHT, LEFT, RIGHT, RIGHT, LEFT, RIGHT, LEFT]
    off = OFF_ITS_WAY
    assert left == [LEFT, off, RIGHT, off, off, LEFT, off, RIGHT]
    assert right == [off, LEFT, off, LEFT, RIGHT, off, RIGHT, off]


def test_confusion_counts_in_both_directions():
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[0, 3] = matrix[1, 2] = 0.4
    matrix[2, 1] = 0.1
    assert class_codes(matrix, TreeSpec.balanced(1)).flatten().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("mistakes", [0.0, 0.01])
def test_no_side_is_ever_empty(mistakes):
    """Not even where all distances tie, as they do when a network makes no mistake."""
    matrix = torch.eye(9, dtype=torch.float64)
    matrix[0, 1] = mistakes
    tree = TreeSpec.balanced(3)
    found = class_codes(matrix, tree)
    for column in found.T.tolist():
        on_way = [code for code in column if code != OFF_ITS_WAY]
        assert len(on_way) != 1
        assert not on_way or set(on_way) == {LEFT, RIGHT}


def test_a_class_that_comes_alone_may_go_either_way():
    found = class_codes(torch.eye(2, dtype=torch.float64), TreeSpec.balanced(2))
    assert found.tolist() == [[LEFT, OFF_ITS_WAY, OFF_ITS_WAY], [RIGHT, OFF_ITS_WAY, OFF_ITS_WAY]]


def test_overlap_frees_only_what_is_confused_with_the_other_side_together():
    matrix = grouped([[0, 1]], [[2, 3]])
    matrix[1, 2] = matrix[1, 3] = 0.04  # 0.08 in all
    tree = TreeSpec.balanced(1)
    assert class_codes(matrix, tree, 0.07).flatten().tolist() == [LEFT, EITHER, RIGHT, RIGHT]
    assert class_codes(matrix, tree, 0.09).flatten().tolist() == [LEFT, LEFT, RIGHT, RIGHT]
    assert class_codes(matrix, tree, None).flatten().tolist() == [LEFT, LEFT, RIGHT, RIGHT]


def test_confusions_are_rows_of_shares_and_leave_the_network_as_it_was():
    network = nn.Linear(3, 3).train()
    with torch.no_grad():
        network.weight.copy_(torch.eye(3))
        network.bias.zero_()
    answers = torch.tensor([0, 0, 0, 1, 1, 0])
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    x = nn.functional.one_hot(answers, 3).float()
    batches = list(zip(x.split(4), labels.split(4), strict=True))
    counted = confusions(network, batches, 3, expected=False)
    assert counted.tolist() == [[0.75, 0.25, 0], [0.5, 0.5, 0], [0, 0, 0]]
    expected = confusions(network, batches, 3, expected=True)
    sure = torch.tensor([1.0, 0, 0], dtype=torch.float64).softmax(0)
    row = (3 * sure + sure[[1, 0, 2]]) / 4
    assert torch.allclose(expected[0], row)
    assert torch.allclose(expected.sum(1), torch.tensor([1.0, 1, 0], dtype=torch.float64))
    assert network.training


# -- gates ---------------------------------------------------------------------------------------

SCORES = torch.tensor([-9.0, -0.7, 0.0, 0.7, 9.0])


def test_gates_are_soft_or_hard_by_the_coin():
    soft = gate(SCORES, torch.tensor(False))
    assert torch.allclose(soft, (1.2 * SCORES.sigmoid() - 0.1).clamp(0, 1))
    assert soft[0] == 0 and soft[-1] == 1 and 0 < soft[1] < 0.5 == soft[2]
    assert gate(SCORES, torch.tensor(True)).tolist() == [0, 0, 0, 1, 1]


def test_hard_gates_have_the_gradient_of_soft_ones():
    gradients = []
    for hard in (False, True):
        scores = SCORES.clone().requires_grad_()
        gate(scores, torch.tensor(hard)).sum().backward()
        gradients.append(scores.grad)
    slope = 1.2 * SCORES.sigmoid() * (1 - SCORES.sigmoid())
    slope[[0, -1]] = 0  # beyond the clip
    assert torch.allclose(gradients[0], slope)
    assert torch.equal(*gradients)


def test_one_coin_per_batch_is_shared_by_all_nodes(lopsided, images):
    lopsided.train()
    with torch.no_grad():
        drawn = []
        for seed in range(40):
            torch.manual_seed(seed)
            drawn.append(lopsided.gated(images).gates)
        torch.manual_seed(7)
        again = lopsided.gated(images).gates
    lopsided.eval()
    assert torch.equal(again, drawn[7])
    assert not torch.equal(drawn[6], drawn[7])
    decided = torch.stack([((g == 0) | (g == 1)).all(0) for g in drawn])  # (batches, nodes)
    assert torch.equal(decided[:, 0], decided[:, 1])
    assert 11 <= int(decided[:, 0].sum()) <= 29


def test_noise_decides_near_zero_in_training_only(lopsided, images):
    """At a score of 0.5, a standard normal turns the gate in Φ(−0.5) = 31 % of the cases."""
    node = lopsided.nodes["root"].unit
    kept = {name: tensor.clone() for name, tensor in node.state_dict().items()}
    with torch.no_grad():
        node.weight.zero_()
        node.bias.fill_(0.5)
        state = torch.get_rng_state()
        assert lopsided.gated(images).gates[:, 0].tolist() == [1.0] * len(images)
        assert torch.equal(torch.get_rng_state(), state)
        lopsided.train()
        torch.manual_seed(0)
        gates = torch.cat([lopsided.gated(images).gates[:, 0] for _ in range(30)])
    lopsided.eval()
    node.load_state_dict(kept)
    assert (gates < 0.5).float().mean().item() == pytest.approx(0.309, abs=0.06)


@pytest.mark.parametrize("hard", [0.0, 1.0])
def test_every_part_learns_whichever_way_the_coin_falls(task, images, monkeypatch, hard):
    monkeypatch.setattr(decision_net, "_HARD_SHARE", hard)
    network = DecisioNet(topology="tree").sketch(task).train()
    torch.manual_seed(0)
    network.gated(images).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(node.unit.weight.grad.abs().sum() > 0 for node in network.nodes.values())


# -- the loss ------------------------------------------------------------------------------------


class Answer(nn.Module):
    def __init__(self, gated: Gated) -> None:
        super().__init__()
        self.gated = gated

    def forward(self, x):
        return self.gated


def test_gates_are_taught_the_code_where_their_class_comes():
    codes = torch.tensor([[LEFT, LEFT, OFF_ITS_WAY], [RIGHT, OFF_ITS_WAY, EITHER]])
    gates = torch.tensor([[0.2, 0.6, 0.9], [0.7, 0.8, 0.1]], requires_grad=True)
    logits = torch.zeros(2, 2)
    y = torch.tensor([0, 1])
    made = DecisionObjective(Recipe(label_smoothing=0.0), 2.0)(
        Answer(Gated(logits, gates, torch.ones(2, 4), codes)), torch.zeros(2, 1), y, 0.0
    )
    expected = (0.2**2 + 0.6**2 + 0.3**2 + 0.4**2) / 4
    assert made.metrics["code"].item() == pytest.approx(expected)
    assert made.loss.item() == pytest.approx(torch.tensor(2.0).log().item() + 2 * expected)
    assert made.metrics["train_side"].item() == pytest.approx(75.0)
    made.loss.backward()
    assert gates.grad[0, 2] == gates.grad[1, 1] == 0
    assert torch.allclose(gates.grad[1, 0], torch.tensor(2 * 2 * (0.7 - 1) / 4))


def test_labels_without_a_class_are_refused():
    codes = torch.zeros(2, 1)
    answer = Answer(Gated(torch.zeros(1, 2), torch.zeros(1, 1), torch.ones(1, 2), codes))
    objective = DecisionObjective(Recipe(), 1.0)
    with pytest.raises(DataError, match="the network has 2"):
        objective(answer, torch.zeros(1, 1), torch.tensor([2]), 0.0)


# -- one path ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_batch_single_inputs_and_hard_gates_agree(lopsided, images):
    logits, load = lopsided.with_load(images)
    assert isinstance(lopsided, Dynamic)
    assert torch.equal(lopsided(images), logits)
    assert torch.allclose(lopsided.gated(images).logits, logits, rtol=1e-4, atol=1e-5)
    assert load.choices.sum(1).tolist() == [1] * len(images)
    assert len(load.choices.any(0).nonzero()) > 1  # both kinds of path are taken
    for row in range(8):
        alone, own = lopsided.with_load(images[row : row + 1])
        assert torch.allclose(alone[0], logits[row], rtol=1e-4, atol=1e-5)
        assert torch.equal(own.choices[0], load.choices[row])
        assert own.active_params[0] == load.active_params[row]


@torch.no_grad()
def test_a_single_input_runs_the_modules_of_its_path_alone(lopsided, images):
    leaf = lopsided.tree.leaves[int(lopsided.hard(images[:1])[1])]
    ran = []
    handles = [
        module.register_forward_hook(lambda *_, name=f"{kind}.{key}": ran.append(name))
        for kind in ("nodes", "specializers", "heads")
        for key, module in getattr(lopsided, kind).items()
    ]
    lopsided(images[:1])
    for handle in handles:
        handle.remove()
    assert sorted(["trunk", *ran]) == sorted(lopsided._line(leaf))


@torch.no_grad()
def test_loads_are_the_sums_of_what_a_path_holds(lopsided, images):
    _, load = lopsided.with_load(images)
    for leaf, choice in zip(lopsided.tree.leaves, load.choices.T, strict=True):
        held = count_parameters(lopsided.get_submodule(path) for path in lopsided._line(leaf))
        assert set(load.active_params[choice].tolist()) <= {held}
    counted = cost(lopsided, images[:1], dense=nn.Linear(8, 1))
    net, bounds = counted["net"], lopsided.bounds()
    assert net["total_params"] == count_parameters([lopsided])
    assert net["active_params"] == bounds["most"]["active_params"] < net["total_params"]
    assert bounds["least"]["macs"] <= int(load.macs.min())
    assert int(load.macs.max()) <= bounds["most"]["macs"] == net["macs"] < net["soft_macs"]


def test_an_empty_batch_is_refused(lopsided):
    with pytest.raises(DataError, match="empty"):
        lopsided(torch.zeros(0, 1, 8, 8))


def test_the_published_wide_resnet_is_counted():
    """10.51 M of 19.39 M parameters and 2.60 G MACs: half-width branches after the first stage."""
    system, task = DecisioNet(), find_task("cifar100-wrn28-10")
    network = system.sketch(task)
    net = cost(network, example(task), dense=nn.Linear(32, 1))["net"]
    assert (net["active_params"], net["total_params"]) == (10_513_365, 19_385_465)
    assert net["macs"] == 2_606_075_296
    assert system.details(network, task) == {"leaves": 2, "node_params": 161}


@pytest.mark.parametrize("split", ["early", "late"])
def test_branches_narrow_at_every_split(task, split):
    task = replace(task, model=WideResNetSpec(depth=10, widen=1, in_channels=1, classes=10))
    one = DecisioNet(split=split).sketch(task)
    first, last = ("layer2", "layer3") if split == "early" else ("layer3", "layer3")
    branch = one.specializers["1"]
    assert getattr(branch, first)[0].bn1.num_features == {"layer2": 16, "layer3": 32}[first]
    assert getattr(branch, last)[0].conv2.out_channels == 32
    assert one.nodes["root"].unit.in_features == getattr(branch, first)[0].bn1.num_features
    two = DecisioNet(split=split, depth=2).sketch(task)
    assert len(two.heads) == 4
    assert two.specializers["0"].layer2[0].conv2.out_channels == 16
    assert two.specializers["0-1"].layer3[0].conv2.out_channels == 16
    assert two.nodes["1"].unit.in_features == 16


# -- the system ----------------------------------------------------------------------------------


def test_its_size_is_solved_for(task):
    model = ResNetSpec(
        layers=(1, 1, 1), planes=(16, 32, 64), strides=(1, 2, 2), stem="cifar",
        in_channels=1, classes=10,
    )  # fmt: skip
    task = replace(task, model=model)
    full = count_parameters([DecisioNet(width=1.0).sketch(task)])
    goal = round(0.3 * full)
    solved = DecisioNet(code_weight=0.5).fitted(task, goal)
    assert solved.code_weight == 0.5
    active = solved.sketch(task).bounds()["most"]["active_params"]
    assert active == pytest.approx(goal, rel=0.01)
    for impossible in (100, 10 * full):
        with pytest.raises(ConfigError, match="a path of this split has from"):
            DecisioNet().fitted(task, impossible)
    tree = DecisioNet(topology="tree")
    assert tree.fitted(task, goal) is tree


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"topology": "flat"}, "topology is 'flat': choose one of own, tree"),
        ({"split": "middle"}, "choose one of early, late"),
        ({"confusion": "test"}, "choose one of counted, expected"),
        ({"start": "source"}, "set topology=tree too"),
        ({"code_weight": -1.0}, "code_weight must be at least 0"),
        ({"code_weight": float("nan")}, "code_weight must be at least 0"),
        ({"overlap": 1.0}, r"overlap must be in \[0, 1\)"),
        ({"width": 0.0}, r"width must be in \(0, 1\]"),
        ({"depth": 0}, "depth must be from 1"),
        ({"depth": 1.5}, "depth must be int"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        DecisioNet().changed(fields)


def test_tasks_that_cannot_be_split_are_refused(task):
    with pytest.raises(ConfigError, match="needs more than 3 stages"):
        DecisioNet(depth=3).check(task)
    with pytest.raises(ConfigError, match="not of pointnet2: set topology=tree"):
        DecisioNet().check(find_task("shapes-pointnet2"))
    assert DecisioNet(overlap=0.1).changed({"overlap": None}) == DecisioNet()


@pytest.fixture
def captured(monkeypatch):
    """What a system would have trained."""
    seen = {}

    def train(self, network, objective=None, *, recipe=None, step="trained"):
        seen.update(network=network, objective=objective, recipe=recipe or self.recipe)

    monkeypatch.setattr(Bench, "train", train)
    return seen


@pytest.fixture(scope="module")
def bench(task, tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("chain")
    return Bench(chain=Chain(task, folder, device="cpu"), folder=folder / "row")


def test_from_the_source_only_the_decisions_are_new(bench, captured):
    converted = bench.chain.converted()
    made = DecisioNet(topology="tree", start="source").run(bench)
    state = made.network.state_dict()
    theirs = {k: v for k, v in converted.state_dict().items() if not k.startswith("routers.")}
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.items())
    assert {name.split(".")[0] for name in state.keys() - theirs.keys()} == {"nodes", "codes"}
    assert (made.recipe, made.mark) == (bench.recipe, "")
    assert captured["objective"].code_weight == 1.0


def test_from_scratch_no_two_branches_start_alike_and_every_run_starts_the_same(bench, captured):
    made = DecisioNet(topology="tree").run(bench)
    assert (made.recipe, made.mark) == (bench.scratch_recipe, "from scratch")
    assert made.epochs == bench.epochs == made.recipe.epochs
    first = {n: p.clone() for n, p in made.network.named_parameters()}
    left, right = (made.network.specializers[side] for side in ("0", "1"))
    for name, tensor in left.named_parameters():
        if tensor.ndim > 1:
            assert not torch.equal(tensor, right.get_parameter(name)), name
    dense = bench.dense().state_dict()
    assert not torch.equal(made.network.trunk.conv1.weight, dense["conv1.weight"])
    torch.manual_seed(123)
    again = DecisioNet(topology="tree").run(bench).network
    assert all(torch.equal(first[n], p) for n, p in again.named_parameters())
    assert torch.equal(again.codes, made.network.codes)


def test_classes_are_clustered_by_training_data(bench, captured, monkeypatch):
    seen = []

    def spy(network, batches, classes, **options):
        seen.append(torch.cat([y for _, y in batches]))
        return confusions(network, batches, classes, **options)

    monkeypatch.setattr(decisionet, "confusions", spy)
    made = DecisioNet(confusion="expected").run(bench)
    train = bench.chain.dataset.train
    assert len(seen[0]) == len(train) == 80
    assert 0 <= made.notes["confused_percent"] <= 100
    assert len(made.notes["class_codes"]) == 10
    assert set(made.network.codes.flatten().tolist()) == {LEFT, RIGHT}


def test_a_resumed_run_is_the_same_run_with_the_same_codes(bench, tmp_path, monkeypatch):
    system = DecisioNet(topology="tree")
    whole = system.run(replace(bench, folder=tmp_path / "whole")).network.state_dict()
    chain = Chain(bench.task, bench.chain.folder, device="cpu", max_minutes=0)
    with pytest.raises(Stopped):
        system.run(Bench(chain=chain, folder=tmp_path / "parts"))
    # Should the answers differ in the last bit by then, the checkpoint's codes still hold.
    other = 1 - class_codes(torch.eye(10, dtype=torch.float64), bench.task.tree)
    monkeypatch.setattr(decisionet, "class_codes", lambda *_: other.clone())
    made = system.run(replace(bench, folder=tmp_path / "parts"))
    parts = made.network.state_dict()
    assert not torch.equal(parts["codes"], other)
    assert made.notes["class_codes"] == whole["codes"].tolist()
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_without_scipy_the_first_step_says_so(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.cluster", None)
    for first_step in (DecisioNet().run, lambda bench: DecisioNet().check(bench.task)):
        with pytest.raises(MissingDependency, match=r"scipy.*\[peers\]"):
            first_step(bench)
