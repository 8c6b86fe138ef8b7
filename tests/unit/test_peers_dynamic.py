"""SkipNet and DeepMoE: what gates leave out, what that costs, and how they are trained."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import CLASSES, randomise
from sigmabranch.backbones import ResNet, ResNetSpec
from sigmabranch.errors import ConfigError
from sigmabranch.measure import Dynamic, cost, module_costs
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.deepmoe import DeepMoE, SparseObjective
from sigmabranch.peers.expert_resnet import ExpertResNet
from sigmabranch.peers.gated_resnet import Gated, GatedResNet
from sigmabranch.peers.phases import phases
from sigmabranch.peers.skipnet import (
    PRICE_STEP,
    HybridObjective,
    RateObjective,
    SkipNet,
    returns,
    settle,
)
from sigmabranch.tasks import Chain, Stopped, find_task
from sigmabranch.training import DenseObjective

pytest.importorskip("fvcore")

TINY = (
    "model.layers=[1,1,1]", "model.planes=[2,3,4]", "model.strides=[1,2,1]", "model.stem_width=4",
    "tree.projection_dim=4", "data.train_limit=64", "data.test_limit=40", "dense.epochs=1",
    "dense.batch_size=32", "finetune.epochs=2", "finetune.batch_size=32",
)  # fmt: skip


@pytest.fixture(scope="module")
def task():
    pytest.importorskip("sklearn")
    return find_task("digits-resnet").with_settings(TINY)


@pytest.fixture(scope="module")
def basic():
    """A ResNet of basic blocks, with a projection in the second stage."""
    spec = ResNetSpec(
        block="basic", layers=(2, 2), planes=(8, 12), strides=(1, 2), stem="cifar", stem_width=8,
        in_channels=1, classes=CLASSES,
    )  # fmt: skip
    return randomise(ResNet(spec))


@pytest.fixture(scope="module")
def images(batches):
    return batches[0][0]


def skipping(dense, gate="recurrent"):
    """A gated network whose gates disagree among inputs: random, sharp and centred."""
    return copy.deepcopy(_skipping(dense, gate))


@cache
def _skipping(dense, gate):
    network = GatedResNet(copy.deepcopy(dense), torch.zeros(1, 1, 8, 8), gate)
    randomise(network.gates)
    network.temperature = 0.1
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.handicap.copy_(0.1 * network.eval().gated(x).gate_logits.median())
    return network


def expert(dense, variant="A"):
    """A gated network with about half of its gates open."""
    return copy.deepcopy(_expert(dense, variant))


@cache
def _expert(dense, variant):
    network = ExpertResNet(copy.deepcopy(dense), torch.zeros(1, 1, 8, 8), variant)
    randomise(network.embedding)
    nn.init.normal_(network.heads.weight, std=0.5, generator=torch.Generator().manual_seed(2))
    return network.eval()


NETWORKS = {
    "recurrent": ("dense", skipping),
    "feedforward1": ("basic", lambda dense: skipping(dense, "feedforward1")),
    "feedforward2": ("basic", lambda dense: skipping(dense, "feedforward2")),
    "A": ("dense", expert),
    "B": ("dense", lambda dense: expert(dense, "B")),
    "A basic": ("basic", expert),
}


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request):
    """(dense network, gated network); neither is changed."""
    source, gated = NETWORKS[request.param]
    dense = request.getfixturevalue(source)
    return dense, gated(dense)


@pytest.fixture(scope="module")
def network(pair):
    return pair[1]


# -- what holds for both -------------------------------------------------------------------------


def test_with_all_gates_open_the_logits_are_the_dense_networks(pair, images):
    source, network = pair
    with torch.no_grad():
        expected, closed = source(images), network(images)
        assert torch.allclose(network.opened()(images), expected, atol=1e-5)
    assert not torch.allclose(closed, expected, atol=1e-2)


def test_one_input_alone_gets_the_logits_and_load_that_it_gets_in_a_batch(network, images):
    with torch.no_grad():
        logits, load = network.with_load(images)
        for number in range(4):
            alone, own = network.with_load(images[number : number + 1])
            assert torch.allclose(alone[0], logits[number], atol=1e-4)
            assert torch.equal(own.choices[0], load.choices[number])
            assert own.active_params == load.active_params[number]
            assert own.macs == load.macs[number]
    assert len(load.active_params.unique()) > 1


def test_one_input_alone_computes_the_products_that_its_load_says(network, images):
    """Against torch's own counter, which sees what really runs; norms and pooling are not in it."""
    skipped = []
    with torch.no_grad():
        for x in images[:6].split(1):
            _, load = network.with_load(x)
            with FlopCounterMode(display=False) as counter:
                network(x)
            skipped.append((int(load.macs), counter.get_total_flops() // 2))
    most = network.bounds()["most"]["macs"]
    net = cost(network.opened(), images[:1], dense=network.opened())["net"]
    assert net["macs"] == net["soft_macs"] == most
    assert net["active_params"] == net["total_params"]
    whole = net["macs_flop_counter"]
    assert any(products < whole for _, products in skipped)
    for macs, products in skipped:
        # The rest, norms at 2 per element, shrinks along with the products.
        assert 0 <= (most - macs) - (whole - products) <= most - whole


def test_load_lies_between_the_bounds_and_the_most_is_everything(network, images):
    with torch.no_grad():
        _, load = network.with_load(images)
    bounds = network.bounds()
    params, macs = module_costs(network, images[:1])[""]
    assert bounds["most"] == {"active_params": params, "macs": macs}
    assert bounds["least"]["active_params"] <= int(load.active_params.min())
    assert int(load.active_params.max()) <= params
    assert bounds["least"]["macs"] <= int(load.macs.min())
    assert isinstance(network, Dynamic)


@pytest.mark.parametrize("system", [SkipNet(mode="rate"), DeepMoE()], ids=lambda s: s.name)
def test_fitted_makes_the_expected_size_the_wanted_one(system, task):
    least, most = (ends["active_params"] for ends in system.sketch(task).bounds().values())
    wanted = round(0.6 * least + 0.4 * most)
    fitted = system.fitted(task, wanted)
    if isinstance(fitted, SkipNet):
        expected = least + fitted.target * (most - least)
    else:
        linear, square = fitted.sketch(task).growth()
        expected = least + linear * fitted.target + square * fitted.target**2
        assert least + linear + square == most
    assert expected == pytest.approx(wanted, rel=1e-6)
    assert system.fitted(task, 2 * most).target == 1.0
    with pytest.raises(ConfigError, match=f"{least:,}"):
        system.fitted(task, least)


@pytest.mark.parametrize(
    ("system", "settings", "message"),
    [
        (SkipNet, {"gate": "lstm"}, "recurrent, feedforward1, feedforward2"),
        (SkipNet, {"mode": "soft"}, "supervised, hybrid, rate"),
        (SkipNet, {"target": 0.0}, "target"),
        (SkipNet, {"temperature": 0.0}, "temperature"),
        (SkipNet, {"rl_weight": -1.0}, "rl_weight"),
        (SkipNet, {"rate_weight": math.nan}, "rate_weight"),
        (DeepMoE, {"variant": "C"}, "A, B"),
        (DeepMoE, {"target": 1.5}, "target"),
        (DeepMoE, {"sparsity": -1.0}, "sparsity"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(system, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        system().changed(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("system", [SkipNet(), DeepMoE()], ids=lambda s: s.name)
def test_a_network_without_residual_blocks_is_refused(system):
    with pytest.raises(ConfigError, match="residual blocks"):
        system.check(find_task("modelnet40-pointnet2"))


@pytest.mark.parametrize("system", [SkipNet(mode="hybrid"), DeepMoE()], ids=lambda s: s.name)
def test_two_trainings_need_two_epochs(system, task):
    with pytest.raises(ConfigError, match=r"finetune\.epochs"):
        system.check(task.with_settings(["finetune.epochs=1"]))


def test_two_phases_share_the_epochs_and_the_warm_up(task):
    recipe = replace(task.finetune, epochs=10, warmup_epochs=2.0)
    first, last = phases(recipe)
    assert (first.epochs, last.epochs) == (6, 4)
    assert (first.warmup_epochs, last.warmup_epochs) == pytest.approx((1.2, 0.8))


# -- SkipNet -------------------------------------------------------------------------------------


def test_a_closed_gate_leaves_the_shortcut(basic, images):
    """The last block has no projection, so the head sees what came before it."""
    network = skipping(basic)
    network.handicap.fill_(99.0)
    with torch.no_grad():
        first = basic.layer1[0](basic.act1(basic.bn1(basic.conv1(images))))
        expected = basic.fc(basic.global_pool(basic.layer2[0].downsample(first)))
        logits, load = network.with_load(images)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert not load.choices.any()
    assert set(load.active_params.tolist()) == {network.bounds()["least"]["active_params"]}


def test_the_price_of_a_gate_is_its_block_without_the_shortcut(dense):
    network = skipping(dense)
    blocks = [block for name in ("layer1", "layer2", "layer3", "layer4")
              for block in getattr(dense, name)][1:]  # fmt: skip
    inner = [
        sum(p.numel() for name, p in block.named_parameters() if "downsample" not in name)
        for block in blocks
    ]
    assert network.block_params_G.tolist() == inner


def test_returns_are_the_skips_from_each_gate_on_and_the_answer():
    found = returns(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([3.0]), 0.3)
    assert torch.allclose(found, torch.tensor([[-0.1, -0.1, -0.2]]))


@pytest.mark.parametrize("sampling", ["threshold", "bernoulli", "gumbel"])
def test_gates_learn_through_the_loss_unless_actions_are_drawn(dense, images, sampling):
    network = skipping(dense).train()
    network.sampling = sampling
    gated = network.gated(images)
    assert set(gated.open.unique().tolist()) <= {0.0, 1.0}
    gated.logits.square().sum().backward()
    weight = network.gates.output.weight
    assert (weight.grad is None) == (sampling == "bernoulli")


def test_reinforce_moves_the_gates_and_the_reward_closes_them(dense, batches, task):
    x, y = batches[0]
    network = skipping(dense).train()
    network.sampling = "bernoulli"
    system = SkipNet(mode="hybrid", reward=100.0, rl_weight=1.0)
    objective = HybridObjective(task.finetune, None, replace(system))
    torch.manual_seed(0)
    for _ in range(20):
        network.zero_grad()
        objective(_entry(network), x, torch.zeros_like(y), 0.0).loss.backward()
        bias = network.gates.output.bias
        bias.data -= 0.01 * bias.grad.sign()
    assert bias.item() < 0


def test_the_rate_penalty_opens_gates_below_the_target_and_closes_those_above(dense, batches, task):
    for target, sign in ((1.0, -1.0), (0.01, 1.0)):
        network = skipping(dense).train()
        network.sampling = "gumbel"
        system = SkipNet(mode="rate", target=target, rate_weight=1e4)
        objective = RateObjective(task.finetune, None, system, network)
        objective(_entry(network), *batches[0], 0.25).loss.backward()
        assert float(network.gates.output.bias.grad) * sign > 0
        assert float(network.noise) == 0.75


def test_reading_has_a_price_by_the_parameter_that_rises_above_the_target_and_falls_below(
    dense, batches, task
):
    x, y = batches[0]
    network = skipping(dense).train()
    logits = torch.zeros(len(y), CLASSES, requires_grad=True)
    for target, sign in ((0.01, 1), (1.0, -1)):
        open_BG = torch.full((len(y), len(network.block_params_G)), 0.5, requires_grad=True)
        system = SkipNet(mode="rate", target=target, rate_weight=0.0)
        objective = RateObjective(task.finetune, None, system, network)
        network.price.fill_(2.0)
        objective(
            lambda _, opened=open_BG: Gated(logits, opened, opened), x, y, 0.0
        ).loss.backward()
        expected_G = 2.0 * network.block_params_G / network.block_params_G.sum() / len(y)
        assert torch.allclose(open_BG.grad, expected_G.expand_as(open_BG))
        assert float(network.price) == pytest.approx(2.0 + sign * PRICE_STEP)
    assert {"price", "handicap"} <= network.state_dict().keys()


def test_the_penalty_is_a_mean_over_gates(dense, batches, task):
    x, y = batches[0]
    network, logits = skipping(dense).train(), torch.zeros(len(y), CLASSES)
    open_BG = torch.rand(len(y), len(network.block_params_G))
    losses = []
    for weight in (0.0, 1.0):
        system = SkipNet(mode="rate", target=0.25, rate_weight=weight)
        objective = RateObjective(task.finetune, None, system, network)
        network.price.zero_()
        losses.append(objective(lambda _: Gated(logits, open_BG, open_BG), x, y, 0.0).loss)
    away = (open_BG.mean(0) - 0.25).square().mean()
    torch.testing.assert_close(losses[1] - losses[0], away)


def test_a_size_is_met_by_a_price_and_no_gate_has_a_rate_of_its_own():
    task = find_task("cifar100-small")
    system = SkipNet().fitted(task, 229_836)
    assert (system.mode, system.rate_weight) == ("rate", 0.0)
    limits = system.sketch(task).bounds()
    least, most = (limits[end]["active_params"] for end in ("least", "most"))
    assert least + system.target * (most - least) == pytest.approx(229_836, abs=1)


# -- DeepMoE -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["A", "B"])
def test_training_begins_at_the_source_network(dense, images, variant):
    network = ExpertResNet(copy.deepcopy(dense), torch.zeros(1, 1, 8, 8), variant).eval()
    network.classify_embedding(CLASSES)
    chosen = network.gated(images)
    torch.testing.assert_close(chosen.logits, dense(images), rtol=1e-5, atol=1e-5)
    chosen.logits.square().sum().backward()
    assert (network.heads.weight.grad.abs().sum(1) > 0).float().mean() > 0.5  # gates can move


def test_a_load_is_what_the_open_channels_read(dense, images):
    """Bottleneck A: C_in·m1 + 9·m1·m2 + m2·C_out, and two norm rows for each open channel."""
    network = expert(dense)
    with torch.no_grad():
        _, load = network.with_load(images[:4])
    open_BL = torch.stack([part.sum(1) for part in load.choices.split(network.widths, 1)], 1)
    always = network.bounds()["least"]["active_params"]
    for row, params in zip(open_BL.tolist(), load.active_params.tolist(), strict=True):
        own = 0
        for block, m1, m2 in zip(network.blocks, row[::2], row[1::2], strict=True):
            inputs, outputs = block.units[0].conv.in_channels, block.units[2].conv.out_channels
            own += inputs * m1 + 9 * m1 * m2 + m2 * outputs + 2 * (m1 + m2)
        assert params == always + own


@pytest.mark.parametrize("closed", ["all", "first of each block"])
def test_a_convolution_may_lose_all_its_channels(dense, images, closed):
    network = expert(dense)
    rows = network.heads.weight.data.split(network.widths)
    for row in rows if closed == "all" else rows[::2]:
        row.fill_(-1.0)
    with torch.no_grad():
        logits, _ = network.with_load(images[:2])
        alone, load = network.with_load(images[:1])
    assert torch.allclose(alone[0], logits[0], atol=1e-4)
    least = network.bounds()["least"]["active_params"]
    assert (int(load.active_params) == least) == (closed == "all")


def test_frozen_gates_stay_while_the_network_trains(dense, batches, task):
    network = expert(dense)
    network.classify_embedding(CLASSES)
    network.freeze_gates()
    network.train()
    x, y = batches[0]
    before = network.gated(x).gate_logits
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    DenseObjective(task.finetune)(network, x, y, 0.0).loss.backward()
    optimizer.step()
    assert torch.equal(network.gated(x).gate_logits, before)
    assert network.classifier is None
    assert all(p.grad is None for p in network.heads.parameters())
    assert network.blocks[0].units[0].conv.weight.grad is not None


def test_the_target_moves_heads_alone_and_towards_it(dense, batches, task):
    x = batches[0][0]
    for target, sign in ((1.0, -1.0), (0.01, 1.0)):
        network = expert(dense).train()
        network.classify_embedding(CLASSES)
        system = DeepMoE(target=target, target_weight=1e4, embedding_weight=0.0)
        objective = SparseObjective(task.finetune, None, system, network.widths)
        chosen = network.gated(x)
        objective._penalty(chosen).backward()
        assert float(network.heads.weight.grad.sum()) * sign > 0
        assert all(p.grad is None for p in network.embedding.parameters())


def test_sparsity_warms_up(dense, batches, task):
    network = expert(dense)
    network.classify_embedding(CLASSES)
    objective = SparseObjective(task.finetune, None, DeepMoE(sparsity=1.0), network.widths)
    losses = [
        objective(_entry(network), *batches[0], progress).loss.item()
        for progress in (0.0, 0.1, 0.2, 0.9)
    ]
    assert losses[1] - losses[0] == pytest.approx((losses[2] - losses[0]) / 2, rel=1e-4)
    assert losses[3] == pytest.approx(losses[2])


# -- training ------------------------------------------------------------------------------------

SYSTEMS = {
    "supervised": SkipNet(),
    "hybrid": SkipNet(mode="hybrid"),
    "rate": SkipNet(mode="rate"),
    "deepmoe": DeepMoE(target=0.5),
}


@pytest.fixture(scope="module")
def chain(task, tmp_path_factory):
    chain = Chain(task, tmp_path_factory.mktemp("chain"), device="cpu")
    chain.dense()
    return chain


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_a_run_that_is_stopped_twice_ends_with_the_same_network(
    system, chain, tmp_path, monkeypatch
):
    trained = system.run(Bench(chain=chain, folder=tmp_path / "whole"))
    bench = Bench(chain=chain, folder=tmp_path / "parts")
    assert trained.epochs == bench.epochs
    assert bool(trained.mark) == (trained.recipe != bench.recipe)
    x = bench.chain.dataset.test.batches(torch.arange(4), 4)
    with torch.no_grad():
        logits, _ = trained.network.with_load(next(iter(x))[0])
    assert logits.isfinite().all()
    assert not trained.network.training
    assert trained.counted.bounds() == system.sketch(chain.task).bounds()
    with monkeypatch.context() as late:
        late.setattr(chain, "deadline", 0.0)
        for _ in range(2):
            with pytest.raises(Stopped):
                system.run(bench)
    again = system.run(bench).network.state_dict()
    for name, value in trained.network.state_dict().items():
        assert torch.equal(value, again[name]), name


def test_settling_meets_the_share_of_parameters_on_training_images(chain, tmp_path):
    network = skipping(chain.dense())
    ends = [network.bounds()[end]["active_params"] for end in ("least", "most")]
    for wanted in (0.3, 0.8):
        settle(network, Bench(chain=chain, folder=tmp_path), wanted)
        x = torch.cat([x for x, _ in chain.calibration()])
        with torch.no_grad():
            _, load = network.with_load(x)
        read = (load.active_params.double().mean() - ends[0]) / (ends[1] - ends[0])
        assert float(read) == pytest.approx(wanted, abs=1 / len(x))


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_a_training_step_stays_on_its_device(system, dense, task, monkeypatch):
    """The meta device has no values to read back, and refuses tensors of another device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it has none
    if isinstance(system, SkipNet):
        network = skipping(dense).to("meta").train()
        network.sampling = {"hybrid": "bernoulli", "rate": "gumbel"}.get(system.mode, "threshold")
        objective = {
            "supervised": lambda: DenseObjective(task.finetune),
            "hybrid": lambda: HybridObjective(task.finetune, None, system),
            "rate": lambda: RateObjective(task.finetune, None, system, network),
        }[system.mode]()
    else:
        network = expert(dense)
        network.classify_embedding(CLASSES)
        network.to("meta").train()
        objective = SparseObjective(task.finetune, None, system, network.widths)
    x, y = torch.empty(4, 1, 8, 8, device="meta"), torch.empty(4, device="meta").long()
    model = network if objective.entry == "forward" else _entry(network)
    output = objective(model, x, y, 0.5)
    output.loss.backward()
    assert all(value.is_meta for value in output.metrics.values())
    logits, load = network.eval().with_load(x)
    assert all(part.is_meta for part in (logits, *load))


def test_count_names_what_only_the_system_has(task):
    counted = SkipNet().count(task)["peer"]
    assert (counted["gates"], counted["lstm_params"]) == (2, 880)
    assert len(counted["block_params"]) == len(counted["block_macs"]) == 2
    counted = DeepMoE().count(task)["peer"]
    gates = 2 * (2 + 3 + 4)
    assert (counted["gated_convolutions"], counted["gates"]) == (6, gates)
    assert counted["head_params"] == gates * 16


def _entry(network):
    """What the learner hands an objective: a call goes to the entry."""

    class Entry(nn.Module):
        def forward(self, x):
            return network.gated(x)

    return Entry()
