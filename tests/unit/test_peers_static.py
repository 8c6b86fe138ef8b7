"""Static pruning: which filters go, that they go without a trace, and the published counts."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from conftest import randomise
from sigmabranch.backbones import ResNetSpec
from sigmabranch.conversion import Shards
from sigmabranch.errors import ConfigError, MissingDependency
from sigmabranch.measure.cost import count_parameters
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.catalog import find_rows
from sigmabranch.peers.fpgm import Fpgm, filters_to_keep
from sigmabranch.peers.hrank import HRank, map_scores
from sigmabranch.peers.masking import MaskedNet, MaskingObjective
from sigmabranch.peers.torch_pruning import Magnitude, Taylor
from sigmabranch.tasks import Chain, Stopped, find_task
from sigmabranch.tasks.counting import example
from sigmabranch.training import LoaderBatches, Recipe, fit

counting = pytest.mark.skipif(find_spec("fvcore") is None, reason="fvcore is not installed")
pruning = pytest.mark.skipif(
    find_spec("torch_pruning") is None, reason="torch-pruning is not installed"
)

BOTTLENECK = ResNetSpec(
    layers=(1, 1, 2, 1),
    planes=(5, 6, 8, 12),
    strides=(1, 2, 1, 2),
    stem="cifar",
    stem_width=10,
    in_channels=1,
    classes=10,
)
# Its stem writes to the first stage's residual stream.
BASIC = replace(BOTTLENECK, block="basic", planes=(10, 12, 16, 20))
SYSTEMS = [
    Fpgm(convention="inner"),
    Fpgm(convention="official"),
    Fpgm(convention="coupled", norm_rate=0.2),
    HRank(rate=0.4),
    HRank(rate=0.4, convention="physical"),
]


def small_task(spec=BOTTLENECK):
    task = find_task("digits-resnet")
    return replace(
        task,
        model=spec,
        data=replace(task.data, train_limit=128, test_limit=64),
        dense=replace(task.dense, epochs=1, warmup_epochs=0.0),
        finetune=replace(task.finetune, epochs=2, warmup_epochs=0.0),
    )


def random_net(spec):
    return randomise(spec.build())


def kept_at_random(system, layout):
    draw = torch.Generator().manual_seed(1)
    return {
        group.name: torch.randperm(layout.size(group), generator=draw)[:count].sort().values
        for group, count in zip(layout.groups, system.counts(layout).values(), strict=True)
    }


def images(count=4):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    chain = Chain(small_task(), folder, device="cpu", branching=False)
    chain.dense()
    return Bench(chain=chain, folder=folder / "row")


# -- the rules -----------------------------------------------------------------------------------


def test_fpgm_removes_the_smallest_sums_of_distances():
    weight = torch.randn(11, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    rows = weight.flatten(1).double()
    sums = [sum(float((a - b).norm()) for b in rows) for a in rows]
    order = sorted(range(11), key=sums.__getitem__)
    assert filters_to_keep([weight], 0.4).tolist() == sorted(order[4:])


def test_fpgm_removes_the_first_of_equal_filters():
    weight = torch.ones(6, 4, 1, 1)
    assert filters_to_keep([weight], 0.5).tolist() == [3, 4, 5]


def test_fpgm_mix_removes_small_filters_before_central_ones():
    # Nearest to all others lie 0.9 and 1.0; 0.1 is the smallest.
    weight = torch.tensor([4.0, 0.1, 0.9, 1.0, -3.0]).view(5, 1, 1, 1)
    assert filters_to_keep([weight], 0.2).tolist() == [0, 1, 3, 4]
    assert filters_to_keep([weight], 0.0, norm_rate=0.2).tolist() == [0, 2, 3, 4]
    # Among 4, 0.9, 1 and -3 the two in the middle tie, and the first of them goes.
    assert filters_to_keep([weight], 0.2, norm_rate=0.2).tolist() == [0, 3, 4]


def test_ranks_are_those_of_torch_averaged_over_all_images():
    net, x = random_net(BOTTLENECK), images(40)
    seen = []
    hook = net.get_submodule("layer2.0.act1").register_forward_hook(
        lambda module, args, out: seen.append(out.detach().clone())
    )
    with torch.no_grad():
        net(x)
    hook.remove()
    scores = map_scores(net, x.split(15), ["layer2.0.act1"])["layer2.0.act1"]
    rank = torch.linalg.matrix_rank(seen[0]).double().mean(0)
    nuclear = torch.linalg.matrix_norm(seen[0], "nuc").double().mean(0)
    torch.testing.assert_close(scores, torch.stack([rank, nuclear]), rtol=1e-5, atol=1e-5)
    assert not net.training and not net.get_submodule("layer2.0.act1")._forward_hooks


def test_ranks_are_those_of_all_processes_together():
    net, x, paths = random_net(BOTTLENECK), images(40), ["act1", "layer2.0.act3"]
    alone = map_scores(net, [x], paths)
    theirs: list[torch.Tensor] = []

    def tell(tensor):
        theirs.append(tensor)
        return tensor

    map_scores(net, [x[25:]], paths, Shards(rank=1, world=2, sum=tell))
    told = iter(theirs)
    both = map_scores(
        net, [x[:25]], paths, Shards(rank=0, world=2, sum=lambda ours: ours + next(told))
    )
    for path in paths:
        torch.testing.assert_close(both[path], alone[path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convention", ["official", "physical"])
def test_hrank_removes_silent_filters_and_shares_the_map_behind_the_addition(convention):
    net = random_net(BOTTLENECK)
    with torch.no_grad():  # filters 1 and 4 of an inner layer and one of a stream say nothing
        net.get_parameter("layer2.0.bn1.weight")[[1, 4]] = 0
        net.get_parameter("layer2.0.bn1.bias")[[1, 4]] = -1
        for norm in ("bn3", "downsample.1"):
            net.get_parameter(f"layer1.0.{norm}.weight")[7] = 0
            net.get_parameter(f"layer1.0.{norm}.bias")[7] = 0
    system = HRank(rate=0.4, convention=convention)
    x = images(20)
    kept = system.chosen(net, system.layout(small_task()), [(x, torch.zeros(20))])
    assert not {1, 4} & set(kept["layer2.0.conv1"].tolist())
    # Of 6 filters 2.4 go, or 3.6 stay.
    assert len(kept["layer2.0.conv1"]) == {"official": 4, "physical": 3}[convention]
    assert 7 not in kept["layer1.0.conv3"].tolist()
    if convention == "official":
        assert torch.equal(kept["layer1.0.conv3"], kept["layer1.0.downsample.0"])


# -- the cut -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [BOTTLENECK, BASIC], ids=["bottleneck", "basic"])
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: f"{s.name}-{s.convention}")
def test_the_small_network_computes_what_the_masked_one_does(system, spec):
    layout, net = system.layout(small_task(spec)), random_net(spec)
    kept = kept_at_random(system, layout)
    masked = MaskedNet(copy.deepcopy(net), layout.groups).eval()
    masked.mask(kept)
    small, x = layout.cut(net, kept), images()
    with torch.no_grad():
        assert not torch.allclose(masked(x), net(x), atol=1e-2)
        torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(kept[name], found) for name, found in masked.kept().items())
    params = sum(parameter.numel() for parameter in small.parameters())
    assert params == layout.params(system.counts(layout)) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: f"{s.name}-{s.convention}")
def test_rate_zero_changes_nothing(system):
    settings = {"rate": 0.0} | ({"norm_rate": 0.0} if system.name == "fpgm" else {})
    system, net = system.changed(settings), random_net(BOTTLENECK)
    layout = system.layout(small_task())
    small = layout.cut(net, kept_at_random(system, layout))
    with torch.no_grad():
        torch.testing.assert_close(small(images()), net(images()), rtol=0, atol=1e-5)


def test_masked_filters_are_silent_and_get_no_gradient():
    system = Fpgm()
    layout = system.layout(small_task())
    net = MaskedNet(random_net(BOTTLENECK), layout.groups).train()
    net.mask({"layer1.0.conv1": torch.tensor([0, 2])})
    net(images(8)).square().sum().backward()
    conv, norm = net.network.get_submodule("layer1.0.conv1"), net.network.layer1[0].bn1
    gone = [1, 3, 4]
    assert not conv.weight[gone].any() and not conv.weight.grad[gone].any()
    assert not norm.weight.grad[gone].any() and not norm.bias.grad[gone].any()
    assert conv.weight.grad[[0, 2]].flatten(1).any(1).all() and norm.weight[gone].all()


# -- training ------------------------------------------------------------------------------------


def masked_training(folder, steps=None):
    """Train a tiny network under FPGM masks; returns it and the epochs that chose masks."""
    system, begun = Fpgm(rate=0.4), []
    layout = system.layout(small_task())
    net = MaskedNet(random_net(BOTTLENECK), layout.groups)
    recipe = Recipe(epochs=3, batch_size=8, lr=0.05, warmup_epochs=0.0, ema_decay=0.5)

    def choose(epoch):
        begun.append(epoch)
        return system.chosen(net.network, layout.groups)

    objective = MaskingObjective(net, recipe, periods=3, choose=choose)
    data = DataLoader(TensorDataset(images(32), torch.arange(32) % 10), 8, shuffle=True)
    left = iter(range(steps or 10**6))
    stop = lambda: next(left, None) is None  # noqa: E731 (counts the steps)
    fit(net, objective, LoaderBatches(data, seed=3), recipe, folder=folder, stop=stop)
    return net, begun


def test_masks_are_chosen_at_every_epoch_and_survive_a_resume(tmp_path):
    whole, begun = masked_training(tmp_path / "whole")
    assert begun == [0, 1, 2] and int(whole.period) == 2
    _, first = masked_training(tmp_path / "parts", steps=5)
    resumed, rest = masked_training(tmp_path / "parts")
    assert (first, rest) == ([0, 1], [2])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def trained_nets(monkeypatch):
    """The networks that systems hand to ``Bench.train``, as they are after it."""
    seen, train = [], Bench.train

    def spy(self, network, *args, **options):
        train(self, network, *args, **options)
        seen.append(network)

    monkeypatch.setattr(Bench, "train", spy)
    return seen


@pytest.mark.parametrize(
    "system",
    [Fpgm(convention="official"), HRank(rate=0.4, mode="progressive", samples=32)],
    ids=["fpgm", "hrank"],
)
def test_what_was_trained_under_masks_is_the_small_network(system, bench, monkeypatch):
    seen = trained_nets(monkeypatch)
    trained = system.run(replace(bench, folder=bench.folder / system.name))
    masked, x = seen[0], images()
    with torch.no_grad():
        torch.testing.assert_close(trained.network(x), masked(x), rtol=1e-4, atol=1e-4)
    shapes = {name: p.shape for name, p in system.sketch(bench.task).named_parameters()}
    assert shapes == {name: p.shape for name, p in trained.network.named_parameters()}
    assert trained.recipe == bench.recipe and not trained.mark


def test_progressive_masks_grow_from_the_stem_to_the_last_block(bench, monkeypatch):
    masked = []
    mask = MaskedNet.mask
    monkeypatch.setattr(
        MaskedNet, "mask", lambda net, kept: (masked.append(set(kept)), mask(net, kept))
    )
    system = HRank(rate=0.4, mode="progressive", samples=16)
    # Four steps for six turns: one step begins two, and the last turn comes after training.
    system.run(replace(bench, folder=bench.folder / "growing"))
    assert masked[0] == {"conv1"} and len(masked) == 5
    in_order = [name for names in masked for name in sorted(names)]
    assert in_order == [group.name for group in system.layout(bench.task).groups]


def test_a_resumed_run_leaves_alone_what_was_masked(bench, tmp_path, monkeypatch):
    """Ranks taken again on an accelerator may put another filter last."""
    system = HRank(rate=0.4, mode="progressive", samples=16)
    chain = Chain(bench.task, bench.chain.folder, device="cpu", branching=False, max_minutes=0)
    with pytest.raises(Stopped):
        system.run(Bench(chain=chain, folder=tmp_path))
    chosen = HRank.chosen
    seen = []

    def other(self, network, layout, *rest):
        seen.append(chosen(self, network, layout, *rest))
        sizes = {group.name: layout.size(group) for group in layout.groups}
        return {name: torch.arange(sizes[name])[-len(kept) :] for name, kept in seen[-1].items()}

    monkeypatch.setattr(HRank, "chosen", other)
    masked = trained_nets(monkeypatch)
    small = system.run(replace(bench, folder=tmp_path)).network
    kept = masked[0].kept()
    assert torch.equal(kept["conv1"], seen[0]["conv1"])
    assert not torch.equal(kept["conv1"], torch.arange(4, 10))
    assert kept["layer4.0.conv1"].tolist() == list(range(4, 12))
    assert small.get_submodule("conv1").out_channels == len(kept["conv1"])


@pytest.mark.parametrize(
    "system",
    [
        HRank(rate=0.4, samples=32),
        pytest.param(Magnitude(rate=0.4), marks=pruning),
        pytest.param(Taylor(rate=0.4), marks=pruning),
    ],
    ids=lambda s: s.name,
)
def test_oneshot_systems_train_the_network_that_was_counted(system, bench):
    trained = system.run(replace(bench, folder=bench.folder / f"{system.name}-oneshot"))
    shapes = {name: p.shape for name, p in system.sketch(bench.task).named_parameters()}
    assert shapes == {name: p.shape for name, p in trained.network.named_parameters()}
    assert trained.epochs == 3 and not trained.network.training
    assert trained.network(images()).isfinite().all()


@pruning
@pytest.mark.parametrize("kind", [Magnitude, Taylor])
def test_torch_pruning_at_rate_zero_keeps_the_dense_logits(kind, bench):
    small, x = kind(rate=0.0).pruned(bench), images()
    with torch.no_grad():
        torch.testing.assert_close(small(x), bench.dense()(x), rtol=0, atol=1e-5)
    assert all(parameter.grad is None for parameter in small.parameters())


@pruning
def test_torch_pruning_keeps_the_channels_of_largest_norm(bench, monkeypatch):
    dense = random_net(BOTTLENECK)
    with torch.no_grad():
        dense.get_parameter("layer3.1.conv1.weight")[[0, 5]] *= 1e-3
        dense.get_parameter("layer3.1.bn1.weight")[[0, 5]] *= 1e-3
        dense.get_parameter("layer3.1.conv2.weight")[:, [0, 5]] *= 1e-3
    monkeypatch.setattr(Bench, "dense", lambda self: copy.deepcopy(dense))
    small = Magnitude(rate=0.25).pruned(bench)
    norm = dense.get_submodule("layer3.1.bn1").running_mean
    kept = norm[[1, 2, 3, 4, 6, 7]]
    assert torch.equal(small.get_submodule("layer3.1.bn1").running_mean, kept)


# -- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "params", "products"),
    [
        # Published: 16.96 M (14.57 M at 0.4), and 15.89 M counted as the authors' script prunes.
        (Fpgm(rate=0.3), 16_959_305, 2.622e9),
        (Fpgm(rate=0.4), 14_570_511, 2.201e9),
        (Fpgm(rate=0.3, convention="official"), 15_886_704, 2.396e9),
        # Published: 13.77 M.
        (HRank(convention="literal"), 13_774_001, 1.528e9),
        # What the authors' masks leave; no paper prints it.
        (HRank(), 9_840_341, 0.98662e9),
    ],
    ids=["fpgm-inner", "fpgm-inner-40", "fpgm-official", "hrank-literal", "hrank-official"],
)
def test_sizes_of_resnet50_are_those_published(system, params, products):
    task = find_task("imagenet-resnet50")
    layout, network = system.layout(task), system.sketch(task).to("meta")
    assert layout.params(system.counts(layout)) == count_parameters([network]) == params
    with FlopCounterMode(display=False) as counter:
        network.eval()(example(task).to("meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(products, rel=1e-3)


@counting
def test_the_literal_count_of_hrank_is_the_one_published():
    """1.55 G, batch norms included."""
    counted = HRank(convention="literal").count(find_task("imagenet-resnet50"))
    assert counted["net"]["macs"] == pytest.approx(1.55e9, rel=3e-3)
    assert "no network" in counted["peer"]["literal"]


def test_the_script_of_fpgm_saves_what_is_published():
    task, system = find_task("imagenet-resnet50"), Fpgm(rate=0.3, convention="official")
    found = system.details(nn.Identity(), task)
    assert found["script_flops_reduction_percent"] == pytest.approx(42.2, abs=0.05)
    assert "script_flops_reduction_percent" not in Fpgm().details(nn.Identity(), task)


@pytest.mark.parametrize(
    ("system", "target"),
    [
        (Fpgm(), 17_500_000),
        (HRank(), 10_336_000),
        pytest.param(Magnitude(), 10_336_000, marks=pruning),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_fitted_hits_the_size_within_one_percent(system, target):
    task = find_task("imagenet-resnet50")
    fitted = system.fitted(task, target)
    layout = fitted.layout(task)
    assert layout.params(fitted.counts(layout)) == pytest.approx(target, rel=0.01)
    assert replace(fitted, rate=system.rate) == system


def test_fitted_says_what_is_too_small():
    with pytest.raises(ConfigError, match=r"fpgm cannot make .* as small as 1,000 parameters"):
        Fpgm().fitted(small_task(), 1000)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [Fpgm(), HRank(rate=0.3), Magnitude(), Taylor()])
def test_networks_other_than_resnets_are_refused(system):
    with pytest.raises(ConfigError, match=f"{system.name} prunes ResNets"):
        system.check(find_task("shapes-pointnet2"))


@pytest.mark.parametrize(
    ("system", "layer"),
    [
        (Fpgm(rate=0.6, norm_rate=0.6), "layer1.0.conv1 with its 5"),
        # 10 times 0.09999999999999998
        (HRank(rate=0.9, convention="physical"), "conv1 with its 10"),
        (Magnitude(rate=0.85), "layer1.0.conv1 with its 5"),
    ],
)
def test_a_rate_that_empties_a_layer_is_refused_by_name(system, layer):
    with pytest.raises(ConfigError, match=f"nothing of {layer} filters"):
        system.check(small_task())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Fpgm, {"rate": 1.0}, r"fpgm rate must be in \[0, 1\)"),
        (Fpgm, {"convention": "mine"}, "choose one of inner, official, coupled"),
        (HRank, {"rates": 44}, "44 are not published"),
        (HRank, {"mode": "both"}, "choose one of progressive, oneshot"),
        (HRank, {"convention": "mine"}, "choose one of official, physical, literal"),
        (HRank, {"samples": 0}, "at least 1"),
        (Taylor, {"rate": -0.1}, r"taylor rate must be in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind().changed(settings)


def test_without_torch_pruning_its_rows_are_left_out_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingDependency, match=r"torch-pruning.*\[peers\]"):
        Magnitude().check(small_task())
    with pytest.raises(MissingDependency):
        find_rows(small_task(), ["taylor"], {})


def test_published_rates_need_as_many_stages():
    spec = replace(BOTTLENECK, layers=(1, 1), planes=(8, 8), strides=(1, 2))
    with pytest.raises(ConfigError, match=r"for 4 stages, and the network of .* has 2"):
        HRank().check(small_task(spec))


def test_the_literal_count_cannot_be_run(bench):
    with pytest.raises(ConfigError, match="convention=official or convention=physical"):
        HRank(rate=0.3, convention="literal").run(bench)


def test_the_cut_network_names_no_skeleton_that_it_does_not_fit():
    system, net = Fpgm(), random_net(BOTTLENECK)
    layout = system.layout(small_task())
    small = layout.cut(net, kept_at_random(system, layout))
    assert not hasattr(small, "skeleton_source") and hasattr(net, "skeleton_source")
    assert isinstance(net, nn.Module)
