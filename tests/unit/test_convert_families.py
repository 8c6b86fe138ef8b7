"""ResNets of timm and torchvision through conversion, both passes, and back from disk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sigmabranch as sb
from conftest import randomise
from sigmabranch.backbones.timm import create_timm

# The smallest images that leave more than one position to the last stage.
SIZE, CLASSES = 40, 6
NAMES = ["resnet18", "resnet50", "seresnet50", "resnext50_32x4d", "test_resnet"]


pytestmark = pytest.mark.usefixtures("timm")


@pytest.fixture(scope="module")
def loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, SIZE, SIZE, generator=generator)
    return [(x, torch.arange(16) % CLASSES)]


def skeleton(name: str) -> nn.Module:
    if name.startswith("torchvision"):
        models = pytest.importorskip("torchvision.models")
        return getattr(models, name.partition(" ")[2])(num_classes=CLASSES)
    return create_timm(name, num_classes=CLASSES)


@pytest.mark.parametrize("name", [*NAMES, "torchvision resnet18"])
def test_the_family_is_converted_run_and_loaded(name, loader, tmp_path):
    dense, (x, _) = randomise(skeleton(name)), loader[0]
    spec = sb.ConversionSpec(norm_samples=16, restarts=2)
    net = sb.convert(dense, loader, sb.TreeSpec.balanced(1), spec=spec)
    for (channels,) in net.record["nodes"].values():
        assert channels["max_error"] <= 1e-5
        assert channels["stage"] == "layer4"
        assert channels["norm_reestimated"]
    net.save(tmp_path)
    again = sb.load(tmp_path, skeleton=skeleton(name))
    with torch.no_grad():
        soft, hard = net.soft(x), net.hard(x)
        rows = torch.arange(len(x))
        assert torch.allclose(hard.logits, soft.logits[rows, hard.leaf], rtol=1e-4, atol=1e-4)
        assert hard.leaf.bincount(minlength=2).tolist() == net.record["splits"]["root"]["sizes"]
        assert torch.equal(again.soft(x).logits, soft.logits)


@pytest.mark.parametrize("name", NAMES)
def test_nodes_that_keep_everything_give_the_dense_logits(name, loader):
    dense, (x, _) = randomise(skeleton(name)), loader[0]
    width = dense.fc.in_features
    tree = sb.TreeSpec.balanced(1, widths=(width,))
    net = sb.convert(dense, loader, tree, spec=sb.ConversionSpec(norm_samples=0, restarts=1))
    with torch.no_grad():
        logits, expected = net.soft(x[:4]).logits, dense(x[:4])[:, None]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_two_levels_of_a_grouped_network_are_exact(loader):
    """Groups stay whole at both levels, one of which reads what the other kept."""
    dense = randomise(skeleton("resnext50_32x4d"))
    tree = sb.TreeSpec(leaves=((0,), (1, 0), (1, 1)))
    net = sb.convert(dense, loader, tree, spec=sb.ConversionSpec(norm_samples=0, restarts=1))
    for stages in net.record["nodes"].values():
        assert all(channels["max_error"] <= 1e-5 for channels in stages)
    with torch.no_grad():
        assert net.soft(loader[0][0][:2]).logits.shape == (2, 3, CLASSES)
