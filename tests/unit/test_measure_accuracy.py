import json

import pytest
import torch
from torch import nn

from sigmabranch.backbones.base import GlobalAveragePool
from sigmabranch.errors import ConfigError, DataError, NumericError
from sigmabranch.measure import correctness, evaluate, evaluate_dense
from sigmabranch.net import SigmaBranchNet
from sigmabranch.routing import Router
from sigmabranch.tree import TreeSpec

CLASSES, WIDTH, SAMPLES = 7, 12, 90
UNEVEN = TreeSpec(leaves=((0,), (1, 0), (1, 1)), projection_dim=5)


@pytest.fixture(params=[TreeSpec(projection_dim=5), UNEVEN], ids=["balanced", "uneven"])
def net(request):
    return random_net(request.param)


def random_net(tree, sharpness=2.0):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = SigmaBranchNet(
            tree=tree,
            trunk=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
            specializers={
                node: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.ReLU())
                for node in tree.specializers
            },
            routers={node: Router(WIDTH, GlobalAveragePool(), tree) for node in tree.inner},
            heads={leaf: nn.Linear(WIDTH, CLASSES) for leaf in tree.leaves},
            plans={},
            source=None,
            record={},
        )
    for node in tree.inner:
        net.router(node).gate.weight.data *= sharpness
    return net


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def batches(data, size=32):
    return list(zip(*(part.split(size) for part in data), strict=True))


class Told(list):
    """Batches that tell of each sample under which condition it was taken."""

    conditions = ("day", "night", "never")

    def part(self, rank, world_size, samples=None):
        return iter(self[rank::world_size])


def test_figures_under_each_condition_are_those_of_its_samples_alone(net, data):
    condition = torch.arange(SAMPLES) % 3 % 2
    told = Told(batches((*data, condition)))
    apart = [batches([part[condition == number] for part in data]) for number in (0, 1)]
    whole = evaluate(net, told)
    day, night = (evaluate(net, each) for each in apart)
    right = {"day": day["top1"], "night": night["top1"]}
    assert whole["accuracy_by_condition"] == pytest.approx(right)
    assert whole["condition_leaf_share"][:2] == [
        pytest.approx(day["usage"]), pytest.approx(night["usage"]),
    ]  # fmt: skip
    assert whole["condition_leaf_share"][2] == [0.0] * len(net.tree.leaves)
    plain = evaluate(net, batches(data))
    extra = {"accuracy_by_condition", "leaf_condition_mi", "condition_leaf_share"}
    assert {key: value for key, value in whole.items() if key not in extra} == plain
    json.dumps(whole)
    model = nn.Linear(WIDTH, CLASSES)
    by_condition = evaluate_dense(model, told)["accuracy_by_condition"]
    assert by_condition["night"] == pytest.approx(evaluate_dense(model, apart[1])["top1"])


def test_a_route_that_follows_the_condition_says_so(net, data):
    leaf = net.eval().hard(data[0]).leaf
    told = Told(batches((*data, (leaf == leaf[0]).long())))
    other = Told(batches((*data, torch.arange(SAMPLES) % 2)))
    informed, blind = (evaluate(net, each)["leaf_condition_mi"] for each in (told, other))
    assert informed > 5 * blind


@torch.no_grad()
def test_top1_top5_and_usage_are_those_of_the_hard_forward(net, data):
    measured = evaluate(net, batches(data))
    x, y = data
    hard = net.eval().hard(x)
    best = hard.logits.topk(5, dim=1).indices
    assert measured["samples"] == SAMPLES
    assert measured["top1"] == pytest.approx(100 * (best[:, 0] == y).double().mean().item())
    assert measured["top5"] == pytest.approx(
        100 * (best == y[:, None]).any(1).double().mean().item()
    )
    usage = torch.bincount(hard.leaf, minlength=len(net.tree.leaves)) / SAMPLES
    assert measured["usage"] == pytest.approx(usage.tolist())


@torch.no_grad()
def test_every_other_figure_matches_a_plain_recount(net, data):
    measured = evaluate(net, batches(data))
    x, y = data
    soft, leaf = net.eval().soft(x), net.hard(x).leaf
    predicted = soft.logits.argmax(-1)
    leaves = len(net.tree.leaves)
    right = predicted == y[:, None]
    mixture = sum(soft.log_prob[:, i, None].exp() * soft.logits[:, i] for i in range(leaves))
    assert measured["soft_top1"] == pytest.approx(percent(mixture.argmax(1) == y))
    assert measured["oracle_leaf"] == pytest.approx(percent(right.any(1)))
    assert measured["always_leaf"] == pytest.approx([percent(right[:, i]) for i in range(leaves)])
    assert measured["mean_leaf"] == pytest.approx(sum(measured["always_leaf"]) / leaves)
    assert measured["mean_max_p"] == pytest.approx(soft.log_prob.exp().amax(1).mean().item())
    by_class = [right[y == v].sum(0).max().item() for v in range(CLASSES)]
    assert measured["leaf_by_class"] == pytest.approx(100 * sum(by_class) / SAMPLES)
    shares = [[(leaf[y == v] == i).double().mean().item() for i in range(leaves)] for v in range(7)]
    for row, expected in zip(measured["class_leaf_share"], shares, strict=True):
        assert row == pytest.approx(expected)
    pairs = [(i, j) for i in range(leaves) for j in range(i)]
    same = sum((predicted[:, i] == predicted[:, j]).double().mean().item() for i, j in pairs)
    assert measured["agreement"] == pytest.approx(same / len(pairs))
    assert measured["routing_gain"] == measured["top1"] - measured["shuffled_routes"]
    json.dumps(measured, allow_nan=False)


def percent(hits):
    return 100 * hits.double().mean().item()


def test_the_batch_size_does_not_change_the_result(net, data):
    small, large = (evaluate(net, batches(data, size)) for size in (7, 90))
    assert small.pop("mean_max_p") == pytest.approx(large.pop("mean_max_p"))
    assert small == large


def test_evaluation_leaves_modes_and_running_statistics_alone(net, data):
    net.train()
    net.trunk.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    evaluate(net, batches(data))
    assert net.training and net.routers.training and not net.trunk[1].training
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_clones_have_no_routing_gain_and_full_agreement(data):
    net = random_net(TreeSpec(projection_dim=5))
    for group in (net.specializers, net.heads):
        twins = list(group.values())
        for twin in twins:
            twin.load_state_dict(twins[0].state_dict())
    for leaf in ((0, 0), (0, 1), (1, 0), (1, 1)):
        net.specializer(leaf).load_state_dict(net.specializer((0,)).state_dict())
    measured = evaluate(net, batches(data))
    assert measured["routing_gain"] == pytest.approx(0)
    assert measured["agreement"] == 1
    assert measured["oracle_leaf"] == measured["top1"] == measured["mean_leaf"]


def test_leaves_that_know_only_their_class_gain_everything_from_routing():
    tree = TreeSpec(leaves=((0,), (1,)), projection_dim=2)
    net = SigmaBranchNet(
        tree=tree,
        trunk=nn.Linear(2, 2),
        specializers={node: nn.Identity() for node in tree.specializers},
        routers={(): Router(2, GlobalAveragePool(), tree)},
        heads={leaf: nn.Linear(2, 2) for leaf in tree.leaves},
        plans={},
        source=None,
        record={},
    )
    for linear in (net.trunk, net.router(()).projection[1], net.router(()).gate):
        linear.weight.data = torch.eye(2)
        linear.bias.data.zero_()
    for number, leaf in enumerate(tree.leaves):
        net.head(leaf).weight.data.zero_()
        net.head(leaf).bias.data = torch.eye(2)[number]
    y = torch.arange(400) % 2
    measured = evaluate(net, batches((torch.eye(2)[y], y)))
    assert measured["top1"] == measured["leaf_by_class"] == 100
    assert measured["shuffled_routes"] == pytest.approx(50, abs=4)
    assert measured["agreement"] == 0
    assert measured["leaf_class_mi"] == pytest.approx(1)
    assert measured["best_leaf_of_class"] == [0, 1]
    assert measured["top5"] == 100  # fewer than five classes


def test_leaf_by_class_can_use_the_best_leaves_of_another_split(data):
    net = random_net(TreeSpec(projection_dim=5))
    own = evaluate(net, batches(data))
    assert own["leaf_by_class_from"] == "this split"
    given = evaluate(net, batches(data), class_leaf=[0] * CLASSES)
    assert given["leaf_by_class"] == pytest.approx(given["always_leaf"][0])
    assert given["leaf_by_class_from"] == "training split"
    assert given["leaf_by_class"] < own["leaf_by_class"]
    again = evaluate(net, batches(data), class_leaf=own["best_leaf_of_class"])
    assert again["leaf_by_class"] == own["leaf_by_class"]


@pytest.mark.parametrize("class_leaf", [[0, 1], [4] * CLASSES])
def test_a_class_leaf_table_that_does_not_fit_is_refused(data, class_leaf):
    with pytest.raises(ConfigError, match=r"for each of 7 classes"):
        evaluate(random_net(TreeSpec(projection_dim=5)), batches(data), class_leaf=class_leaf)


@pytest.mark.parametrize("measure", [correctness, evaluate, evaluate_dense])
def test_bad_data_is_refused_by_name(measure, data):
    net = random_net(TreeSpec(projection_dim=5))
    x, y = data
    with pytest.raises(DataError, match="no batch"):
        measure(net, [])
    with pytest.raises(DataError, match=r"labels run from 0 to 9.*7 classes"):
        measure(net, [(x, y.clone().index_fill_(0, torch.tensor([5]), 9))])
    with pytest.raises(DataError, match=r"labels of shape \(90, 1\) for 90 inputs"):
        measure(net, [(x, y[:, None])])
    with pytest.raises(NumericError, match="on 1 of 90 samples"):
        measure(net, batches((x.index_fill(0, torch.tensor([5]), float("nan")), y)))


def test_correctness_says_of_each_sample_what_the_accuracy_counts(net, data):
    right_N = correctness(net, batches(data))
    assert right_N.dtype == torch.bool and len(right_N) == SAMPLES
    assert percent(right_N) == pytest.approx(evaluate(net, batches(data))["top1"])
    x, y = data
    assert torch.equal(right_N, net.eval().hard(x).logits.argmax(1) == y)


def test_evaluate_dense_matches_a_plain_recount(data):
    x, y = data
    model = nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.Dropout(0.5)).train()
    measured = evaluate_dense(model, batches(data))
    assert model[1].training
    logits = model.eval()(x)
    assert measured["samples"] == SAMPLES
    assert measured["top1"] == pytest.approx(percent(logits.argmax(1) == y))
    best = logits.topk(5, dim=1).indices
    assert measured["top5"] == pytest.approx(percent((best == y[:, None]).any(1)))
    assert measured["loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item())
