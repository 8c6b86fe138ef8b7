"""Feed-forward layers carved into experts: the same function, fewer neurons, honest counts."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from conftest import randomise
from sigmabranch.backbones import ViTSpec
from sigmabranch.errors import ConfigError, MissingDependency
from sigmabranch.measure import Dynamic, cost
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.expert_layer import ExpertLayer, feed_forwards
from sigmabranch.peers.ffn_moe import FfnMoE
from sigmabranch.peers.moe_net import MoeNet
from sigmabranch.peers.neuron_groups import grouped
from sigmabranch.tasks import Chain, Task, find_task
from sigmabranch.tasks.task import DataSpec
from sigmabranch.training import FinetuneRecipe, Recipe
from sigmabranch.training.optim import build_optimizer

pytest.importorskip("scipy")

SPEC = ViTSpec(
    image_size=8, patch=2, width=16, depth=2, heads=2, mlp_ratio=4, in_channels=1, classes=10
)
SYSTEM = FfnMoE(experts=8, shared=2, active=2, samples=48)
EXPERT = 8 * (16 + 1 + 16)  # neurons · (row, bias, column)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 1, 8, 8, generator=generator)


@pytest.fixture(scope="module")
def dense():
    return randomise(SPEC.build())


@pytest.fixture
def carve(dense, images):
    def carved(system: FfnMoE) -> MoeNet:
        model = system.carve(copy.deepcopy(dense), lambda: [(x, None) for x in images.split(16)])
        return MoeNet(model, images[:1])

    return carved


@pytest.fixture
def net(carve):
    """Carved, with scales as training might leave them."""
    carved = carve(SYSTEM)
    for layer in carved.layers():
        nn.init.normal_(layer.scale)
    return carved


@pytest.fixture
def task():
    adam = {"batch_size": 32, "optimizer": "adam", "lr": 1e-3, "warmup_epochs": 0.0}
    return Task(
        name="digits-vit",
        summary="",
        data=DataSpec(name="digits", train_limit=128, test_limit=64),
        model=SPEC,
        dense=Recipe(epochs=1, **adam),
        finetune=FinetuneRecipe(epochs=2, **adam),
    )


# -- the function --------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 2, 7])
def test_with_every_expert_on_it_is_the_dense_network(carve, dense, images, shared):
    net = carve(FfnMoE(experts=8, shared=shared, active=8 - shared))
    with torch.no_grad():
        assert torch.allclose(net(images), dense(images), atol=1e-5)


def test_a_layer_is_the_dense_one_without_the_neurons_of_experts_that_a_token_did_not_choose(
    dense,
):
    ffn, x_TD = dense.blocks[0].mlp, torch.randn(30, 16)
    order_H, speaker_R = torch.randperm(64), torch.tensor([3, 60, 7, 12, 33, 41])
    layer = ExpertLayer(ffn, order_H, speaker_R, experts=8, active=2, balance_rate=0.0).eval()
    nn.init.normal_(layer.scale)
    with torch.no_grad():
        hidden_TH = ffn.act(ffn.fc1(x_TD))
        score_TR = hidden_TH[:, speaker_R].abs().softmax(dim=1)
        kept_TH = torch.zeros(30, 64)
        kept_TH[:, order_H[:16]] = 1
        for token in range(30):
            for expert in score_TR[token].argsort(descending=True)[:2]:
                neurons = order_H[16 + 8 * expert : 24 + 8 * expert]
                kept_TH[token, neurons] = 1 + score_TR[token, expert] * layer.scale[expert]
        assert torch.allclose(layer(x_TD), ffn.fc2(hidden_TH * kept_TH), atol=1e-5)


def test_training_and_evaluation_compute_the_same(net, images):
    for layer in net.layers():
        layer.router.balance_rate = 0.0
    with torch.no_grad():
        assert torch.allclose(net.train()(images), net.eval()(images), atol=1e-5)


def test_an_image_alone_never_touches_the_experts_that_it_does_not_choose(net, images):
    with torch.no_grad():
        expected, load = net.with_load(images)
        fewest = int(load.active_params.argmin())
        assert not load.choices[fewest].all()
        for layer, used_R in zip(net.layers(), load.choices[fewest].split(6), strict=True):
            unused_H = (~used_R).repeat_interleave(8)
            layer.fc1.weight[16:][unused_H] = torch.nan
            layer.fc2.weight[:, 16:][:, unused_H] = torch.nan
        alone = net(images[fewest : fewest + 1])
    assert torch.allclose(alone, expected[fewest : fewest + 1], atol=1e-5)


def test_it_splits_the_layers_of_timms_form_and_no_others():
    def mlp(**changed: nn.Module) -> nn.Module:
        parts = {"fc1": nn.Linear(4, 8), "act": nn.GELU(), "drop1": nn.Dropout(0.0)}
        parts |= {"norm": nn.Identity(), "fc2": nn.Linear(8, 4), "drop2": nn.Dropout(0.0)}
        return nn.ModuleDict({**parts, **changed})

    assert list(feed_forwards(nn.Sequential(mlp()))) == ["0"]
    for other in (
        {"norm": nn.LayerNorm(8)},
        {"drop1": nn.Dropout(0.1)},
        {"fc2": nn.Linear(4, 4)},  # gated: half of the neurons multiply the others
        {"fc1": nn.Conv2d(4, 8, 1)},
    ):
        assert not feed_forwards(nn.Sequential(mlp(**other)))


# -- carving -------------------------------------------------------------------------------------


def planted(groups: int, size: int, common: int) -> torch.Tensor:
    """(T, H) markers: ``common`` neurons fire often, the rest in groups, each on its own tokens.

    One neuron of each group fires on other tokens too, so that a cluster starts from it.
    """
    generator = torch.Generator().manual_seed(0)
    group_T = torch.randint(groups, (400,), generator=generator)
    marker_TGM = (group_T[:, None] == torch.arange(groups))[:, :, None].expand(-1, -1, size)
    noise_TH = torch.rand(400, groups * size, generator=generator) < 0.05
    fires_TH = marker_TGM.flatten(1) ^ noise_TH
    fires_TH[:, ::size] |= torch.rand(400, groups, generator=generator) < 0.3
    often_TC = torch.rand(400, common, generator=generator) < 0.9
    return torch.cat([often_TC, fires_TH], dim=1).double()


def test_neurons_that_fire_often_are_shared_and_those_that_fire_together_become_an_expert():
    marker_TH = planted(groups=3, size=8, common=16)
    shuffle_H = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    marker_TH = marker_TH[:, shuffle_H]
    order_H, _ = grouped(marker_TH.T @ marker_TH, 5, 2)
    assert sorted(order_H.tolist()) == list(range(40))
    assert sorted(shuffle_H[order_H[:16]].tolist()) == list(range(16))
    found = {frozenset(expert.tolist()) for expert in shuffle_H[order_H[16:]].split(8)}
    assert found == {frozenset(range(16 + 8 * g, 24 + 8 * g)) for g in range(3)}


def test_distances_from_counts_are_the_l1_distances_between_markers():
    from scipy.optimize import linear_sum_assignment

    generator = torch.Generator().manual_seed(5)
    marker_TH = (torch.rand(50, 24, generator=generator) < torch.linspace(0.1, 0.6, 24)).double()
    order_H, speaker_R = grouped(marker_TH.T @ marker_TH, 6, 2)
    left_J = marker_TH.sum(dim=0).argsort(descending=True, stable=True)[8:]
    columns_JT = marker_TH.T[left_J]
    cost_JR = torch.cdist(columns_JT, columns_JT[:4], p=1)
    rows, seats = linear_sum_assignment(cost_JR.repeat_interleave(4, dim=1).numpy())
    least = cost_JR[torch.tensor(rows), torch.tensor(seats) // 4].sum()
    experts = order_H[8:].split(4)
    ours = sum(
        (marker_TH[:, neuron] - marker_TH[:, left_J[number]]).abs().sum()
        for number, expert in enumerate(experts)
        for neuron in expert
    )
    assert ours == least  # several assignments may be the best
    for expert, speaker in zip(experts, speaker_R, strict=True):
        mean_T = marker_TH[:, expert].mean(dim=1)
        away = {int(h): (marker_TH[:, h] - mean_T).abs().sum().item() for h in expert}
        assert away[int(speaker)] == pytest.approx(min(away.values()))


def test_a_layer_is_carved_on_what_those_before_it_pass_on(dense, images, monkeypatch):
    seen = []
    count = FfnMoE._firing_together

    def watched(self, model, ffn, batches):
        seen.append([isinstance(block.mlp, ExpertLayer) for block in model.blocks])
        return count(self, model, ffn, batches)

    monkeypatch.setattr(FfnMoE, "_firing_together", watched)
    SYSTEM.carve(copy.deepcopy(dense), lambda: [(images, None)])
    assert seen == [[False, False], [True, False]]


@pytest.mark.parametrize(
    ("settings", "strongest"),
    [({"normalised": False}, 2), ({"normalised": True}, 1), ({"weighted": True}, 0)],
)
def test_what_marks_a_neuron(settings, strongest):
    """Neuron 2 has the longest row, 1 the best direction, 0 the greatest weight in the output."""
    ffn = nn.ModuleDict({"fc1": nn.Linear(2, 3), "act": nn.GELU(), "fc2": nn.Linear(3, 2)})
    with torch.no_grad():
        ffn.fc1.weight.copy_(torch.tensor([[0.5, 0.5], [1.0, 0.1], [9.0, 9.0]]))
        ffn.fc1.bias.zero_()
        ffn.fc2.weight.copy_(torch.tensor([[99.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    model = nn.Sequential()
    model.add_module("mlp", _Called(ffn))
    together_HH = FfnMoE(markers=0.3, **settings)._firing_together(
        model, model.mlp, [(torch.tensor([[4.0, 0.0]] * 5), None)]
    )
    expected = torch.zeros(3)
    expected[strongest] = 5
    assert together_HH.diagonal().tolist() == expected.tolist()


class _Called(nn.Module):
    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = parts["fc1"], parts["act"], parts["fc2"]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def test_a_missing_scipy_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingDependency, match=r"scipy: pip install 'sigma-branch\[peers\]'"):
        grouped(torch.eye(8), 4, 1)


# -- training ------------------------------------------------------------------------------------


def test_training_handicaps_the_experts_that_are_chosen_more_often_than_the_average(net, images):
    router = net.layers()[0].router
    chosen = []
    router.register_forward_hook(lambda _m, _a, choice: chosen.append(choice.chosen))
    net.eval()(images)
    assert not router.balance.any()
    net.train()(images)
    load_R = chosen[0].flatten().bincount(minlength=6).float()
    assert load_R.std() > 0
    assert torch.allclose(router.balance, -1e-3 * (load_R - load_R.mean()).sign())
    assert "model.blocks.0.mlp.router.balance" in net.state_dict()
    router.balance[:] = torch.tensor([-9.0, -9, 9, -9, -9, 9])
    net.eval()(images)
    assert set(chosen[-1].unique().tolist()) == {2, 5}


def test_a_training_step_stays_on_its_device(net, monkeypatch):
    """The meta device has no values to read back, and refuses tensors of another device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it has none
    net.to("meta").train()
    net(torch.empty(4, 1, 8, 8, device="meta")).sum().backward()
    assert net.layers()[0].router.balance.is_meta


def test_scales_and_rows_of_chosen_experts_learn_and_positions_are_not_decayed(net, images):
    net.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    _, plain = build_optimizer(net, Recipe()).param_groups
    assert any(parameter is net.model.pos_embed for parameter in plain["params"])


# -- counts --------------------------------------------------------------------------------------


def test_what_an_image_reads_is_the_union_over_its_tokens(net, images):
    assert isinstance(net, Dynamic)
    chosen = []
    for layer in net.layers():
        layer.router.register_forward_hook(lambda _m, _a, choice: chosen.append(choice.chosen))
    with torch.no_grad():
        logits, load = net.with_load(images)
    assert torch.equal(logits, net(images))
    assert load.choices.shape == (48, 12) and load.choices.dtype == torch.bool
    for image in range(48):
        unions = [set(layer.view(48, -1)[image].tolist()) for layer in chosen[:2]]
        for union, row in zip(unions, load.choices[image].split(6), strict=True):
            assert union == set(row.nonzero().flatten().tolist())
        unread = 12 - sum(map(len, unions))
        whole = sum(p.numel() for p in net.parameters())
        assert load.active_params[image] == whole - unread * EXPERT
    assert load.active_params.unique().numel() > 1


def test_loads_lie_within_the_bounds_and_multiply_adds_are_those_of_the_dense_share(net, images):
    _, load = net.with_load(images)
    least, most = net.bounds()["least"], net.bounds()["most"]
    assert most["active_params"] == sum(p.numel() for p in net.parameters())
    assert least["active_params"] == most["active_params"] - 2 * 4 * EXPERT
    assert (load.active_params >= least["active_params"]).all()
    assert (load.active_params <= most["active_params"]).all()
    dense_macs = cost(SPEC.build(), images[:1])["dense"]["macs"]
    saved = 4 * 8 * 2 * 16 - 6 * 16  # experts not computed, less the router; a token and layer
    assert least["macs"] == most["macs"] == dense_macs - 2 * 16 * saved
    assert load.macs.tolist() == [most["macs"]] * 48


def test_the_sketch_counts_what_carving_makes(net, task):
    counted = SYSTEM.count(task)
    assert counted["paths"] == net.bounds()
    assert counted["net"]["macs"] == counted["net"]["soft_macs"]
    assert counted["peer"]["name"] == "ffn-moe" and counted["peer"]["experts"] == 8
    assert counted["peer"]["active_params_per_token"] == net.bounds()["least"]["active_params"]
    assert counted["peer"]["ffn_share_per_token"] == 0.5


@pytest.mark.parametrize("params", [125_000, 140_000, 185_000])
def test_a_size_for_one_token_is_met_within_one_percent(params):
    task = find_task("cifar100-vit").with_settings(["model.depth=1"])
    fitted = FfnMoE().fitted(task, params)
    network = fitted.sketch(task)
    assert network.params_per_token == pytest.approx(params, rel=0.01)
    assert fitted.shared / fitted.experts == 1 / 8


@pytest.mark.parametrize("params", [300_000, 2_000_000])
def test_a_size_out_of_reach_changes_nothing(params):
    assert FfnMoE().fitted(find_task("cifar100-vit"), params) == FfnMoE()


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"markers": 1.0}, r"markers must be in \[0, 1\)"),
        ({"experts": 4, "shared": 2, "active": 3}, "from 1 to experts - shared"),
        ({"active": 0}, "from 1 to experts - shared"),
        ({"shared": -1}, "shared at least 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"balance_rate": -1.0}, "balance_rate at least 0"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        FfnMoE(**settings)


def test_experts_that_do_not_divide_the_hidden_width_are_refused_with_those_that_do(task):
    with pytest.raises(ConfigError, match=r"width of 64 .* 12 equal .* one of 4, 8, 16, 32, 64$"):
        FfnMoE(experts=12).check(task)


def test_a_network_without_feed_forward_layers_is_refused():
    with pytest.raises(ConfigError, match="ResNet of imagenet-resnet50 has none") as caught:
        FfnMoE().count(find_task("imagenet-resnet50"))
    assert "\n" not in str(caught.value)


# -- on the bench --------------------------------------------------------------------------------


def test_it_runs_on_the_bench_with_and_without_tuning(task, tmp_path):
    pytest.importorskip("sklearn")
    bench = Bench(chain=Chain(task, tmp_path, branching=False), folder=tmp_path / "row")
    plain = SYSTEM.changed({"tuned": False}).run(bench)
    assert (plain.recipe, plain.epochs, plain.mark) == (None, 1, "no fine-tuning")
    assert not any(layer.scale.any() for layer in plain.network.layers())
    tuned = SYSTEM.run(bench)
    assert (tuned.recipe, tuned.epochs, tuned.mark) == (task.finetune, 3, "")
    assert all(layer.scale.any() and layer.router.balance.any() for layer in tuned.network.layers())
    least = tuned.network.bounds()["least"]["active_params"]
    assert tuned.notes["active_params_per_token"] == least
    again = SYSTEM.run(bench).network  # reads the finished checkpoint
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), tuned.network(x))
