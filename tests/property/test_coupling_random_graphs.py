"""Over random graphs: a sliced network is its masked dense one, and plans behave as data."""

from __future__ import annotations

import copy
import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sigmabranch.coupling import SlicePlan, plan_slices, trace, verify_slice


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(inputs, 5, 1), nn.ReLU(), nn.Conv2d(5, outputs, 1))
        self.b = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.a(x).add_(self.b(x)))


class Concatenation(Residual):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


class Identity(nn.Module):
    """A residual block without projection: its width is that of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs, outputs, 1)
        self.inner = nn.Sequential(
            nn.BatchNorm2d(outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return x + self.inner(x)


class SqueezeExcitation(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lift = nn.Conv2d(inputs, outputs, 1)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, 3, 1), nn.ReLU(), nn.Conv2d(3, outputs, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        return x * self.gate(x).sigmoid()


class GatedUnit(nn.Module):
    """SwiGLU over the channels, in channels-last layout."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(inputs, 12), nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x.permute(0, 2, 3, 1)).chunk(2, -1)
        return self.down(F.silu(gate) * value).permute(0, 3, 1, 2)


def convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def grouped(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, 8, 1), nn.Conv2d(8, outputs, 3, groups=2, padding=1))


def depthwise(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, 6, 1), nn.Conv2d(6, 12, 3, groups=6, padding=1), nn.Conv2d(12, outputs, 1)
    )


BLOCKS = [
    convolution,
    grouped,
    depthwise,
    Residual,
    Concatenation,
    Identity,
    SqueezeExcitation,
    GatedUnit,
]

blocks = st.lists(
    st.tuples(st.sampled_from(BLOCKS), st.sampled_from([4, 6, 8])), min_size=1, max_size=4
)
seeds = st.integers(0, 2**16)
IMAGE = torch.zeros(1, 3, 5, 5)


def network(graph, seed: int) -> nn.Sequential:
    """The blocks one after the other and a head; every parameter and statistic is random."""
    width, layers = 3, []
    for block, outputs in graph:
        layers.append(block(width, outputs))
        width = outputs
    net = nn.Sequential(
        nn.Sequential(*layers), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.1)
    return net.eval()


def random_plan(net: nn.Module, seed: int):
    """(plan, coupling, kept units): a random part of every space that may be cut."""
    generator = torch.Generator().manual_seed(seed)
    coupling = trace(net, IMAGE, watch=[""])
    keep = {}
    for space in coupling.spaces:
        if coupling.fixed.keys().isdisjoint(space.units.tolist()):
            share = torch.rand((), generator=generator)
            chosen = [space.units[torch.rand(len(space), generator=generator) < share]]
            for name, axis in space.tensors:  # no tensor may end empty
                units = coupling.axes[name][axis]
                units = units[units > 0]
                chosen.append(units[torch.randint(len(units), (1,), generator=generator)])
            keep[space.name] = torch.cat(chosen).unique()
    return plan_slices(net, coupling, keep), coupling, keep


def states_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@settings(max_examples=60, deadline=None)
@given(blocks, seeds)
def test_a_sliced_network_equals_the_masked_dense_one(graph, seed: int) -> None:
    net = network(graph, seed)
    plan, coupling, keep = random_plan(net, seed)
    sliced = copy.deepcopy(net)
    plan.reshape(sliced)
    image = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    assert verify_slice(net, [""], sliced, image, coupling=coupling, keep=keep) < 1e-12
    assert states_equal(sliced.state_dict(), plan.apply(net.state_dict()))


@settings(max_examples=15, deadline=None)
@given(blocks, seeds)
def test_a_plan_that_keeps_everything_is_the_identity(graph, seed: int) -> None:
    net = network(graph, seed)
    coupling = trace(net, IMAGE)
    plan = plan_slices(net, coupling, {space: space.units for space in coupling.spaces})
    assert not plan.keep
    assert not plan.edits
    assert states_equal(plan.apply(net.state_dict()), dict(net.state_dict()))


@settings(max_examples=15, deadline=None)
@given(blocks, seeds)
def test_composition_is_associative_and_equals_steps(graph, seed: int) -> None:
    net = network(graph, seed)
    plans, states = [], [dict(net.state_dict())]
    current = copy.deepcopy(net)
    for step in range(3):
        plan, _, _ = random_plan(current, seed + step)
        plan.reshape(current)
        plans.append(plan)
        states.append(plan.apply(states[-1]))
    first, second, third = plans
    left, right = first.then(second).then(third), first.then(second.then(third))
    assert left.to_dict() == right.to_dict()
    assert states_equal(left.apply(net.state_dict()), states[-1])


@settings(max_examples=15, deadline=None)
@given(blocks, seeds)
def test_a_plan_survives_json(graph, seed: int) -> None:
    plan, _, _ = random_plan(network(graph, seed), seed)
    again = SlicePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.to_dict() == plan.to_dict()
    assert again.source == plan.source
