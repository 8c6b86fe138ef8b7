"""Which channels the tracer ties together, which it fixes, and what it refuses."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sigmabranch.coupling import SlicePlan, Space, plan_slices, trace
from sigmabranch.errors import ConversionError, UnsupportedOperation

IMAGE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Named layers and a forward given as a function of them."""

    def __init__(self, forward, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._forward(self, *inputs)


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, **options)


def carriers(space: Space) -> set[tuple[str, int]]:
    return set(space.tensors)


def test_a_residual_sum_ties_both_branches_and_every_reader() -> None:
    net = Net(
        lambda m, x: m.out(F.relu_(m.norm(m.a(x)).add_(m.b(x)))),
        a=conv(3, 6, bias=False),
        b=conv(3, 6),
        norm=nn.BatchNorm2d(6),
        out=conv(6, 2),
    )
    found = trace(net, IMAGE)
    space = found.space("a.weight")
    assert len(space) == 6
    assert carriers(space) == {
        ("a.weight", 0),
        ("b.weight", 0),
        ("b.bias", 0),
        ("norm.weight", 0),
        ("norm.bias", 0),
        ("norm.running_mean", 0),
        ("norm.running_var", 0),
        ("out.weight", 1),
    }
    assert torch.equal(found.axes["a.weight"][0], found.axes["out.weight"][1])
    assert found.roles["out.weight", 1] == "reads"
    assert found.roles["b.bias", 0] == "scales"


def test_the_input_is_nobodys_and_the_output_is_fixed() -> None:
    found = trace(nn.Sequential(conv(3, 5), conv(5, 4)), IMAGE)
    assert 1 not in found.axes["0.weight"]
    assert set(found.fixed) == set(found.axes["1.weight"][0].tolist())
    assert set(found.fixed.values()) == {"the model's output"}


def test_concatenation_keeps_the_order_of_its_parts() -> None:
    net = Net(
        lambda m, x: m.out(torch.cat([m.a(x), x, m.b(x)], 1)),
        a=conv(3, 2),
        b=conv(3, 4),
        out=conv(9, 2),
    )
    axes = trace(net, IMAGE).axes
    expected = torch.cat([axes["a.weight"][0], torch.zeros(3, dtype=torch.int64)])
    assert torch.equal(axes["out.weight"][1], torch.cat([expected, axes["b.weight"][0]]))


def test_flattened_positions_share_the_unit_of_their_channel() -> None:
    net = nn.Sequential(conv(3, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    axes = trace(net, IMAGE).axes
    assert torch.equal(axes["3.weight"][1], axes["0.weight"][0].repeat_interleave(4))


def test_grouped_convolution_ties_equal_places_of_its_groups() -> None:
    net = nn.Sequential(conv(3, 8), conv(8, 12, groups=4), conv(12, 2))
    axes = trace(net, IMAGE).axes
    assert torch.equal(axes["0.weight"][0], axes["0.weight"][0][:2].repeat(4))
    assert torch.equal(axes["1.weight"][0], axes["1.weight"][0][:3].repeat(4))
    assert torch.equal(axes["1.weight"][1], axes["0.weight"][0][:2])


def test_depthwise_convolution_hands_its_input_channels_on() -> None:
    net = nn.Sequential(conv(3, 4), conv(4, 8, groups=4), conv(8, 2))
    axes = trace(net, IMAGE).axes
    assert torch.equal(axes["1.weight"][0], axes["0.weight"][0].repeat_interleave(2))
    assert 1 not in axes["1.weight"]


def test_squeeze_and_excitation_ties_the_gate_to_the_channel() -> None:
    net = Net(
        lambda m, x: m.out((y := m.a(x)) * m.up(m.down(y.mean((2, 3), keepdim=True))).sigmoid()),
        a=conv(3, 6),
        down=conv(6, 2),
        up=conv(2, 6),
        out=conv(6, 2),
    )
    found = trace(net, IMAGE)
    assert torch.equal(found.axes["up.weight"][0], found.axes["a.weight"][0])
    assert len(found.space("down.weight")) == 2
    assert not found.inexact


def test_gated_halves_become_one_unit() -> None:
    net = Net(
        lambda m, x: m.out(F.silu((parts := m.a(x).chunk(2, 1))[0]) * parts[1]),
        a=conv(3, 8),
        out=conv(4, 2),
    )
    axes = trace(net, IMAGE).axes
    assert torch.equal(axes["a.weight"][0], axes["out.weight"][1].repeat(2))


def test_layer_scale_and_position_parameters_join_the_channels_they_meet() -> None:
    net = Net(
        lambda m, x: m.out(m.scale * (m.a(x).flatten(2).transpose(1, 2) + m.place)),
        a=conv(3, 6),
        scale=nn.Parameter(torch.ones(6)),
        place=nn.Parameter(torch.zeros(1, 64, 6)),
        out=nn.Linear(6, 2),
    )
    axes = trace(net, IMAGE).axes
    assert torch.equal(axes["scale"][0], axes["a.weight"][0])
    assert list(axes["place"]) == [2]
    assert torch.equal(axes["place"][2], axes["a.weight"][0])


def test_one_scale_for_all_channels_ties_nothing() -> None:
    net = Net(
        lambda m, x: m.out(m.scale * m.a(x)),
        a=conv(3, 6),
        scale=nn.Parameter(torch.ones(1, 1, 1)),
        out=conv(6, 2),
    )
    assert len(trace(net, IMAGE).space("a.weight")) == 6


def test_a_shared_layer_ties_its_two_uses() -> None:
    net = Net(
        lambda m, x: m.out(torch.cat([m.shared(m.a(x)), m.shared(m.b(x))], 1)),
        a=conv(3, 5),
        b=conv(3, 5),
        shared=conv(5, 4),
        out=conv(8, 2),
    )
    axes = trace(net, IMAGE).axes
    assert torch.equal(axes["a.weight"][0], axes["b.weight"][0])
    assert torch.equal(axes["out.weight"][1], axes["shared.weight"][0].repeat(2))


def test_tied_parameters_appear_under_all_their_names() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    axes = trace(net, torch.zeros(1, 4)).axes
    assert torch.equal(axes["2.weight"][0], axes["0.weight"][0])


@pytest.mark.parametrize(
    ("layer", "reason"),
    [(nn.GroupNorm(2, 6), "group_norm in norm"), (nn.GroupNorm(1, 6), "group_norm in norm")],
)
def test_statistics_over_channels_are_marked_inexact(layer: nn.Module, reason: str) -> None:
    net = Net(lambda m, x: m.out(m.norm(m.a(x))), a=conv(3, 6), norm=layer, out=conv(6, 2))
    found = trace(net, IMAGE)
    assert set(found.inexact) == set(found.axes["a.weight"][0].tolist())
    assert set(found.inexact.values()) == {reason}


def test_layer_norm_is_inexact_only_over_the_channels() -> None:
    net = Net(
        lambda m, x: m.out(m.norm(m.a(x).flatten(2).transpose(1, 2))),
        a=conv(3, 6),
        norm=nn.LayerNorm(6),
        out=nn.Linear(6, 2),
    )
    assert trace(net, IMAGE).inexact
    net = Net(
        lambda m, x: m.out(m.norm(m.a(x))), a=conv(3, 6), norm=nn.LayerNorm(8), out=conv(6, 2)
    )
    assert not trace(net, IMAGE).inexact


def test_attention_heads_are_fixed_but_the_hidden_layer_is_free() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    net = Net(
        lambda m, x: m.out(m.layer(m.a(x))), a=nn.Linear(3, 8), layer=layer, out=nn.Linear(8, 2)
    )
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        found = trace(net, torch.zeros(1, 5, 3))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    heads = found.axes["layer.self_attn.in_proj_weight"][0].tolist()
    assert all("attention heads" in found.fixed[unit] for unit in heads)
    hidden = found.space("layer.linear1.weight")
    assert len(hidden) == 12
    assert found.fixed.keys().isdisjoint(hidden.units.tolist())


def test_channels_added_to_a_constant_cannot_be_dropped() -> None:
    net = Net(lambda m, x: m.out(m.a(x) + torch.ones(6, 1, 1)), a=conv(3, 6), out=conv(6, 2))
    found = trace(net, IMAGE)
    assert {found.fixed[unit] for unit in found.axes["a.weight"][0].tolist()} == {
        "combined with values that have no channels in Net"
    }


def test_a_window_across_channels_makes_cuts_inexact() -> None:
    net = Net(
        lambda m, x: m.out(
            (y := m.a(x)) * m.slide(y.mean((2, 3))[:, None])[..., None, None].squeeze(1)
        ),
        a=conv(3, 6),
        slide=nn.Conv1d(1, 1, 3, padding=1),
        out=conv(6, 2),
    )
    found = trace(net, IMAGE)
    units = set(found.axes["a.weight"][0].tolist())
    assert units <= set(found.inexact) and units.isdisjoint(found.fixed)


def test_ranking_of_unlabelled_values_needs_no_rule() -> None:
    """Neighbour search on coordinates, as point networks do it."""

    def forward(m, cloud: Tensor) -> Tensor:
        near = torch.cdist(cloud, cloud).topk(3, largest=False).indices
        feature = m.a(cloud)
        return m.out(feature[torch.arange(len(cloud))[:, None, None], near].amax(2))

    found = trace(Net(forward, a=nn.Linear(3, 6), out=nn.Linear(6, 2)), torch.rand(2, 7, 3))
    assert torch.equal(found.axes["out.weight"][1], found.axes["a.weight"][0])


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (torch.linalg.inv, "aten.linalg_inv_ex"),
        (lambda x: x.as_strided((8, 8), (1, 8)), "as_strided"),
    ],
)
def test_unknown_operations_are_refused_by_name_and_module(operation, name: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return operation(x)

    net = nn.Sequential(conv(3, 4), nn.Sequential(Odd()))
    with pytest.raises(UnsupportedOperation, match=rf"{name}.* in 1\.0 ") as caught:
        trace(net, IMAGE)
    assert "\n" not in str(caught.value)


def test_a_computed_weight_is_refused() -> None:
    net = nn.Sequential(conv(3, 4), nn.utils.parametrizations.weight_norm(conv(4, 4)))
    with pytest.raises(UnsupportedOperation):
        trace(net, IMAGE)


def test_a_buffer_changed_in_place_is_refused() -> None:
    net = Net(lambda m, x: m.out(m.memory.copy_(m.a(x))), a=conv(3, 4), out=conv(4, 2))
    net.register_buffer("memory", torch.zeros(1, 4, 8, 8))
    with pytest.raises(UnsupportedOperation, match="memory"):
        trace(net, IMAGE)


def test_watched_modules_name_their_output_channels() -> None:
    net = nn.Sequential(conv(3, 4), nn.ReLU(inplace=True), conv(4, 2))
    found = trace(net, IMAGE, watch=["1"])
    axis = found.output_axis("1")
    assert axis.dim == 1
    assert torch.equal(axis.units, found.axes["0.weight"][0])
    assert found.space_of_output("1").name == "0.weight"


def test_a_pytree_output_names_each_tensor() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Linear(3, 4)

        def forward(self, cloud: Tensor) -> tuple[Tensor, Tensor]:
            return cloud, self.lift(cloud)

    net = Net(lambda m, x: m.out(m.stage(x)[1]), stage=Stage(), out=nn.Linear(4, 2))
    place, feature = trace(net, torch.zeros(1, 5, 3), watch=["stage"]).outputs["stage"]
    assert place is None
    assert feature is not None
    assert feature.dim == 2


@pytest.mark.parametrize("name", ["nowhere", "unused"])
def test_watching_a_module_that_does_not_run_is_an_error(name: str) -> None:
    net = Net(lambda m, x: m.a(x), a=conv(3, 2), unused=conv(3, 2))
    with pytest.raises(ConversionError, match=name):
        trace(net, IMAGE, watch=[name])


def test_inner_spaces_are_those_wholly_inside_and_free() -> None:
    net = nn.Sequential(
        nn.Sequential(conv(3, 4), conv(4, 5)),
        nn.Sequential(conv(5, 6), conv(6, 7), conv(7, 8)),
        conv(8, 2),
    )
    found = trace(net, IMAGE, watch=["0", "1"])
    assert [space.name for space in found.inner_spaces(["1"])] == ["1.0.weight", "1.1.weight"]
    assert [space.name for space in found.inner_spaces(["0"])] == ["0.0.weight"]


def test_trace_leaves_model_and_input_as_they_were() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), conv(3, 4), nn.BatchNorm2d(4), nn.Dropout())
    net[3].eval()
    image = -torch.ones(1, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    trace(net, image)
    assert [module.training for module in net] == [True, True, True, False]
    assert net.training
    assert bool((image == -1).all())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_recycled_tensors_do_not_inherit_labels() -> None:
    """Hundreds of short-lived tensors: a tracer keyed by id() would mix them up."""

    def forward(m, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = layer(x).relu() + torch.zeros(())
            gc.collect(0)
        return m.out(x)

    layers = nn.ModuleList([conv(3, 4), *(conv(4, 4) for _ in range(60))])
    found = trace(Net(forward, layers=layers, out=conv(4, 2)), IMAGE)
    assert [len(space) for space in found.spaces] == [4] * 61 + [2]


def test_a_second_trace_ignores_activations_kept_from_the_first() -> None:
    def forward(m, x: Tensor) -> Tensor:
        previous = m.__dict__.get("kept")
        m.__dict__["kept"] = m.a(x)
        return m.out(m.kept if previous is None else m.kept + previous)

    net = Net(forward, pad=conv(3, 9), a=conv(3, 4), out=conv(4, 2))
    assert not set(trace(net, IMAGE).axes["a.weight"][0].tolist()) & {0}
    second = trace(net, IMAGE)
    assert set(second.axes["a.weight"][0].tolist()) <= set(second.fixed)


def test_a_network_without_storage_is_traced_alike() -> None:
    """On the meta device nothing can be read: labels depend on no value and live on the CPU."""
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=2), conv(8, 2))
    real = trace(net, IMAGE).axes
    meta = trace(net.to("meta"), IMAGE.to("meta")).axes
    assert meta.keys() == real.keys()
    for name, axes in real.items():
        for axis, units in axes.items():
            assert torch.equal(meta[name][axis], units)


def test_what_layers_make_for_one_reader_is_parted_by_who_carries_it() -> None:
    net = Net(
        lambda m, x: m.out(torch.cat([a := m.a(x), m.c(torch.cat([a, m.b(x)], 1))], 1)),
        a=conv(3, 4),
        b=conv(3, 5),
        c=conv(9, 6),
        out=conv(10, 2),
    )
    found = trace(net, IMAGE)
    space = found.space_with(found.axes["a.weight"][0])
    parts = found.parts[space.name]
    assert sorted(map(len, parts)) == [4, 5, 6]
    assert torch.equal(torch.cat([part.units for part in parts]).sort().values, space.units)
    names = [part.name for space in found.spaces for part in found.parts[space.name]]
    assert len(set(names)) == len(names)
    for part in parts:
        assert found.space(part.name) is part
        for name, axis in part.tensors:
            assert bool(torch.isin(part.units, found.axes[name][axis]).all())


def test_a_space_whose_units_are_alike_is_its_own_part() -> None:
    found = trace(Net(lambda m, x: m.b(m.a(x)), a=conv(3, 4), b=conv(4, 2)), IMAGE)
    assert all(found.parts[space.name] == (space,) for space in found.spaces)


class Splits(nn.Module):
    """Cuts its channels into parts of ``width``, as Res2Net does."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.width = width
        self.expand = conv(3, width * count)
        self.mix = nn.ModuleList(conv(width, width) for _ in range(count))
        self.shrink = conv(width * count, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.expand(x), self.width, 1)
        mixed = [mix(part) for mix, part in zip(self.mix, parts, strict=True)]
        return self.shrink(torch.cat(mixed, 1))


def test_the_width_of_equal_parts_is_counted_and_cut_with_them() -> None:
    net = Splits(width=4, count=3)
    found = trace(net, IMAGE)
    space = found.space("expand.weight")
    assert len(space) == 4 and not found.is_heads(space)
    plan = plan_slices(net, found, {space: space.units[1:]})
    assert plan.edits[""] == {"width": 3}
    assert SlicePlan.from_dict(plan.to_dict()).edits == plan.edits
    plan.reshape(net)
    assert net.expand.weight.shape[0] == 9 and net(IMAGE).shape[1] == 2


class Scaled(nn.Module):
    """A vector of scales that is viewed in a shape that the module keeps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = (width, 1, 1)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


def test_the_shape_of_a_layer_scale_is_cut_with_it() -> None:
    net = nn.Sequential(conv(3, 6), Scaled(6), conv(6, 2))
    found = trace(net, IMAGE)
    space = found.space("0.weight")
    plan = plan_slices(net, found, {space: space.units[:4]})
    assert plan.edits["1"] == {"shape": (4, 1, 1)}
    plan.reshape(net)
    assert net(IMAGE).shape[1] == 2


def test_modules_with_windows_or_constants_are_not_given_one_value_per_input() -> None:
    net = Net(
        lambda m, x: (
            m.out(m.inside(m.first(x).unflatten(1, (2, 4)).flatten(0, 1))) + m.bias(m.table)
        ),
        first=nn.Linear(3, 8),
        inside=nn.Linear(4, 4),
        out=nn.Linear(4, 2),
        bias=nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2)),
        table=nn.Parameter(torch.rand(1, 5)),
    )
    found = trace(net, torch.zeros(1, 3))
    assert {"", "first"} == found.per_input
