"""Late upcycling: one path, then its copies, each on its own samples."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sigmabranch as sb
from sigmabranch.conversion import ConversionSpec, Shards
from sigmabranch.data import Share
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.routing import Router
from sigmabranch.training import (
    DenseObjective,
    FabricEngine,
    FinetuneRecipe,
    LoaderBatches,
    RoutedObjective,
    fit,
)
from sigmabranch.training.grouping import class_leaves
from sigmabranch.training.learner import Learner
from sigmabranch.training.mixing import cutmix, mixup
from sigmabranch.training.routers import even_bias, fit_router, scores
from sigmabranch.training.upcycling import Upcycling, divide, unite
from sigmabranch.tree import TreeSpec

CLASSES, WIDTH = 4, 6
UNEVEN = TreeSpec(leaves=((0,), (1, 0), (1, 1)), projection_dim=4, projection_dropout=0.0)
BINARY = TreeSpec(projection_dim=4, projection_dropout=0.0)


def stage(norm: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU())


def net_of(tree: TreeSpec, *, norm: bool = False) -> SigmaBranchNet:
    """Level k's stage is called stage-k wherever it runs, as conversion names them."""
    torch.manual_seed(1)

    def specializer(node):
        stages = {f"stage-{level}": stage(norm) for level in tree.levels_of(node)}
        return nn.Sequential(OrderedDict(stages))

    return SigmaBranchNet(
        tree=tree,
        trunk=nn.Linear(WIDTH, 8),
        specializers={node: specializer(node) for node in tree.specializers},
        routers={
            node: Router(8, nn.Identity(), tree, len(tree.children(node))) for node in tree.inner
        },
        heads={leaf: nn.Linear(8, CLASSES) for leaf in tree.leaves},
        plans={},
        source=None,
        record={},
    )


@pytest.fixture(scope="module")
def samples():
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(64) % CLASSES
    centre = 3 * torch.randn(CLASSES, WIDTH, generator=draw)
    return centre[y] + torch.randn(64, WIDTH, generator=draw), y


def batches(samples, size=8):
    return LoaderBatches(DataLoader(TensorDataset(*samples), size, shuffle=True), seed=5)


def plan(**fields):
    defaults = {"epochs": 4, "batch_size": 8, "lr": 0.05, "warmup_epochs": 0.5, "upcycle": 0.5}
    return FinetuneRecipe(**{**defaults, **fields})


def train(net, samples, recipe, tmp_path, teacher=None, **options):
    objective = RoutedObjective(recipe, teacher, len(net.tree.leaves))
    engine = FabricEngine("cpu")
    return fit(net, objective, batches(samples), recipe, folder=tmp_path, engine=engine, **options)


@pytest.mark.parametrize("tree", [BINARY, UNEVEN], ids=["binary", "uneven"])
def test_united_leaves_are_one_path_and_divided_ones_its_copies(tree, samples):
    x, _ = samples
    net = net_of(tree)
    one_path = {id(p) for p in net.path(max(tree.leaves, key=len)).parameters()}
    size = sum(p.numel() for p in net.parameters())
    unite(net)
    logits_BLV = net.soft(x).logits
    for one, other in pairwise(logits_BLV.unbind(1)):
        assert torch.equal(one, other)
    assert torch.equal(net.hard(x).logits, logits_BLV[:, 0])
    unrouted = [p for name, p in net.named_parameters() if not name.startswith("routers.")]
    assert len(unrouted) < len(one_path) + 2 * len(tree.leaves)

    origin = divide(net)
    assert sum(p.numel() for p in net.parameters()) == size
    assert torch.equal(net.soft(x).logits, logits_BLV)
    assert {id(p) for p in origin.values()} <= {id(p) for p in unrouted}
    assert all(torch.equal(new, old) and new is not old for new, old in origin.items())


def test_a_hard_training_step_is_the_gathered_soft_one(samples):
    x, y = samples
    net = net_of(UNEVEN).train()
    soft = net.soft(x)
    leaf_B = net.leaf_of(soft)
    assert len(leaf_B.unique()) > 1
    expected = soft.logits[torch.arange(len(x)), leaf_B]
    nn.functional.cross_entropy(expected, y).backward()
    wanted = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    hard = net.hard(x)
    assert torch.equal(hard.leaf, leaf_B)
    torch.testing.assert_close(hard.logits, expected)
    nn.functional.cross_entropy(hard.logits, y).backward()
    for name, parameter in net.named_parameters():
        if not name.startswith("routers."):
            torch.testing.assert_close(parameter.grad, wanted[name])


def test_every_node_runs_while_training_even_where_nothing_is_routed(samples):
    x, y = samples
    net = net_of(BINARY, norm=True).train()
    with torch.no_grad():
        net.router(()).gate.bias.copy_(torch.tensor([50.0, -50.0]))
    hard = net.hard(x)
    assert hard.logits.shape == (len(x), CLASSES)
    assert set(hard.leaf.tolist()) <= {0, 1}
    nn.functional.cross_entropy(hard.logits, y).backward()
    # There is a gradient, and it is zero: processes that train together need it.
    assert net.head((1, 0)).weight.grad.abs().sum() == 0
    assert net.head((0, 0)).weight.grad.abs().sum() > 0
    net.eval()
    with torch.no_grad():
        assert set(net.hard(x).leaf.tolist()) <= {0, 1}


def test_the_first_part_is_the_training_of_one_path(samples, tmp_path):
    recipe = plan(epochs=2, upcycle=0.999, label_smoothing=0.0)
    net = net_of(BINARY)
    seen = []
    train(net, samples, recipe, tmp_path / "net", stop=lambda: seen.append(1) or len(seen) == 15)
    assert net.united
    path = net_of(BINARY)
    line = nn.Sequential(
        path.trunk, path.specializer((0,)), path.specializer((0, 0)), path.head((0, 0))
    )
    fit(
        line,
        DenseObjective(recipe),
        batches(samples),
        recipe,
        folder=tmp_path / "line",
        engine=FabricEngine("cpu"),
        stop=lambda: seen.append(1) or len(seen) == 30,
    )
    for mine, other in zip(net.head((0, 0)).parameters(), line[3].parameters(), strict=True):
        assert torch.equal(mine, other)


def test_frozen_routers_decide_in_training_as_they_do_in_use(samples):
    x, _ = samples
    net = net_of(TreeSpec(projection_dim=4, projection_dropout=0.5))
    turn = Upcycling(plan(), None)
    turn.prepare(net, done=True)
    with torch.no_grad():
        leaf_B = net.eval().hard(x).leaf
        assert torch.equal(net.train().hard(x).leaf, leaf_B)
        turn.release(net)
        assert not torch.equal(net.hard(x).leaf, leaf_B)


def test_leaves_part_at_the_turn_and_learn_their_own(samples, tmp_path):
    x, y = samples
    net = net_of(BINARY, norm=True)
    result = train(net, samples, plan(epochs=6), tmp_path)
    assert result.complete
    assert not net.united
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        leaf_B = net.hard(x).leaf
        assert len(leaf_B.unique()) == 4
        assert (net(x).argmax(1) == y).float().mean() > 0.7
        first, second = (net.head(leaf).weight for leaf in ((0, 0), (1, 1)))
        assert not torch.equal(first, second)


def test_moments_schedule_and_average_survive_the_turn(samples):
    recipe = plan(ema_decay=0.9)
    net = net_of(BINARY)
    objective = RoutedObjective(recipe, None, 4)
    learner = Learner(
        net, objective, recipe, FabricEngine("cpu"), steps_per_epoch=8, pass_size=8, seed=0
    )
    learner.train()
    shares = list(batches(samples).epoch(0))
    for share in [*shares, *shares]:
        learner.learn(share)
    assert learner.turns
    old = learner.state_dict()
    lr = learner._optimizer.param_groups[0]["lr"]
    weight, mean = net.head((0, 0)).weight, learner.network.head((0, 0)).weight.clone()
    moment = learner._optimizer.state[weight]["momentum_buffer"].clone()
    learner.turn(batches(samples).epoch(4))
    assert learner._optimizer.param_groups[0]["lr"] == lr
    for leaf in BINARY.leaves:
        head = net.head(leaf).weight
        assert torch.equal(learner._optimizer.state[head]["momentum_buffer"], moment)
        assert torch.equal(learner.network.head(leaf).weight, mean)
    assert torch.equal(learner.network.router(()).gate.weight, net.router(()).gate.weight)
    assert old["schedule"]["last_epoch"] == learner.state_dict()["schedule"]["last_epoch"]


def test_conversion_gives_all_branches_the_channels_of_the_single_path(dense, batches):
    net = sb.convert(dense, batches, spec=ConversionSpec(channels="average"))
    unite(net)  # refuses different channels
    other = sb.convert(dense, batches)
    with pytest.raises(ConfigError, match="convert with channels=average"):
        unite(other)


@pytest.mark.parametrize("sharing", [{"tied": 0.5}, {"delta": 1}], ids=["tied", "delta"])
def test_what_siblings_share_stays_shared_after_the_turn(dense, batches, sharing):
    x = torch.cat([x for x, _ in batches])
    tree = TreeSpec(projection_dim=4, **sharing)
    net = sb.convert(dense, batches, tree, spec=ConversionSpec(channels="average"))
    size, keys = sum(p.numel() for p in net.parameters()), list(net.state_dict())
    unite(net)
    assert sum(p.numel() for p in net.parameters()) < size
    logits = net(x)
    divide(net)
    assert list(net.state_dict()) == keys
    assert sum(p.numel() for p in net.parameters()) == size
    for one in net.soft(x).logits.unbind(1):
        torch.testing.assert_close(one, logits)
    # A cousin's shared tensor is its own parent's: changing it moves that parent's children alone.
    with torch.no_grad():
        for parameter in net.shared["1"].parameters():
            parameter.mul_(1.5)
    moved = [not torch.allclose(one, logits) for one in net.soft(x).logits.unbind(1)]
    assert moved == [False, False, True, True]


def test_finetune_upcycles_a_converted_network(dense, batches):
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True)
    net = sb.convert(dense, loader, spec=ConversionSpec(channels="average"))
    recipe = plan(epochs=2, groups="clusters", mix="cutmix", distill_weight=1.0)
    sb.finetune(net, loader, recipe, teacher=copy.deepcopy(dense), device="cpu")
    usage = sb.evaluate(net, loader)["usage"]
    assert len(usage) == 4
    assert sum(usage) == pytest.approx(1)


def test_confused_classes_share_a_leaf():
    leaf_V = torch.tensor([2, 0, 1, 2, 0, 1, 2, 0])
    confusion_VV = 0.1 + 0.5 * (leaf_V[:, None] == leaf_V).double()
    found_V = class_leaves(confusion_VV, UNEVEN, seed=0)
    assert len({*zip(leaf_V.tolist(), found_V.tolist(), strict=True)}) == 3


def test_class_groups_are_as_large_as_their_leaves_are_many():
    torch.manual_seed(0)
    assert class_leaves(torch.rand(10, 10), UNEVEN, 0).bincount().tolist() == [3, 3, 4]
    assert class_leaves(torch.rand(8, 8), BINARY, 0).bincount().tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("share", [(0.5, 0.5), (0.7, 0.3), (0.2, 0.5, 0.3)])
def test_a_shifted_bias_uses_branches_as_asked(share):
    torch.manual_seed(0)
    score_NK = torch.randn(2000, len(share)) + torch.arange(len(share))
    chosen = (score_NK + even_bias(score_NK, torch.tensor(share))).argmax(1)
    used = chosen.bincount(minlength=len(share)) / len(chosen)
    assert used.tolist() == pytest.approx(share, abs=0.01)


def test_a_router_learns_what_can_be_told_apart(samples):
    x, y = samples
    router = Router(WIDTH, nn.Identity(), BINARY)
    fit_router(router, x.repeat(8, 1), (y >= 2).long().repeat(8), seed=0)
    assert (scores(router, x).argmax(1) == (y >= 2)).float().mean() > 0.9
    assert not any(p.requires_grad for p in router.parameters())
    with torch.no_grad():
        assert torch.equal(router(x).argmax(1), scores(router, x).argmax(1))


def test_mixed_views_come_from_two_samples():
    torch.manual_seed(0)
    x = torch.arange(8.0)[:, None, None, None].expand(8, 1, 6, 6)
    for mixed in (mixup(x, 1.0), cutmix(x, 1.0)):
        assert mixed.shape == x.shape
        assert mixed.sum() == pytest.approx(float(x.sum()), rel=1e-5)
    assert set(cutmix(x, 1.0).flatten().tolist()) <= set(range(8))
    with pytest.raises(ConfigError, match="needs images"):
        cutmix(x[..., 0, 0], 1.0)


def test_a_share_of_the_teacher_moves_in_a_straight_line():
    recipe = plan(distill_weight=0.8, distill_weight_end=0.2)
    assert [recipe.distill_weight_at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.8, 0.5, 0.2])
    assert plan(distill_weight=0.0, distill_weight_end=0.2).distills
    assert not plan().distills


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"upcycle": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"upcycle": -0.1}, r"in \[0, 1\), got -0.1"),
        ({"groups": "colours"}, "choose one of confusions, clusters"),
        ({"mix": "mixup"}, "set distill_weight=1"),
        ({"mix": "mixup", "distill_weight": 1.0, "distill_weight_end": 0.0}, "distill_weight=1"),
        ({"distill_weight_end": 2.0}, r"in \[0, 1\]"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        plan(**fields)


def test_what_cannot_be_dealt_out_is_refused(samples, tmp_path):
    x, y = samples
    wide = net_of(TreeSpec.balanced(3, projection_dim=4))
    with pytest.raises(ConfigError, match="4 classes cannot be dealt out to 8 leaves"):
        train(wide, samples, plan(), tmp_path / "classes")
    teacher = nn.Linear(WIDTH, CLASSES + 1)
    with pytest.raises(DataError, match="use a teacher of the same 4 classes"):
        train(net_of(BINARY), samples, plan(distill_weight=0.5), tmp_path / "teacher", teacher)
    net = net_of(BINARY).eval()
    turn = Upcycling(plan(), None)
    turn.prepare(net, done=False)
    few = [Share(x[:3], y[:3], 3)]
    with pytest.raises(DataError, match="3 samples are too few for 4 leaves"):
        turn.make(net, few, Shards(), 0)
    alike = [Share(x[y == 0], y[y == 0], int((y == 0).sum()))]
    with pytest.raises(DataError, match="found no samples for branch"):
        turn.make(net, alike, Shards(), 0)
