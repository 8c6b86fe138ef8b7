"""How a level may begin, and what is cut inside its blocks."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

import sigmabranch as sb
from conftest import randomise
from sigmabranch.backbones import ConvNeXtSpec, ResNetSpec, ViTSpec
from sigmabranch.conversion import Shards, blueprint, single_path
from sigmabranch.conversion.refit import NormFit
from sigmabranch.coupling import trace
from sigmabranch.errors import ConfigError, ConversionError

RESNET = ResNetSpec(
    block="basic", layers=(2, 2), planes=(8, 8), strides=(1, 1), stem="cifar", stem_width=8,
    in_channels=1, classes=5,
)  # fmt: skip
VIT = ViTSpec(image_size=16, patch=4, width=24, depth=4, heads=4, in_channels=1, classes=5)
UNEVEN = ((0, 0), (0, 1), (1,))


def data(count: int = 3):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 1, 16, 16, generator=generator), torch.arange(16) % 5)
        for _ in range(count)
    ]


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return randomise(RESNET.build()).eval()


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return randomise(VIT.build()).eval()


def converted(model, **tree):
    tree = sb.TreeSpec(**{"projection_dim": 8, **tree})
    return sb.convert(model, data(), tree, spec=sb.ConversionSpec(norm_samples=0))


def kept(net, node: str, level: int = 0) -> list[int]:
    return net.record["nodes"][node][level]["kept"]


@contextmanager
def silent(model: nn.Module, paths, channels: list[int]):
    """Silence all other output channels (dimension 1) of the modules at ``paths``."""

    def mask(module, arguments, output: Tensor) -> Tensor:
        quiet = torch.zeros_like(output)
        quiet[:, channels] = output[:, channels]
        return quiet

    handles = [model.get_submodule(path).register_forward_hook(mask) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_a_gathered_branch_is_the_dense_network_with_its_other_channels_silent(resnet):
    net = converted(
        resnet, leaves=((0,), (1,)), cuts=("layer2",), entry="gather", widths=(5,), shares=(1.0,)
    )
    x = data()[0][0]
    assert kept(net, "0") != kept(net, "1")
    for leaf in net.tree.leaves:
        with silent(resnet, ("layer1", "layer2.0", "layer2.1"), kept(net, str(leaf[0]))):
            expected = resnet(x)
        found = net.head(leaf)(net.specializer(leaf)(net.trunk(x)))
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_branch_below_gathers_from_what_its_parent_has(vit, tmp_path):
    net = converted(
        vit, cuts=("blocks.1", "blocks.3"), entry="gather", widths=(16, 10), leaves=UNEVEN
    )
    for child in ("0-0", "0-1"):
        assert set(kept(net, child)) < set(kept(net, "0"))
        assert len(kept(net, child)) == 10 and len(kept(net, "0")) == 16
    assert kept(net, "1", 0) == kept(net, "1", 1)
    net.save(tmp_path / "net")
    x = data()[0][0]
    assert torch.equal(sb.load(tmp_path / "net")(x), net(x))
    sb.pack(net, tmp_path / "package", x[:1])
    with sb.Runtime.open(tmp_path / "package") as runtime:
        assert torch.allclose(runtime.predict(x[:1]).logits, net(x[:1]), atol=1e-4)


def test_kept_whole_a_tree_of_either_entry_is_the_dense_network(vit):
    x = data()[0][0]
    for tree in (
        {"entry": "gather", "widths": (24, 24)},
        {"entry": "inner", "shares": (1.0, 1.0)},
        {"entry": None, "shares": (1.0, 1.0), "heads": (1.0, 1.0)},
    ):
        net = converted(vit, cuts=("blocks.1", "blocks.3"), **tree)
        assert torch.allclose(net(x), vit(x), atol=1e-5), tree


def test_a_level_that_cuts_inside_keeps_the_hidden_units_that_its_inputs_use(vit):
    net = converted(vit, cuts=("blocks.1", "blocks.3"), shares=(0.5, 0.25))
    assert net.record["widths"] == [24, 24]
    assert all(node["max_error"] < 1e-9 for node in net.record["nodes"]["0"])
    inner = [net.record["nodes"][node][0]["inner"] for node in ("0", "1")]
    assert inner[0].keys() == {"blocks.1.mlp.fc1.weight", "blocks.2.mlp.fc1.weight"}
    assert [len(units) for units in inner[0].values()] == [48, 48]
    assert inner[0] != inner[1]
    x = data()[0][0]
    leaf = net.tree.leaves[0]
    feature = net.trunk(x)
    masked = silence_units(vit, net, leaf)
    for length in (1, 2):
        feature = net.specializer(leaf[:length])(feature)
    assert torch.allclose(net.head(leaf)(feature), masked(x), atol=1e-5)


def silence_units(vit, net, leaf):
    """The dense network without the hidden units that the path to ``leaf`` dropped."""
    dense = copy.deepcopy(vit)
    for length in (1, 2):
        key = "-".join(map(str, leaf[:length]))
        for name, units in net.record["nodes"][key][0]["inner"].items():
            reader = dense.get_submodule(name.replace("fc1.weight", "fc2"))
            gone = [unit for unit in range(reader.in_features) if unit not in units]
            reader.weight.data[:, gone] = 0
    return dense


def test_heads_are_cut_whole_and_counted_by_their_module(vit):
    net = converted(vit, cuts=("blocks.1", "blocks.3"), heads=(0.5, 0.25), shares=(1.0, 1.0))
    attention = net.specializer((0,)).get_submodule("blocks_1.attn")
    assert (attention.heads, attention.qkv.out_features, attention.proj.in_features) == (2, 36, 12)
    assert net.specializer((0, 0)).get_submodule("blocks_3.attn").heads == 1
    assert all(node["max_error"] < 1e-9 for node in net.record["nodes"]["0"])


def test_heads_of_an_attention_that_does_not_say_their_number_stay(vit):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.transpose(1, 2).flatten(2))

    fixed = trace(Fixed(), torch.zeros(1, 3, 8))
    assert not fixed.counts and fixed.fixed
    known = trace(vit, torch.zeros(1, 1, 16, 16))
    assert known.counts.keys() == {(f"blocks.{number}.attn", "heads") for number in range(4)}


def test_a_level_that_cannot_begin_as_asked_is_refused(resnet, vit):
    with pytest.raises(ConversionError, match=r"no level can project at blocks\.1"):
        converted(vit, cuts=("blocks.1", "blocks.3"), entry="project")
    with pytest.raises(ConfigError, match="give shares, not widths"):
        converted(vit, cuts=("blocks.1", "blocks.3"), widths=(12, 12))
    with pytest.raises(ConfigError, match="unknown tree entry 'copy'"):
        sb.TreeSpec(entry="copy")
    with pytest.raises(ConfigError, match=r"tree shares must lie in \(0, 1\]"):
        sb.TreeSpec(shares=(0.0, 0.5))
    with pytest.raises(ConfigError, match="tree heads has 1 entries for 2 levels"):
        sb.TreeSpec(heads=(0.5,))


class Adding(nn.Module):
    """Puts new channels beside those of its input, as a dense block does."""

    def __init__(self, width: int, more: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, more, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.relu(self.conv(x))], 1)


def test_what_adds_channels_to_its_input_cannot_gather_but_can_cut_before():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), Adding(8, 6), nn.Conv2d(14, 10, 1), Adding(10, 6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    with pytest.raises(ConversionError, match="adds channels to those of its input"):
        converted(model, leaves=((0,), (1,)), cuts=("4",), entry="gather")
    net = converted(model, leaves=((0,), (1,)), cuts=("3",))
    assert net.record["widths"] == [16] and net.record["shares"] == [0.5]
    assert all(node["max_error"] < 1e-9 for node in net.record["nodes"]["0"])


CONVNEXT = ConvNeXtSpec(
    layers=(1, 1, 1), widths=(8, 12, 16), strides=(1, 2, 2), patch=2, kernel=3, in_channels=1,
    classes=5,
)  # fmt: skip


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_a_fitted_norm_is_the_best_that_scale_and_shift_can_do(last):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 5, 8, generator=generator) * torch.arange(1, 9)
    dense = randomise(nn.LayerNorm(8))
    y = dense(x)
    kept = torch.tensor([0, 2, 3, 7])
    norm = randomise(nn.LayerNorm(4))
    fit = NormFit("norm", norm, kept, 8)
    with torch.no_grad():
        fit.add(*(t if last else t.movedim(-1, 1) for t in (x[:4], y[:4])))
        fit.add(*(t if last else t.movedim(-1, 1) for t in (x[4:], y[4:])))
        fit.finished(Shards())
    unit = nn.functional.layer_norm(x[..., kept], (4,)).flatten(0, -2).double()
    for channel, target in enumerate(y[..., kept].flatten(0, -2).double().T):
        columns = torch.stack([unit[:, channel], torch.ones(len(unit))], 1)
        scale, shift = torch.linalg.lstsq(columns, target[:, None]).solution.flatten()
        assert float(norm.weight[channel]) == pytest.approx(float(scale), abs=1e-4)
        assert float(norm.bias[channel]) == pytest.approx(float(shift), abs=1e-4)


def test_a_norm_without_samples_or_without_spread_keeps_its_scale():
    norm = randomise(nn.LayerNorm(4))
    before = norm.weight.clone()
    fit = NormFit("norm", norm, torch.arange(4), 4)
    with torch.no_grad():
        fit.finished(Shards())
        assert torch.equal(norm.weight, before)
        fit.add(torch.zeros(3, 4), torch.ones(3, 4))
        fit.finished(Shards())
    assert torch.equal(norm.weight, before) and torch.equal(norm.bias, torch.ones(4))


def test_only_layer_norms_that_lost_channels_are_fitted():
    torch.manual_seed(0)
    dense = randomise(CONVNEXT.build()).eval()
    tree = sb.TreeSpec.balanced(1, projection_dim=8)
    left, fitted = (
        sb.convert(dense, data(), tree, spec=sb.ConversionSpec(affine_samples=samples)).state_dict()
        for samples in (0, 48)
    )
    changed = {name for name, value in left.items() if not torch.equal(value, fitted[name])}
    assert {name.removeprefix("specializers.").removeprefix("heads.")[2:] for name in changed} == {
        "stages_2.blocks.0.norm.weight", "stages_2.blocks.0.norm.bias", "head_norm.weight",
        "head_norm.bias",
    }  # fmt: skip


def test_a_single_path_has_its_cut_layer_norms_fitted_as_a_branch_has(vit):
    tree = sb.TreeSpec(projection_dim=8, entry="gather")
    fitted, old = (
        single_path(vit, data(), tree, spec=sb.ConversionSpec(norm_samples=0, affine_samples=n))
        for n in (48, 0)
    )
    x = torch.cat([x for x, _ in data()])
    changed = {
        name.rpartition(".")[0]
        for name, tensor in fitted.state_dict().items()
        if not torch.equal(tensor, old.state_dict()[name])
    }
    norms = {name for name, module in fitted.named_modules() if isinstance(module, nn.LayerNorm)}
    assert changed and changed <= norms
    with torch.no_grad():
        error, before = ((path(x) - vit(x)).square().mean() for path in (fitted, old))
    assert error < before


def test_layer_norms_that_lost_nothing_are_left_alone(vit):
    nets = [
        sb.convert(
            vit,
            data(),
            sb.TreeSpec(projection_dim=8, cuts=("blocks.1", "blocks.3")),
            spec=sb.ConversionSpec(affine_samples=samples),
        )
        for samples in (0, 48)
    ]
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_blueprint_has_the_sizes_of_a_conversion(vit):
    tree = sb.TreeSpec(
        projection_dim=8, cuts=("blocks.1", "blocks.3"), entry="gather", widths=(16, 10)
    )
    shapes = [
        {name: value.shape for name, value in net.state_dict().items()}
        for net in (converted(vit, **asdict(tree)), blueprint(vit, data()[0][0][:1], tree))
    ]
    assert shapes[0] == shapes[1]
