"""Budgets: what is solved by counting is what is built, and it spends what it may."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sigmabranch as sb
from conftest import randomise
from sigmabranch.backbones import ConvNeXtSpec, PointNet2Spec, ResNetSpec, ViTSpec, as_backbone
from sigmabranch.backbones.timm import create_timm
from sigmabranch.conversion import Budget, blueprint, plan_budget
from sigmabranch.errors import ConfigError, ConversionError
from sigmabranch.measure import count_parameters
from sigmabranch.tree import TreeSpec

NETWORKS = {
    "bottlenecks": (
        ResNetSpec(layers=(1, 2, 1), planes=(8, 16, 24), strides=(1, 2, 2), stem="cifar",
                   stem_width=8, in_channels=1, classes=5),
        (1, 16, 16),
    ),
    "convnext": (
        ConvNeXtSpec(layers=(1, 1, 2), widths=(16, 24, 40), strides=(1, 2, 2), patch=2, kernel=3,
                     in_channels=1, classes=5),
        (1, 16, 16),
    ),
    "vit": (
        ViTSpec(image_size=16, patch=4, width=32, depth=6, heads=8, in_channels=1, classes=5),
        (1, 16, 16),
    ),
    "points": (
        PointNet2Spec(centroids=(16, 8), neighbours=(4, 4), widths=((8, 12), (16, 24), (32, 48)),
                      connected=(40, 24), classes=5),
        (24, 3),
    ),
}  # fmt: skip
UNEVEN = ((0,), (1, 0), (1, 1))


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    spec, shape = NETWORKS[request.param]
    return randomise(spec.build()).eval(), torch.randn(1, *shape)


def built(model, x, tree) -> tuple[int, int]:
    """Parameters of the longest path and of the whole, of a network that was really built."""
    net = blueprint(model, x, tree)
    paths = [count_parameters([net.path(leaf)]) for leaf in net.tree.leaves]
    return max(paths), count_parameters([net])


@pytest.mark.parametrize("share", ["45%", "70%"])
def test_a_budget_is_hit_from_below_and_what_was_counted_is_built(network, share):
    model, x = network
    plan = plan_budget(model, x, share, TreeSpec(projection_dim=8))
    assert 0.98 <= plan.spent <= 1
    for candidate in plan.candidates[:3]:
        counted = candidate.sizes.active_params, candidate.sizes.total_params
        assert counted == built(model, x, candidate.tree)


class Dense(nn.Module):
    """Layers that add to what they read, and one that reads a part twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 7, 3, padding=1), nn.Conv2d(23, 9, 1)
        self.third, self.norm = nn.Conv2d(16, 12, 1), nn.BatchNorm2d(44)
        self.last = nn.Conv2d(44, 24, 1)

    def forward(self, x):
        a = self.first(x).relu()
        b = self.second(torch.cat([x, a], 1)).relu()
        c = self.third(torch.cat([a, b], 1)).relu()
        return self.last(self.norm(torch.cat([x, c, a, b], 1)))


def test_what_several_layers_make_for_one_reader_is_counted_layer_by_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), Dense(), nn.Conv2d(24, 16, 1), Dense(), nn.Conv2d(24, 32, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    model, x = randomise(model).eval(), torch.randn(1, 3, 8, 8)
    tree = TreeSpec.balanced(1, projection_dim=4)
    for candidate in plan_budget(model, x, "70%", tree).candidates:
        counted = candidate.sizes.active_params, candidate.sizes.total_params
        assert counted == built(model, x, candidate.tree), candidate.tree.cuts


@pytest.mark.parametrize("entry", ["inner", "gather"])
@pytest.mark.parametrize("leaves", [UNEVEN, ((0,), (1,), (2,))], ids=["uneven", "ternary"])
def test_other_entries_and_shapes_are_counted_as_they_are_built(entry, leaves):
    spec, shape = NETWORKS["vit"]
    model, x = spec.build().eval(), torch.zeros(1, *shape)
    tree = TreeSpec(projection_dim=8, entry=entry, leaves=leaves)
    plan = plan_budget(model, x, "60%", tree)
    assert plan.tree.leaves == leaves and 0.98 <= plan.spent <= 1
    for candidate in plan.candidates[:5]:
        counted = candidate.sizes.active_params, candidate.sizes.total_params
        assert counted == built(model, x, candidate.tree), candidate.tree.cuts


@pytest.mark.parametrize("trunk_share", [None, 0.5])
@pytest.mark.parametrize("after", ["conv1", "layer1"])
def test_routers_that_decide_early_are_counted_as_they_are_built(after, trunk_share):
    spec, shape = NETWORKS["bottlenecks"]
    model, x = spec.build().eval(), torch.zeros(1, *shape)
    tree = TreeSpec(projection_dim=64, decide_after=after, trunk_share=trunk_share)
    for candidate in plan_budget(model, x, "60%", tree).candidates:
        counted = candidate.sizes.active_params, candidate.sizes.total_params
        assert counted == built(model, x, candidate.tree), candidate.tree.cuts
    with pytest.raises(ConversionError, match="decide_after='fc' is no module of the trunk"):
        plan_budget(model, x, "60%", TreeSpec(decide_after="fc"))


@settings(max_examples=6, deadline=None)
@given(st.floats(0.35, 1.2))
def test_a_larger_budget_is_never_spent_on_less(part):
    spec, shape = NETWORKS["bottlenecks"]
    model, x = spec.build().eval(), torch.zeros(1, *shape)
    dense = count_parameters([model]) * 4
    tree = TreeSpec(projection_dim=4, cuts=("layer2", "layer3"))
    small, large = (
        plan_budget(model, x, int(dense * factor), tree).candidates[0].sizes
        for factor in (part, part * 1.1)
    )
    assert small.active_params * 4 <= dense * part
    assert small.active_params <= large.active_params and small.macs <= large.macs


def test_the_other_limits_hold_too(network):
    model, x = network
    tree = TreeSpec(projection_dim=8)
    free = plan_budget(model, x, "60%", tree).candidates
    least = min(candidate.sizes.total_params for candidate in free)
    bound = plan_budget(model, x, "60%", tree, total=int(least * 4 * 0.9)).candidates
    assert all(candidate.sizes.total_params <= least * 0.9 for candidate in bound)
    macs = int(min(candidate.sizes.macs for candidate in free) * 0.9)
    assert all(
        candidate.sizes.macs <= macs
        for candidate in plan_budget(model, x, "60%", tree, macs=macs).candidates
    )


def test_the_rule_takes_the_largest_smallest_share_and_marks_what_no_other_beats(network):
    model, x = network
    found = plan_budget(model, x, "60%", TreeSpec(projection_dim=8)).candidates
    limit = sum(parameter.numel() for parameter in model.parameters()) * 0.6
    spending = [c for c in found if c.sizes.active_params >= 0.98 * limit] or found
    assert found[0].smallest_share == max(candidate.smallest_share for candidate in spending)
    for candidate in found:
        beaten = any(
            other.smallest_share >= candidate.smallest_share
            and other.sizes.total_params <= candidate.sizes.total_params
            and other.sizes.macs <= candidate.sizes.macs
            and other.sizes != candidate.sizes
            for other in found
        )
        assert candidate.best != beaten


def test_fewer_bits_buy_more_parameters():
    spec, shape = NETWORKS["bottlenecks"]
    model, x = spec.build().eval(), torch.zeros(1, *shape)
    plans = {bits: plan_budget(model, x, "6KB", TreeSpec(projection_dim=2), bits=bits)
             for bits in (4, 8)}  # fmt: skip
    active = {bits: plan.candidates[0].sizes.active_params for bits, plan in plans.items()}
    assert active[4] * 0.5 <= 6000 and active[8] <= 6000 and active[4] > 1.9 * active[8]


def test_the_macs_are_those_of_the_layers_that_are_left():
    spec, shape = NETWORKS["bottlenecks"]
    model, x = spec.build().eval(), torch.zeros(1, *shape)
    tree = TreeSpec(projection_dim=2, cuts=("layer2", "layer3"))
    found = plan_budget(model, x, "60%", tree).candidates[0]
    net = blueprint(model, x, found.tree)
    macs = 0

    def note(module, arguments, output):
        nonlocal macs
        macs += module.weight.numel() * output.numel() // module.weight.shape[0]

    path = net.path((0, 0))
    for name, module in path.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "routers" not in name:
            module.register_forward_hook(note)
    with torch.no_grad():
        path(x)
    assert found.sizes.macs == macs


def test_one_call_converts_a_network_to_a_budget():
    torch.manual_seed(0)
    spec, shape = NETWORKS["vit"]
    model = randomise(spec.build()).eval()
    loader = [(torch.randn(16, *shape), torch.arange(16) % 5)]
    net = sb.convert(model, loader, sb.TreeSpec(projection_dim=8), budget="60%")
    active = max(count_parameters([net.path(leaf)]) for leaf in net.tree.leaves)
    assert 0.98 * 0.6 <= active / count_parameters([model]) <= 0.6


@pytest.mark.parametrize(
    ("budget", "more", "why"),
    [
        ("1KB", {}, "the smallest path has [0-9,]+; raise the budget"),
        ("much", {}, "is no size"),
        ("x%", {}, "is no size"),
        ("-5%", {}, "is no size"),
        ("inf%", {}, "is no size"),
        ("60%", {"bits": 7}, "7 bits are no width"),
        ("60%", {"macs": 10}, "no tree of this depth"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_in_one_line(budget, more, why):
    spec, shape = NETWORKS["bottlenecks"]
    with pytest.raises(ConfigError, match=why) as caught:
        plan_budget(
            spec.build(), torch.zeros(1, *shape), budget, TreeSpec(projection_dim=8), **more
        )
    assert "\n" not in str(caught.value)


def test_sizes_are_read_as_people_write_them():
    assert Budget.parse("40%", 1000).active_bytes == 1600
    assert Budget.parse("40%", 1000, bits=8).active_bytes == 400
    assert Budget.parse("1.5MB", 0, total="2MiB") == Budget(
        active_bytes=1_500_000, total_bytes=2 * 2**20
    )


# -- the command ---------------------------------------------------------------------------------

OWN = """
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 96, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(96, 10),
    )

class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(n, n + 1, 1) for n in range(3, 8)), Product())
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.layers(x).mean((2, 3)))

class Product(nn.Module):
    def forward(self, x):
        return x.cumprod(1)

def broken():
    raise RuntimeError("no weights here")

number = 3
"""


@pytest.fixture
def run(shell):
    return partial(shell.run, "convert")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "nets.py"
    path.write_text(OWN)
    return path


def test_a_dry_run_shows_the_plan_of_a_network_of_ones_own(run, own, tmp_path):
    arguments = (f"{own}:small", "--input", "3x16x16", "--budget", "60%", "--dry-run")
    told = run(*arguments, "--set", "tree.projection_dim=4", "--json", cwd=tmp_path)
    assert told.code == 0 and told.err == ""
    plan = json.loads(told.out)
    assert 0.98 <= plan["spent"] <= 1 and plan["inexact"] == []
    assert plan["candidates"][0]["tree"]["projection_dim"] == 4
    shown = run(*arguments, "--set", "tree.projection_dim=4", cwd=tmp_path)
    assert "active MB" in shown.out and "masked dense network exactly" in shown.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("network", "more", "why"),
    [
        ("{own}:Running", (), "aten.cumprod"),
        ("{own}:missing", (), "has no class or function 'missing'"),
        ("{own}:number", (), "has no class or function 'number'"),
        ("{own}:broken", (), "fails: no weights here"),
        ("nowhere.py:Net", (), "there is no file nowhere.py"),
        ("timm:no-such-network", (), "timm"),
        ("nothing", (), "holds no saved network"),
        ("nothing:here", (), "write a folder, timm:NAME or PATH.py:CLASS"),
        ("{own}:small", ("--set", "finetune.lr=1"), "only tree settings"),
        ("{own}:small", ("--budget", "0MB"), "is no size"),
        ("{own}:small", ("--input", "3xA"), "no input shape"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, own, network, more, why):
    told = run(network.format(own=own), "--input", "3x16x16", "--budget", "60%", "--dry-run", *more)
    assert told.code == 2 and told.out == ""
    assert why in told.err and told.err.count("\n") == 1


def test_a_network_without_data_is_only_planned(run, own):
    told = run(f"{own}:small", "--input", "3x16x16", "--budget", "60%")
    assert told.code == 2 and "needs its data: add --dry-run" in told.err


def test_the_example_must_fit(run, own):
    told = run(f"{own}:small", "--input", "1x16x16", "--budget", "60%", "--dry-run")
    assert told.code == 2 and "cannot be followed" in told.err


def test_adapters_need_no_example_for_their_families():
    spec, _ = NETWORKS["points"]
    assert as_backbone(spec.build()).chain[0] == "points"


class Both(nn.Module):
    """A block that hands two tensors on."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, y):
        return self.mix(x) + y, y + 1


class Paired(nn.Module):
    """Between its blocks two tensors are alive."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Both() for _ in range(3))

    def forward(self, x):
        x = y = self.stem(x)
        for block in self.blocks:
            x, y = block(x, y)
        return self.fc(x.mean((2, 3)))


def test_why_a_network_has_too_few_stages_is_said():
    with pytest.raises(ConfigError, match="several tensors are handed on at once") as caught:
        plan_budget(Paired().eval(), torch.randn(1, 3, 8, 8), "50%")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
def test_heads_are_offered_only_where_there_are_any():
    network = create_timm("cs3darknet_s", num_classes=5).eval()
    plan = plan_budget(network, torch.zeros(1, 3, 64, 64), "60%")
    assert all(candidate.tree.heads is None for candidate in plan.candidates)
