"""A PointNet-style network of one's own: clouds, a vector feature, and a head with a layer."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import sigmabranch as sb
from conftest import randomise
from sigmabranch.errors import ConversionError

CLASSES, POINTS = 4, 12


class Max(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax(2)


class Pool(nn.Module):
    """Mean over the points, if there still are points."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2) if x.ndim == 3 else x


def shared(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Conv1d(inputs, outputs, 1, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return layers


def connected(inputs: int, outputs: int) -> nn.Module:
    layers = (nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Dropout(0.4))
    return nn.Sequential(*layers)


class PointNet(nn.Module):
    """(B, 3, P) points → logits."""

    def __init__(self) -> None:
        super().__init__()
        self.sa2 = nn.Sequential(*shared(3, 8, 16))
        self.sa3 = nn.Sequential(*shared(16, 16, 24, 32), Max())
        self.fc1 = connected(32, 24)
        self.fc2 = connected(24, 12)
        self.fc3 = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(self.sa3(self.sa2(x)))))


@pytest.fixture(scope="module")
def backbone() -> sb.Backbone:
    return sb.Backbone(
        model=randomise(PointNet()),
        chain=("sa2", "sa3", "fc1"),
        stages=("sa3", "fc1"),
        pool=Pool(),
        head=("fc2", "fc3"),
    )


@pytest.fixture(scope="module")
def clouds():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % CLASSES
    x = torch.randn(60, 3, POINTS, generator=generator) * (1 + y[:, None, None])
    return list(zip(x.split(20), y.split(20), strict=True))


def converted(backbone, clouds, **fields) -> sb.SigmaBranchNet:
    tree = sb.TreeSpec(projection_dim=8, cuts=("sa3", "fc1"), **fields)
    return sb.convert(backbone, clouds, tree, spec=sb.ConversionSpec(norm_samples=0))


def test_a_point_network_is_cut_exactly(backbone, clouds):
    net = converted(backbone, clouds)
    assert net.record["widths"] == [23, 12]
    for stages in net.record["nodes"].values():
        assert all(channels["max_error"] <= 1e-5 for channels in stages)
    with torch.no_grad():
        soft, hard = net.soft(clouds[0][0]), net.hard(clouds[0][0])
    rows = torch.arange(20)
    assert torch.allclose(hard.logits, soft.logits[rows, hard.leaf], atol=1e-5)


def test_a_head_with_a_layer_of_its_own_is_cut_like_a_stage(backbone, clouds):
    """By hand: fc2 keeps its strongest rows, the columns of its leaf, and fc3 those rows."""
    net, state = converted(backbone, clouds), backbone.model.state_dict()
    strongest = state["fc2.0.weight"].abs().sum(1).argsort(descending=True)
    rows = strongest[: round(12 * 12 / 24)].sort().values
    for leaf in net.tree.leaves:
        (channels,) = net.record["nodes"][sb.tree.node_key(leaf)]
        head = net.head(leaf).state_dict()
        assert torch.equal(head["fc2.0.weight"], state["fc2.0.weight"][rows][:, channels["kept"]])
        assert torch.equal(head["fc2.1.running_var"], state["fc2.1.running_var"][rows])
        assert torch.equal(head["fc3.weight"], state["fc3.weight"][:, rows])
        assert torch.equal(head["fc3.bias"], state["fc3.bias"])


def test_nodes_that_keep_everything_give_the_dense_logits(backbone, clouds):
    net, x = converted(backbone, clouds, widths=(32, 24)), clouds[0][0]
    with torch.no_grad():
        logits, expected = net.soft(x).logits, backbone.model(x)[:, None]
    assert (logits - expected).abs().max() <= 1e-5


def test_a_wrong_head_is_caught(backbone, clouds, monkeypatch):
    honest = sb.Backbone.pooled_head

    def shifted(self, plan):
        head = honest(self, plan)
        head.fc3.weight.copy_(head.fc3.weight.roll(1, dims=1))
        return head

    monkeypatch.setattr(sb.Backbone, "pooled_head", shifted)
    with pytest.raises(ConversionError, match="fc3"):
        converted(backbone, clouds)


def test_norms_of_a_head_are_re_estimated_too(backbone, clouds):
    net = sb.convert(backbone, clouds, sb.TreeSpec(projection_dim=8, cuts=("sa3", "fc1")))
    kept = converted(backbone, clouds)
    fresh, old = (n.head((0, 0)).fc2[1].running_mean for n in (net, kept))
    assert not torch.equal(fresh, old)
