"""The check against the masked dense network accepts right cuts and rejects wrong ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sigmabranch.coupling import masked_state, plan_slices, trace, verify_slice
from sigmabranch.errors import ConversionError


class PointStage(nn.Module):
    """Shared MLP over points, then the maximum, as PointNet does."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs + 3, width, 1, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Conv1d(width, outputs, 1)

    def forward(self, feature: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        place, value = feature
        value = self.second(self.norm(self.first(torch.cat([place, value], 1))).relu_())
        return place, value + value.amax(2, keepdim=True)


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near = PointStage(3, 8, 10)
        self.far = PointStage(10, 12, 16)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
        )

    def forward(self, cloud: Tensor) -> Tensor:
        return self.head(self.far(self.near((cloud, cloud)))[1].amax(2))


@pytest.fixture
def cut_net():
    torch.manual_seed(3)
    net = PointNet()
    cloud = torch.randn(2, 3, 20)
    net(cloud)  # gives the running statistics values
    coupling = trace(net, cloud[:1], watch=["near", "far"])
    keep = {
        coupling.space_of_output("near"): coupling.output_axis("near").units[[0, 3, 4, 8]],
        coupling.space_of_output("far"): coupling.output_axis("far").units[1:14],
        "far.first.weight": coupling.space("far.first.weight").units[::2],
    }
    plan = plan_slices(net, coupling, keep)
    with torch.no_grad():
        feature = net.eval().near((cloud, cloud))
    section = copy.deepcopy(net.far)
    plan.reshape(section, "far")
    return net, coupling, keep, section, feature


def check(cut_net, **changes) -> float:
    net, coupling, keep, section, feature = cut_net
    arguments = {"coupling": coupling, "keep": keep, "entry": "near"} | changes
    return verify_slice(net, ["far"], section, feature, **arguments)


def test_a_right_cut_is_exact_and_changes_nothing(cut_net) -> None:
    net, _, _, section, _ = cut_net
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weights = section.first.weight.clone()
    assert check(cut_net) < 1e-12
    assert net.training
    assert section.first.weight.dtype == torch.float32
    assert torch.equal(section.first.weight, weights)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", ["first.weight", "second.weight", "second.bias", "norm.bias"])
def test_rows_in_the_wrong_order_are_found(cut_net, name: str) -> None:
    section = cut_net[3]
    with torch.no_grad():
        tensor = section.get_parameter(name)
        tensor.copy_(tensor.roll(1, 0) + 0.1)
    with pytest.raises(ConversionError, match="far differs from the masked dense network"):
        check(cut_net)


def test_columns_in_the_wrong_order_are_found(cut_net) -> None:
    with torch.no_grad():
        weight = cut_net[3].first.weight
        weight.copy_(weight.roll(1, 1))
    with pytest.raises(ConversionError, match="differs"):
        check(cut_net)


def test_a_nan_is_found(cut_net) -> None:
    with torch.no_grad():
        cut_net[3].first.weight[0, 0] = torch.nan
    with pytest.raises(ConversionError, match="differs"):
        check(cut_net)


def test_a_section_that_does_not_fit_its_input_is_an_error(cut_net) -> None:
    with pytest.raises(ConversionError, match="sliced far does not run"):
        check(cut_net, entry=None)


def test_a_wrong_output_width_is_an_error(cut_net) -> None:
    net, coupling, keep, _, feature = cut_net
    keep = dict(keep)
    del keep[coupling.space_of_output("far")]
    with pytest.raises(ConversionError, match="returns shape"):
        verify_slice(net, ["far"], cut_net[3], feature, coupling=coupling, keep=keep, entry="near")


def test_an_unwatched_section_is_an_error(cut_net) -> None:
    net, coupling, keep, section, feature = cut_net
    with pytest.raises(ConversionError, match="not watched"):
        verify_slice(net, ["head"], section, feature, coupling=coupling, keep=keep)


def test_masking_silences_what_is_dropped_and_only_that(cut_net) -> None:
    net, coupling, keep, _, _ = cut_net
    state = net.state_dict()
    masked = masked_state(state, coupling, keep)
    gone = [1, 2, 5, 6, 7, 9]
    assert not bool(masked["near.second.weight"][gone].any())
    assert not bool(masked["near.second.bias"][gone].any())
    stays = [0, 3, 4, 8]
    assert torch.equal(masked["near.second.weight"][stays], state["near.second.weight"][stays])
    kept = slice(None, None, 2)
    assert torch.equal(masked["far.first.weight"][kept], state["far.first.weight"][kept])
    assert torch.equal(masked["far.first.weight"][::2, 5:7], state["far.first.weight"][::2, 5:7])
    assert masked["head.1.weight"] is state["head.1.weight"]


def test_an_inexact_cut_is_reported_not_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    coupling = trace(net, torch.zeros(1, 4), watch=["2"])
    keep = {"0.weight": coupling.space("0.weight").units[:5]}
    section = copy.deepcopy(net)
    plan_slices(net, coupling, keep).reshape(section)
    x = torch.randn(2, 4)
    error = verify_slice(net, ["0", "1", "2"], section, x, coupling=coupling, keep=keep)
    assert error > 1e-3


def whole_error(net: nn.Module, name: str, x: Tensor) -> float:
    """Error of the whole network with every second unit of one space."""
    coupling = trace(net, x[:1], watch=[""])
    keep = {name: coupling.space(name).units[::2]}
    sliced = copy.deepcopy(net)
    plan_slices(net, coupling, keep).reshape(sliced)
    return verify_slice(net, [""], sliced, x, coupling=coupling, keep=keep)


def test_an_activation_that_lifts_zero_is_no_false_alarm() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))
    assert whole_error(net, "0.weight", torch.randn(2, 4)) < 1e-12


def test_a_product_of_activations_is_no_false_alarm() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 6), nn.Linear(4, 6)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1) @ x)

    torch.manual_seed(0)
    assert whole_error(Attend(), "query.weight", torch.randn(2, 5, 4)) < 1e-12


def test_a_forward_with_positions_written_into_it_is_found() -> None:
    """The plan is right, but the module doubles its first two channels, whichever they are."""

    class Favourite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x[:, :2].mul_(2.0)
            return x

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Favourite(), nn.Linear(8, 3))
    with pytest.raises(ConversionError, match="differs"):
        whole_error(net, "0.weight", torch.randn(2, 4))
