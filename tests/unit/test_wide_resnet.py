"""Wide ResNets: the published size, and cuts of pre-activated blocks that are exact."""

from __future__ import annotations

import json

import pytest
import torch

import sigmabranch as sb
from conftest import CLASSES, randomise
from sigmabranch.backbones import FAMILIES, WideResNetSpec, as_backbone
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.measure import cost

TINY = WideResNetSpec(
    depth=16, widths=(8, 12, 16), strides=(1, 2, 2), stem_width=4, in_channels=1, classes=CLASSES
)


@pytest.fixture(scope="module")
def wide():
    return randomise(TINY.build())


def test_wrn_28_10_has_the_published_size():
    """36.54 M parameters (arXiv 1605.07146, table 5: 36.5 M) and 5.24 G multiply-adds."""
    pytest.importorskip("fvcore")
    with torch.device("meta"):
        network = WideResNetSpec().build()
    counted = cost(network, torch.zeros(1, 3, 32, 32))["dense"]
    assert counted["params"] == 36_536_884
    assert counted["macs_flop_counter"] == 5_243_386_368
    assert sum(isinstance(m, torch.nn.Conv2d) for m in network.modules()) == 28


def test_a_block_reads_its_input_through_norm_and_relu_but_adds_it_bare(wide):
    block = wide.layer1[1]
    x = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        before = x.clone()
        inner = block.conv2(block.bn2(block.conv1(block.bn1(x).relu())).relu())
        assert torch.allclose(block(x), x + inner, atol=1e-5)
        assert torch.equal(x, before)
        first = wide.layer2[0]
        assert first.shortcut is not None and block.shortcut is None
        activated = first.bn1(x).relu()
        inner = first.conv2(first.bn2(first.conv1(activated)).relu())
        assert torch.allclose(first(x), first.shortcut(activated) + inner, atol=1e-5)


def test_the_parts_in_a_row_are_the_network(wide):
    backbone = as_backbone(wide)
    assert backbone.stages == ("layer1", "layer2", "layer3")
    assert backbone.chain[-2:] == ("norm", "act")
    backbone.check(torch.randn(2, 1, 8, 8))


def test_a_tree_that_keeps_everything_gives_the_dense_logits(wide, batches):
    tree = sb.TreeSpec.balanced(2, widths=(12, 16))
    net = sb.convert(wide, batches, tree, spec=sb.ConversionSpec(norm_samples=0, restarts=1))
    x = batches[0][0][:4]
    with torch.no_grad():
        logits, expected = net.soft(x).logits, wide(x)[:, None]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_cut_tree_equals_the_masked_network_and_survives_the_disk(wide, batches, tmp_path):
    tree = sb.TreeSpec(leaves=((0,), (1, 0), (1, 1)), widths=(7, 9))
    spec = sb.ConversionSpec(norm_samples=32, restarts=2)
    net = sb.convert(wide, batches, tree, spec=spec)
    kept = {len(stage["kept"]) for stages in net.record["nodes"].values() for stage in stages}
    assert kept == {7, 9}
    assert all(s["max_error"] <= 1e-5 for n in net.record["nodes"].values() for s in n)
    x = batches[0][0]
    with torch.no_grad():
        soft, hard = net.soft(x).logits, net.hard(x)
        net.save(tmp_path)
        assert torch.equal(sb.load(tmp_path).soft(x).logits, soft)
    rows = torch.arange(len(x))
    assert torch.allclose(hard.logits, soft[rows, hard.leaf], rtol=1e-4, atol=1e-4)
    # The first norm of level 1 reads the whole trunk, that of level 2 only what was kept.
    assert net.specializer((0,)).layer2[0].bn1.num_features == 8
    assert net.specializer((1, 0)).layer3[0].bn1.num_features == 7


def test_no_level_begins_inside_a_stage_of_one_width(batches):
    spec = WideResNetSpec(
        depth=16, widths=(8, 8, 12), strides=(1, 1, 2), in_channels=1, classes=CLASSES
    )
    tree = sb.TreeSpec.balanced(1, cuts=("layer2",))
    with pytest.raises(sb.SigmaBranchError, match="identity shortcut"):
        sb.convert(
            spec.build(),
            batches,
            sb.TreeSpec.balanced(2, cuts=("layer2", "layer3"), entry="project"),
            spec=sb.ConversionSpec(restarts=1),
        )
    net = sb.convert(randomise(spec.build()), batches, tree, spec=sb.ConversionSpec(restarts=1))
    assert net.record["nodes"]["0"][0]["stage"] == "act"


def test_the_spec_survives_json_and_narrows():
    assert FAMILIES["wide-resnet"].from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    assert WideResNetSpec(depth=16, widen=2).stage_widths == (32, 64, 128)
    narrow = WideResNetSpec(widen=1).narrowed(0.5, 3)
    assert (narrow.widths, narrow.stem_width, narrow.blocks) == ((8, 16, 35), 8, 4)
    assert narrow.build().fc.in_features == 35


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"depth": 27}, "multiple of 6, got 27"),
        ({"depth": 4}, "multiple of 6, got 4"),
        ({"widths": (8, 8)}, "as many widths as strides"),
        ({"strides": ()}, "as many widths as strides"),
        ({"widths": (8, 0, 8)}, "at least 1"),
        ({"widen": 0}, "at least 1"),
        ({"blocks": 3}, "unknown Wide ResNet key 'blocks'"),
        ({"widen": 2.5}, "widen must be int"),
    ],
)
def test_a_shape_that_is_none_is_refused(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        WideResNetSpec.from_dict(fields)


@pytest.mark.parametrize(
    ("shape", "reason"), [((1, 8, 8), "images have 1 channels"), ((1024, 3), "takes images")]
)
def test_data_of_another_shape_are_refused(shape, reason):
    with pytest.raises(DataError, match=reason):
        WideResNetSpec().check_input(shape)
