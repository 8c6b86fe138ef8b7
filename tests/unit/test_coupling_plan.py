"""The plan as data: applying, restricting, composing, saving, and what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from sigmabranch.coupling import (
    SlicePlan,
    channel_mean_to_unit,
    fingerprint,
    plan_slices,
    trace,
    unit_scores_l1,
)
from sigmabranch.errors import ConfigError, ConversionError


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


IMAGE = torch.zeros(1, 3, 8, 8)


def cut(net: nn.Module, **kept: list[int]) -> SlicePlan:
    """Plan that keeps the given positions; ``_`` in a name stands for a dot."""
    coupling = trace(net, IMAGE)
    keep = {
        (name := key.replace("_", ".")): coupling.space(name).units[positions]
        for key, positions in kept.items()
    }
    return plan_slices(net, coupling, keep)


def as_json(plan: SlicePlan) -> str:
    return json.dumps(plan.to_dict(), sort_keys=True)


def test_positions_and_size_attributes_follow_the_units() -> None:
    net = small_net()
    coupling = trace(net, IMAGE)
    units = coupling.axes["0.weight"][0]
    plan = plan_slices(net, coupling, {"0.weight": units[[5, 0, 2]]})
    kept = {
        name: {axis: i.tolist() for axis, i in axes.items()} for name, axes in plan.keep.items()
    }
    vector = {0: [0, 2, 5]}
    assert kept == {
        "0.weight": vector,
        "1.weight": vector,
        "1.bias": vector,
        "1.running_mean": vector,
        "1.running_var": vector,
        "3.weight": vector,
        "3.bias": vector,
        "4.0.weight": {1: [0, 2, 5]},
    }
    assert plan.edits == {
        "0": {"out_channels": 3},
        "1": {"num_features": 3},
        "3": {"in_channels": 3, "out_channels": 3, "groups": 3},
        "4.0": {"in_channels": 3},
    }
    assert plan.source == fingerprint(net.state_dict())


def test_apply_copies_what_it_keeps() -> None:
    net = small_net()
    state = net.state_dict()
    sliced = cut(net, **{"0_weight": [1, 4]}).apply(state)
    assert torch.equal(sliced["0.weight"], state["0.weight"][[1, 4]])
    assert torch.equal(sliced["4.0.weight"], state["4.0.weight"][:, [1, 4]])
    sliced["7.weight"].zero_()
    assert bool(state["7.weight"].any())


def test_a_meta_skeleton_takes_the_sliced_state() -> None:
    net = small_net().eval()
    plan = cut(net, **{"0_weight": [1, 4], "4_0_weight": [0, 1, 2]})
    with torch.device("meta"):
        skeleton = small_net()
    plan.reshape(skeleton)
    skeleton.load_state_dict(plan.apply(net.state_dict()), assign=True)
    real = copy.deepcopy(net)
    plan.reshape(real)
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(skeleton.eval()(image), real(image))
    assert isinstance(skeleton[0].weight, nn.Parameter)
    assert "running_mean" in dict(skeleton[1].named_buffers())


def test_reshape_keeps_tied_and_frozen_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    net[2].weight = net[1].weight
    net[1].weight.requires_grad_(False)
    coupling = trace(net, torch.zeros(1, 3))
    space = coupling.space("0.weight")
    plan = plan_slices(net, coupling, {space: space.units[:4]})
    plan.reshape(net)
    assert net[2].weight is net[1].weight
    assert net[1].weight.shape == (4, 4)
    assert not net[1].weight.requires_grad


def test_restriction_to_a_module_reshapes_a_copy_of_it() -> None:
    net = small_net()
    plan = cut(net, **{"0_weight": [1, 4], "4_0_weight": [0, 1, 2]}).restrict(["4"])
    assert set(plan.keep) == {"4.0.weight", "4.0.bias"}
    section = copy.deepcopy(net[4])
    plan.reshape(section, prefix="4")
    assert section[0].weight.shape == (3, 2, 1, 1)
    assert (section[0].in_channels, section[0].out_channels) == (2, 3)
    state = plan.apply(net[4].state_dict(), prefix="4")
    assert torch.equal(state["0.weight"], section[0].weight)


def test_restriction_does_not_match_half_a_name() -> None:
    plan = SlicePlan(keep={"layer10.weight": {0: torch.tensor([0])}}, edits={}, source="")
    assert not plan.restrict(["layer1"]).keep


def test_composed_plans_equal_one_after_the_other() -> None:
    net = small_net()
    first = cut(net, **{"0_weight": [0, 2, 3, 5], "4_0_weight": [0, 1, 2, 6, 7]})
    between = copy.deepcopy(net)
    first.reshape(between)
    second = cut(between, **{"0_weight": [1, 3], "4_0_weight": [0, 4]})
    stepwise = second.apply(first.apply(net.state_dict()))
    at_once = first.then(second)
    for name, tensor in at_once.apply(net.state_dict()).items():
        assert torch.equal(tensor, stepwise[name])
    assert at_once.keep["0.weight"][0].tolist() == [2, 5]
    assert at_once.edits["3"]["groups"] == 2


def test_composition_checks_the_range() -> None:
    net = small_net()
    with pytest.raises(ConversionError, match="position 3"):
        cut(net, **{"0_weight": [0, 1]}).then(cut(net, **{"0_weight": [0, 3]}))


def test_json_round_trip_is_exact() -> None:
    plan = cut(small_net(), **{"0_weight": [1, 4], "4_0_weight": [0, 1, 2]})
    again = SlicePlan.from_dict(json.loads(as_json(plan)))
    assert as_json(again) == as_json(plan)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"extra": 1},
        {"keep": {"0.weight": {"0": [2, 1]}}},
        {"keep": {"0.weight": {"0": [-1, 1]}}},
        {"keep": {"0.weight": {"0": [True, 2]}}},
        {"keep": {"0.weight": {"-1": [1]}}},
        {"keep": {"0.weight": {"x": [1]}}},
        {"keep": [1]},
        {"edits": {"0": {"forward": 3}}},
        {"edits": {"0": {"groups": 1.5}}},
    ],
)
def test_a_damaged_plan_is_refused(change: dict) -> None:
    good = cut(small_net(), **{"0_weight": [1, 4]}).to_dict()
    with pytest.raises(ConfigError):
        SlicePlan.from_dict(good | change)


def test_a_plan_without_a_part_is_refused() -> None:
    good = cut(small_net(), **{"0_weight": [1, 4]}).to_dict()
    del good["edits"]
    with pytest.raises(ConfigError, match="edits"):
        SlicePlan.from_dict(good)


def test_a_foreign_state_is_refused() -> None:
    plan = cut(small_net(), **{"0_weight": [1, 4]})
    state = small_net().state_dict()
    narrow = state | {"0.weight": state["0.weight"][:2]}
    with pytest.raises(ConversionError, match=r"position 4 .* 0\.weight"):
        plan.apply(narrow)
    del state["0.weight"]
    with pytest.raises(ConversionError, match=r"0\.weight"):
        plan.apply(state)
    with pytest.raises(ConversionError, match=r"0\.weight"):
        plan.reshape(nn.Sequential(nn.Identity()))


def test_dropping_what_is_fixed_names_the_reason() -> None:
    with pytest.raises(ConversionError, match="the model's output"):
        cut(small_net(), **{"7_weight": [0, 1]})


def test_dropping_everything_is_refused() -> None:
    with pytest.raises(ConversionError, match="nothing is left"):
        cut(small_net(), **{"0_weight": []})


def test_units_of_another_space_are_refused() -> None:
    net = small_net()
    coupling = trace(net, IMAGE)
    with pytest.raises(ConversionError, match="not one of"):
        plan_slices(net, coupling, {"0.weight": coupling.space("4.0.weight").units})
    with pytest.raises(ConversionError, match="nobody"):
        plan_slices(net, coupling, {"nobody": torch.tensor([1])})


def test_explanation_counts_parameters() -> None:
    net = small_net()
    plan = cut(net, **{"0_weight": [1, 4]})
    before, after = plan.parameter_counts(net)
    assert before == sum(p.numel() for p in net.parameters())
    plan_text = plan.explain(net)
    assert "0.weight: 6x3x3x3 -> 2x3x3x3" in plan_text
    sliced = copy.deepcopy(net)
    plan.reshape(sliced)
    assert after == sum(p.numel() for p in sliced.parameters())
    assert f"{after}" in plan_text


def test_fingerprint_sees_shapes_and_types_not_values() -> None:
    state = small_net().state_dict()
    assert fingerprint(state) == fingerprint({name: t + 1 for name, t in state.items()})
    assert fingerprint(state) != fingerprint({name: t.double() for name, t in state.items()})
    assert fingerprint(state) != fingerprint(state | {"0.weight": state["0.weight"][:2]})


def test_l1_score_is_the_norm_of_the_rows_that_make_a_unit() -> None:
    net = small_net()
    coupling = trace(net, IMAGE)
    state = net.state_dict()
    scores = unit_scores_l1(coupling, state, coupling.space("4.0.weight"))
    assert torch.allclose(scores, state["4.0.weight"].abs().sum((1, 2, 3)).double())
    # A depthwise row makes its channel too.
    both = state["0.weight"].abs().sum((1, 2, 3)) + state["3.weight"].abs().sum((1, 2, 3))
    scores = unit_scores_l1(coupling, state, coupling.space("0.weight"))
    assert torch.allclose(scores, both.double())


def test_channel_means_are_averaged_over_the_channels_of_a_unit() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1))
    coupling = trace(net, IMAGE, watch=["0"])
    mean_KC = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 2.0, 2.0]])
    mean_KU = channel_mean_to_unit(coupling, "0", mean_KC)
    assert mean_KU.tolist() == [[2.0, 4.0], [1.0, 1.0]]
