"""Any network's cuts, found by following its forward; what cannot be followed is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import sigmabranch as sb
from conftest import randomise
from sigmabranch.backbones import Backbone, as_backbone
from sigmabranch.errors import CheckpointError, ConfigError, ConversionError


class Block(nn.Module):
    """A residual block whose inside nobody has to understand."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1)
        self.bn = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):  # a condition on values, which only a black box may have
            raise ValueError
        return x + self.conv2(torch.relu(self.bn(self.conv1(x))))


class Pictures(nn.Module):
    """Modules in a plain sequence, a wrapper, and glue between them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(Block(8, 12), Block(8, 12))
        self.down = nn.Conv2d(8, 16, 2, 2)
        self.deep = nn.Sequential(Block(16, 20), Block(16, 20))
        self.last = nn.Conv2d(16, 24, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor, scaled: bool = True, mask: Tensor | None = None) -> Tensor:
        height, width = x.shape[-2:]
        if height < 4 or width < 4:
            raise ValueError("too small")
        x = self.stem(x)
        if scaled:
            x = x * self.scale
        if mask is not None:
            x = x * mask
        x = self.deep(self.down(self.body(x)))
        x = torch.relu(self.last(x)).mean((2, 3))
        return self.fc(x)


class Cloud(nn.Module):
    """A PointNet: layers per point, a maximum over the points, layers of the whole."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 16), (16, 24), (24, 40))
        self.points = nn.Sequential(
            *(nn.Sequential(nn.Conv1d(i, o, 1), nn.BatchNorm1d(o), nn.ReLU()) for i, o in widths)
        )
        self.whole = nn.Sequential(nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 5))

    def forward(self, cloud: Tensor) -> Tensor:
        return self.whole(self.points(cloud.transpose(1, 2)).max(2)[0])


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(),
        nn.Linear(16, 5),
    )  # fmt: skip


INPUTS = {Pictures: (3, 8, 8), Cloud: (12, 3), perceptron: (10,)}


def batches(shape, count: int = 2):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, *shape, generator=generator), torch.arange(8) % 5) for _ in range(count)
    ]


@pytest.fixture(params=INPUTS, ids=["pictures", "cloud", "perceptron"])
def network(request):
    torch.manual_seed(0)
    return randomise(request.param()).eval(), INPUTS[request.param]


def test_the_chain_computes_what_the_network_does_and_leaves_it_alone(network):
    model, shape = network
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    backbone = as_backbone(model, torch.zeros(1, *shape))
    x = batches(shape)[0][0]
    with torch.no_grad():
        assert torch.equal(backbone.model(x), model(x))
    backbone.check(x)
    assert set(vars(model)) == attributes and not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_first_operation_in_place_leaves_the_example_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), *perceptron())
    example = torch.full((1, 10), -1.0)
    as_backbone(model, example)
    assert torch.equal(example, torch.full((1, 10), -1.0))


def test_modules_keep_their_names_and_glue_gets_new_ones():
    backbone = as_backbone(Pictures(), torch.zeros(1, 3, 8, 8))
    assert backbone.chain == (
        "stem.0", "stem.1", "mul", "body.0", "body.1", "down", "deep.0", "deep.1", "last", "relu",
    )  # fmt: skip
    assert backbone.head == ("mean", "fc")
    assert dict(backbone.model.named_parameters()).keys() == {
        "mul.scale" if name == "scale" else name for name, _ in Pictures().named_parameters()
    }


def test_a_module_that_is_called_again_is_a_link_of_its_own():
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(4))
            self.act, self.mixed, self.fc = nn.GELU(), nn.Linear(10, 10), nn.Linear(10, 5)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.act(self.mixed(self.act(layer(x))))
            return self.fc(x)

    torch.manual_seed(0)
    model = Again()
    backbone = as_backbone(model, torch.zeros(1, 10))
    assert len(set(backbone.chain)) == len(backbone.chain) == 16
    tree = sb.TreeSpec.balanced(1, cuts=("layers.2",), projection_dim=8)
    net = sb.convert(model, batches((10,)), tree)
    x = batches((10,))[0][0]
    whole = sb.convert(model, batches((10,)), replace(tree, widths=(10,), shares=(1.0,)))
    assert torch.allclose(whole(x), model(x), atol=1e-5) and net(x).shape == (8, 5)


def test_stages_begin_where_the_shape_changes():
    backbone = as_backbone(Pictures(), torch.zeros(1, 3, 8, 8))
    assert {"down", "last"} <= set(backbone.stages)
    assert as_backbone(Cloud(), torch.zeros(1, 12, 3)).stages[-1].startswith("points.2")


def test_a_module_that_holds_most_of_the_network_is_looked_into():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = Pictures()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

    backbone = as_backbone(Wrapped(), torch.zeros(1, 3, 8, 8))
    assert "network.down" in backbone.chain


def test_any_network_is_converted_checked_saved_and_loaded(network, tmp_path):
    model, shape = network
    net = sb.convert(model, batches(shape), sb.TreeSpec.balanced(1, projection_dim=8))
    x = batches(shape)[0][0]
    assert all(
        node["max_error"] < 1e-9 for stages in net.record["nodes"].values() for node in stages
    )
    net.save(tmp_path / "net")
    again = sb.load(tmp_path / "net", skeleton=model)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    with pytest.raises(CheckpointError, match="network of your own: pass one of the same shape"):
        sb.load(tmp_path / "net")


def test_a_tree_that_keeps_everything_is_the_network():
    torch.manual_seed(0)
    model = randomise(Pictures()).eval()
    tree = sb.TreeSpec(cuts=("down", "last"), widths=(16, 24), shares=(1.0, 1.0), projection_dim=8)
    net = sb.convert(model, batches((3, 8, 8)), tree, spec=sb.ConversionSpec(norm_samples=0))
    x = batches((3, 8, 8))[0][0]
    with torch.no_grad():
        assert torch.allclose(net(x), model(x), atol=1e-5)


def test_a_branched_network_of_the_users_own_is_packed_and_run(tmp_path):
    torch.manual_seed(0)
    model = randomise(Pictures()).eval()
    net = sb.convert(model, batches((3, 8, 8)), sb.TreeSpec.balanced(1, projection_dim=8))
    x = batches((3, 8, 8))[0][0][:1]
    sb.pack(net, tmp_path / "package", x)
    with sb.Runtime.open(tmp_path / "package", skeleton=model) as runtime, torch.no_grad():
        assert torch.allclose(runtime.predict(x).logits, net(x), atol=1e-5)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda self, x: self.fc(x) if x.sum() > 0 else self.fc(-x), "cannot be followed"),
        (lambda self, x: self.fc(x * (x.sum().item() > 0)), "reads what a tensor holds"),
        (lambda self, x: (self.fc(x), x), "tensor of logits|returns"),
        (lambda self, x: torch.zeros(len(x), 5), "does not depend on its input|be followed"),
        (lambda self, x: self.conv(x[:, :, None, None]), "not one vector of logits"),
        (lambda self, x: self.fc(x), "cannot be cut before its head"),
    ],
    ids=["values", "numbers", "two outputs", "constant", "maps", "one layer"],
)
def test_what_cannot_be_cut_is_refused_in_one_line(forward, why, capfd):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.conv = nn.Linear(4, 5), nn.Conv2d(4, 5, 1)

    Odd.forward = forward
    with pytest.raises(ConversionError, match=why) as caught:
        as_backbone(Odd(), torch.ones(1, 4))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_without_an_example_only_known_families_are_cut():
    with pytest.raises(ConfigError, match="no adapter for Pictures: pass an example input"):
        as_backbone(Pictures())


def test_an_unknown_pool_is_refused():
    with pytest.raises(ConfigError, match="no pool 'median'"):
        as_backbone(Pictures(), torch.zeros(1, 3, 8, 8), pool="median")
    with pytest.raises(ConfigError, match="no pool 'first' for channels along dimension 1"):
        as_backbone(Pictures(), torch.zeros(1, 3, 8, 8), pool="first")


class Fuse(nn.Module):
    """Changes the list that it is given."""

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        parts[0] = parts[0] + parts[1]
        return parts


class Resolutions(nn.Module):
    """Several tensors at once in a list, in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.fuse = Fuse()
        self.wide, self.fc = nn.Conv2d(8, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.fuse([x, self.second(x)])[0]
        return self.fc(self.wide(x).relu().mean((2, 3)))


def test_a_module_may_change_the_list_that_it_is_given():
    model = Resolutions().eval()
    backbone = as_backbone(model, torch.randn(1, 3, 8, 8))
    assert backbone.chain[0] == "stem" and "wide" in backbone.chain
    backbone.check(torch.randn(2, 3, 8, 8))


class Mixed(nn.Module):
    """Maps first, tokens afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 2, 2)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 20)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(x).relu()).relu()
        x = self.second(self.first(x.flatten(2).transpose(1, 2)).relu())
        return self.fc(x.mean(1))


def test_routers_read_maps_and_tokens_of_one_network():
    model, images = Mixed().eval(), torch.randn(2, 3, 8, 8)
    backbone = as_backbone(model, images[:1])
    assert {"down", "second"} <= set(backbone.stages)
    feature, seen = images, {}
    for path in backbone.chain:
        feature = backbone.model.get_submodule(path)(feature)
        seen[path] = backbone.pool(feature)
    assert torch.equal(seen["down"], model.down(model.stem(images).relu()).mean((2, 3)))
    assert seen["second"].shape == (2, 20)
    tree = sb.TreeSpec(projection_dim=4, cuts=("down", "second"))
    net = sb.convert(model, batches((3, 8, 8)), tree)
    assert net(images).shape == (2, 5)


def test_sequences_with_channels_before_positions_are_pooled_over_positions():
    points = nn.Sequential(
        *(nn.Conv1d(3, 16, 1), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.ReLU()),
        *(nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(32, 5)),
    ).eval()
    backbone = as_backbone(points, torch.randn(1, 3, 32))
    assert backbone.pool(torch.randn(2, 16, 32)).shape == (2, 16)


class Pairs(nn.Module):
    """A block that hands two tensors on."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 1)

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.mix(both[0]), both[1] + 1


def test_a_network_of_pairs_is_refused_by_the_name_of_its_blocks():
    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.blocks, self.fc = nn.Sequential(Pairs(), Pairs()), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x, _ = self.blocks((self.left(x), self.right(x)))
            return self.fc(x.relu().mean((2, 3)))

    with pytest.raises(ConversionError, match=r"blocks\.0 hands on several tensors") as caught:
        as_backbone(Paired(), torch.randn(1, 3, 8, 8))
    assert "\n" not in str(caught.value)


def test_modules_whose_copies_would_share_a_name_are_refused():
    model = nn.Sequential(
        OrderedDict(
            a=nn.Sequential(nn.Linear(4, 4)), a_0=nn.Linear(4, 4), b=nn.Linear(4, 4),
            head=nn.Linear(4, 2),
        )
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"the copies of a\.0 and a_0 would share a name"):
        Backbone(model=model, chain=("a.0", "a_0", "b"), stages=("b",), head=("head",))
