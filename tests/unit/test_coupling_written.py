"""Channels whose number is written into a forward stay; the others are cut around them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sigmabranch.backbones import as_backbone
from sigmabranch.conversion import blueprint, plan_budget
from sigmabranch.coupling import WRITTEN, plan_slices, trace
from sigmabranch.measure import count_parameters
from sigmabranch.tree import TreeSpec

IMAGE = torch.zeros(1, 3, 8, 8)


class Written(nn.Module):
    """A block that views what is inside it in sizes of its own, after ``how``."""

    def __init__(self, how: str, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.how, self.sizes = how, (hidden // 2, hidden)
        self.expand = nn.Conv2d(width, hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 1)
        self.shrink = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        hidden = self.expand(x)
        if self.how == "view":
            hidden = hidden.view(len(x), self.sizes[0], 2, *x.shape[2:]).flatten(1, 2)
        elif self.how == "check" and hidden.shape[1] != self.sizes[1]:
            raise ValueError("not my width")
        return x + self.shrink(self.mix(hidden).relu())


class Between(nn.Module):
    """Blocks of which the second writes its sizes down."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.first = Written("nothing")
        self.second = Written(how)
        self.third = Written("nothing")
        self.wide = nn.Conv2d(8, 16, 1)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 5)."""
        x = self.third(self.second(self.first(self.stem(x))))
        return self.last(self.wide(x).relu().mean((2, 3)))


@pytest.mark.parametrize("how", ["view", "check"])
def test_only_the_channels_that_a_forward_counts_stay(how):
    found = trace(Between(how), IMAGE)
    kept = {space.name for space in found.spaces if found.fixed.get(int(space.units[0]))}
    assert kept == {"second.expand.weight", "last.weight"}
    unit = int(found.space("second.expand.weight").units[0])
    assert found.fixed[unit] == f"{WRITTEN}second"


@pytest.mark.parametrize("how", ["view", "check"])
def test_trying_says_nothing(how, capfd):
    backbone = as_backbone(Between(how), IMAGE)
    trace(backbone.model, IMAGE, watch=backbone.chain)
    assert capfd.readouterr() == ("", "")


def test_a_network_without_written_sizes_keeps_nothing_for_them():
    found = trace(Between("nothing"), IMAGE)
    assert not any(why.startswith(WRITTEN) for why in found.fixed.values())


def test_a_width_that_is_written_outside_a_block_stays_too():
    class Outside(Between):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).view(len(x), 8, -1).view(len(x), 8, *x.shape[2:])
            return self.last(self.wide(self.second(x)).relu().mean((2, 3)))

    net = Outside("view")
    found = trace(net, IMAGE)
    reasons = {space.name: found.fixed.get(int(space.units[0]), "") for space in found.spaces}
    assert reasons["stem.weight"] == f"{WRITTEN}Outside"
    assert reasons["second.expand.weight"] == f"{WRITTEN}second"
    assert reasons["wide.weight"] == reasons["second.mix.weight"] == ""


def test_trying_leaves_weights_attributes_and_inputs_as_they_were():
    net = Between("view")
    tensors = dict(net.named_parameters())
    given = torch.rand(1, 3, 8, 8)
    before, image = net(given), given.clone()
    trace(net, given)
    assert all(tensor is tensors[name] for name, tensor in net.named_parameters())
    assert (net.first.expand.out_channels, net.second.mix.in_channels) == (12, 12)
    assert torch.equal(net(given), before) and torch.equal(given, image)


def test_a_module_with_two_names_is_cut_once():
    net = Between("view")
    net.again = net.first
    found = trace(net, IMAGE)
    assert "first.expand.weight" in {space.name for space in found.spaces}
    assert not any(why == f"{WRITTEN}first" for why in found.fixed.values())
    kept = found.space("first.expand.weight").units[1:]
    plan_slices(net, found, {"first.expand.weight": kept}).reshape(net)
    assert net.again.expand.weight.shape[0] == 11
    assert net(IMAGE).shape == (1, 5)


def test_what_a_budget_counts_around_written_sizes_is_built():
    net = Between("check").eval()
    example = torch.randn(1, 3, 8, 8)
    tree = TreeSpec.balanced(depth=1, projection_dim=4, cuts=("second",))
    plan = plan_budget(as_backbone(net, example), example, "97%", tree)
    built = blueprint(as_backbone(net, example), example, plan.tree)
    paths = [count_parameters([built.path(leaf)]) for leaf in built.tree.leaves]
    assert max(paths) == plan.candidates[0].sizes.active_params
    assert all(len(node.second.expand.weight) == 12 for node in built.specializers.values())
