"""ConvNeXts: timm's arithmetic, the published size, and trees whose cuts are not exact."""

from __future__ import annotations

import json
import math

import pytest
import torch

import sigmabranch as sb
from conftest import CLASSES, randomise
from sigmabranch.backbones import FAMILIES, ConvNeXtSpec, as_backbone
from sigmabranch.backbones.timm import create_timm
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.measure import cost
from sigmabranch.peers import dense_of_size
from sigmabranch.saving import load_dense, save_dense
from sigmabranch.tasks import count_task, find_task
from sigmabranch.training import Recipe
from sigmabranch.training.optim import build_optimizer

TINY = ConvNeXtSpec(
    layers=(1, 2, 1),
    widths=(8, 12, 16),
    strides=(1, 2, 1),
    patch=2,
    kernel=3,
    in_channels=1,
    classes=CLASSES,
)
TASK = find_task("cifar100-convnext")


@pytest.fixture(scope="module")
def convnext():
    return randomise(TINY.build())


def params(spec: ConvNeXtSpec) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in spec.build().parameters())


# -- the dense network ---------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [3, 7])
def test_it_computes_what_timms_does_from_the_same_weights(kernel, timm):
    ours = randomise(
        ConvNeXtSpec(
            layers=(1, 2, 1, 1), widths=(8, 12, 12, 16), kernel=kernel, in_channels=1, classes=5
        ).build()
    )
    theirs = create_timm(
        "convnext_tiny",
        depths=(1, 2, 1, 1),
        dims=(8, 12, 12, 16),
        kernel_sizes=kernel,
        in_chans=1,
        num_classes=5,
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 1, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_convnext_t_has_the_published_size():
    """28.6 M parameters and 4.5 G multiply-adds (arXiv 2201.03545, table 1)."""
    pytest.importorskip("fvcore")
    with torch.device("meta"):
        network = ConvNeXtSpec().build()
    counted = cost(network, torch.zeros(1, 3, 224, 224))["dense"]
    assert counted["params"] == 28_589_128
    assert counted["macs_flop_counter"] == 4_455_531_264


def test_a_fresh_block_hands_its_input_on():
    block = TINY.build().stages[0].blocks[0]
    x = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        assert 0 < (block(x) - x).abs().max() < 1e-5


def test_positions_are_normalised_each_by_itself(convnext):
    x = torch.randn(2, 8, 4, 4)
    norm = convnext.stages[1].downsample[0]
    with torch.no_grad():
        centred = x - x.mean(1, keepdim=True)
        expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        expected = expected * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        assert torch.allclose(norm(x), expected, atol=1e-5)


def test_biases_norms_and_scales_are_not_decayed(convnext):
    decayed, plain = build_optimizer(convnext, Recipe(weight_decay=0.1)).param_groups
    assert plain["weight_decay"] == 0
    gamma = convnext.stages[0].blocks[0].gamma
    assert any(parameter is gamma for parameter in plain["params"])
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])


def test_it_comes_back_from_disk_without_a_skeleton(convnext, tmp_path):
    save_dense(convnext, tmp_path / "dense")
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_dense(tmp_path / "dense")(x), convnext(x))


# -- trees ---------------------------------------------------------------------------------------


def test_the_parts_in_a_row_are_the_network(convnext):
    backbone = as_backbone(convnext)
    assert backbone.stages == ("stages.0", "stages.1", "stages.2")
    backbone.check(torch.randn(2, 1, 8, 8))


def test_a_tree_that_keeps_everything_gives_the_dense_logits(convnext, batches):
    tree = sb.TreeSpec.balanced(2, widths=(12, 16))
    net = sb.convert(convnext, batches, tree, spec=sb.ConversionSpec(restarts=1))
    x = batches[0][0][:4]
    with torch.no_grad():
        logits, expected = net.soft(x).logits, convnext(x)[:, None]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    stages = [stage for stages in net.record["nodes"].values() for stage in stages]
    assert all(stage["max_error"] <= 1e-5 for stage in stages)


def test_a_cut_tree_says_how_far_its_norms_are_off_and_survives_the_disk(
    convnext, batches, tmp_path
):
    tree = sb.TreeSpec(leaves=((0,), (1, 0), (1, 1)))
    net = sb.convert(convnext, batches, tree, spec=sb.ConversionSpec(restarts=2))
    for stages in net.record["nodes"].values():
        for stage in stages:
            assert 1e-5 < stage["max_error"] < math.inf
            assert not stage["norm_reestimated"]
    # The first norm of level 1 reads the whole trunk, that of level 2 only what was kept.
    assert net.specializer((0,)).stages_1.downsample[0].normalized_shape == (8,)
    kept = net.record["widths"][0]
    assert net.specializer((1, 0)).stages_2.downsample[0].normalized_shape == (kept,)
    assert net.specializer((1, 0)).stages_2.blocks[0].conv_dw.groups == net.record["widths"][1]
    x = batches[0][0]
    with torch.no_grad():
        soft, hard = net.soft(x).logits, net.hard(x)
        net.save(tmp_path)
        assert torch.equal(sb.load(tmp_path).soft(x).logits, soft)
    rows = torch.arange(len(x))
    assert torch.allclose(hard.logits, soft[rows, hard.leaf], rtol=1e-4, atol=1e-4)


def test_the_tasks_path_reads_less_than_half():
    pytest.importorskip("fvcore")
    counted = count_task(TASK)
    assert counted["dense"]["params"] == params(TASK.model) == 630_556
    assert counted["net"]["active_params"] < 0.45 * counted["dense"]["params"]


# -- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [TASK.model, ConvNeXtSpec()], ids=["task", "ConvNeXt-T"])
@pytest.mark.parametrize("share", [0.2, 0.43, 0.61, 0.8])
def test_any_size_is_met_within_one_percent(spec, share):
    goal = round(share * params(spec))
    assert params(dense_of_size(spec, goal)) == pytest.approx(goal, rel=0.01)


def test_the_spec_survives_json_and_narrows():
    assert FAMILIES["convnext"].from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    narrow = TINY.narrowed(0.5, 3)
    assert (narrow.widths, narrow.layers, narrow.strides) == ((4, 6, 11), (1, 2, 1), (1, 2, 1))
    assert narrow.build().head.fc.in_features == 11


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"widths": (8, 8)}, "as many layers as widths and strides"),
        ({"layers": (), "widths": (), "strides": ()}, "at least one"),
        ({"widths": (8, 0, 8)}, "at least 1"),
        ({"layers": (1, 0, 1)}, "at least 1"),
        ({"patch": 0}, "at least 1"),
        ({"kernel": 4}, "must be odd, got 4"),
        ({"mlp_ratio": 0}, "without units"),
        ({"mlp_ratio": 0.01}, "without units"),
        ({"mlp_ratio": math.nan}, "without units"),
        ({"planes": 3}, "unknown ConvNeXt key 'planes'"),
        ({"kernel": 3.5}, "kernel must be int"),
    ],
)
def test_a_shape_that_is_none_is_refused_in_one_line(fields, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        ConvNeXtSpec.from_dict({**TINY.to_dict(), **fields})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((3, 8, 8), "model.in_channels=3"),
        ((128, 3), "takes images"),
        ((1, 3, 8), "3 x 8 pixels but the network needs at least 4"),
    ],
)
def test_data_that_do_not_fit_are_refused(shape, reason):
    TINY.check_input((1, 4, 5))
    with pytest.raises(DataError, match=reason):
        TINY.check_input(shape)
