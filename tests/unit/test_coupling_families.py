"""Networks of other libraries: every free group of channels is cut, and the cut is exact."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn

from sigmabranch.backbones.timm import create_timm
from sigmabranch.coupling import (
    CouplingMap,
    plan_slices,
    trace,
    unit_scores_l1,
    verify_slice,
)
from sigmabranch.errors import ConfigError, UnsupportedOperation

pytestmark = pytest.mark.usefixtures("timm")


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and affines, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=generator)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif not tensor.any():
            tensor.normal_(0, 0.05, generator=generator)
    return net.eval()


def cut_everything(
    coupling: CouplingMap, share: float = 0.7, *, exact: bool = True
) -> dict[str, Tensor]:
    """A random part of the units of every space that may be cut (exactly)."""
    generator = torch.Generator().manual_seed(1)
    taboo = coupling.fixed.keys() | (coupling.inexact.keys() if exact else set())
    keep = {}
    for space in coupling.spaces:
        if taboo.isdisjoint(space.units.tolist()):
            order = torch.randperm(len(space), generator=generator)
            keep[space.name] = space.units[order[: max(1, int(share * len(space)))]]
    return keep


def error_of_whole_cut(net: nn.Module, size: int) -> tuple[float, int]:
    """(relative error, dropped parameters) of cutting all that can be cut exactly."""
    coupling = trace(net, torch.zeros(1, 3, size, size), watch=[""])
    keep = cut_everything(coupling)
    plan = plan_slices(net, coupling, keep)
    sliced = copy.deepcopy(net)
    plan.reshape(sliced)
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    error = verify_slice(net, [""], sliced, image, coupling=coupling, keep=keep)
    before, after = plan.parameter_counts(net)
    return error, before - after


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "seresnet50", "resnext50_32x4d", "test_resnet", "resnet26d"],
)
def test_resnets_can_be_cut_everywhere(name: str) -> None:
    net = randomised(create_timm(name, num_classes=10))
    coupling = trace(net, torch.zeros(1, 3, 64, 64))
    assert set(coupling.fixed.values()) == {"the model's output"}
    assert not coupling.inexact
    error, dropped = error_of_whole_cut(net, 64)
    assert error < 1e-5
    assert dropped > 0.35 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_byobnet", "test_vit", "test_convnext", "regnety_002"]
)
def test_other_families_are_exact_where_they_promise_it(name: str) -> None:
    error, dropped = error_of_whole_cut(randomised(create_timm(name, num_classes=10)), 160)
    assert error < 1e-5
    assert dropped > 0


def test_torchvision_resnet_can_be_cut_everywhere() -> None:
    models = pytest.importorskip("torchvision.models")
    error, dropped = error_of_whole_cut(randomised(models.resnet18(num_classes=10)), 64)
    assert error < 1e-5
    assert dropped > 4_000_000


def test_layer_norm_width_is_flagged_not_promised() -> None:
    net = randomised(create_timm("test_convnext", num_classes=10))
    coupling = trace(net, torch.zeros(1, 3, 64, 64), watch=["stages.1", "stages.2"])
    units = coupling.output_axis("stages.1").units.tolist()
    assert all("layer_norm" in coupling.inexact[unit] for unit in units)


def test_standardised_weights_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedOperation, match=r"aten\.convolution in stem\.conv1 "):
        trace(create_timm("test_nfnet"), torch.zeros(1, 3, 64, 64))


def test_resnet50_stage_has_the_published_size() -> None:
    """layer3 with 724 outputs and 181 planes (paper, Table III)."""
    net = randomised(create_timm("resnet50", num_classes=10))
    started = time.perf_counter()
    coupling = trace(net, torch.zeros(1, 3, 224, 224), watch=["layer2", "layer3"])
    assert time.perf_counter() - started < 10
    keep = {coupling.space_of_output("layer3"): coupling.output_axis("layer3").units[300:]}
    state = net.state_dict()
    for space in coupling.inner_spaces(["layer3"]):
        best = unit_scores_l1(coupling, state, space).topk(181).indices
        keep[space] = space.units[best]
    assert len(keep) == 13
    plan = plan_slices(net, coupling, keep).restrict(["layer3"])
    section = copy.deepcopy(net.layer3)
    plan.reshape(section, "layer3")
    assert sum(p.numel() for p in section.parameters()) == 3_688_418
    feature = torch.randn(1, 512, 8, 8)
    error = verify_slice(
        net, ["layer3"], section, feature, coupling=coupling, keep=keep, entry="layer2"
    )
    assert error < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torch_pruning_cuts_the_same_tensors(name: str) -> None:
    """An independent engine, on a family where it is right."""
    pruning = pytest.importorskip("torch_pruning")
    net = create_timm(name, num_classes=10).eval()
    image = torch.randn(1, 3, 64, 64)
    coupling = trace(net, image)
    generator = torch.Generator().manual_seed(0)
    for layer in ("layer3.0.conv1", "layer3.1.conv2", "layer2.0.downsample.0", "conv1"):
        unit = coupling.axes[f"{layer}.weight"][0]
        gone = torch.randperm(len(unit), generator=generator)[: len(unit) // 3]
        theirs = copy.deepcopy(net)
        graph = pruning.DependencyGraph().build_dependency(theirs, image)
        root = theirs.get_submodule(layer)
        graph.get_pruning_group(root, pruning.prune_conv_out_channels, gone.tolist()).prune()
        space = coupling.space_with(unit)
        stays = space.units[~torch.isin(space.units, unit[gone])]
        ours = plan_slices(net, coupling, {space: stays}).apply(net.state_dict())
        for key, tensor in theirs.state_dict().items():
            assert torch.equal(ours[key], tensor), (layer, key)


def test_an_unknown_timm_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="resnet5000"):
        create_timm("resnet5000")
