"""A trunk with fewer channels inside: exact cuts, and everything that follows works on it."""

from __future__ import annotations

import pytest
import torch

from sigmabranch.conversion import ConversionSpec, blueprint, convert, rebuild, single_path
from sigmabranch.errors import ConfigError
from sigmabranch.measure import cost
from sigmabranch.saving import load_net
from sigmabranch.tree import TreeSpec

SPEC = ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)


def tree(**fields):
    return TreeSpec(projection_dim=8, **fields)


@pytest.fixture(scope="module")
def slim(dense, batches):
    return convert(dense, batches, tree(trunk_share=0.5), spec=SPEC)


def test_half_the_channels_inside_the_trunk_are_gone_and_its_output_keeps_its_width(dense, slim):
    assert slim.trunk(torch.randn(2, 1, 8, 8)).shape[:2] == (2, dense.layer3[0].conv1.in_channels)
    assert slim.trunk.layer2[0].conv1.weight.shape[0] == dense.layer2[0].conv1.weight.shape[0] // 2
    assert slim.trunk.conv1.weight.shape[0] == dense.conv1.weight.shape[0] // 2


def test_a_slim_trunk_costs_fewer_operations_and_parameters(dense, batches, slim):
    pytest.importorskip("fvcore")
    x = batches[0][0][:1]
    whole = blueprint(dense, x, tree())
    before, after = (cost(net, x)["net"] for net in (whole, slim))
    assert after["macs"] < 0.8 * before["macs"]
    assert after["active_params"] < before["active_params"]


def test_a_whole_trunk_is_that_of_the_dense_network(dense, batches):
    x = batches[0][0][:4]
    net = convert(dense, batches, tree(trunk_share=1.0), spec=ConversionSpec(norm_samples=0))
    with torch.no_grad():
        expected = x
        for name, _ in net.trunk.named_children():
            expected = dense.get_submodule(name)(expected)
        torch.testing.assert_close(net.trunk(x), expected)


def test_its_batch_norms_have_seen_the_data(dense, batches, slim):
    kept = convert(dense, batches, tree(trunk_share=0.5), spec=ConversionSpec(norm_samples=0))
    before, after = kept.trunk.layer2[0], slim.trunk.layer2[0]
    assert not torch.equal(before.bn1.running_mean, after.bn1.running_mean)
    assert torch.equal(before.conv1.weight, after.conv1.weight)


def test_it_is_saved_and_rebuilt(dense, batches, slim, tmp_path):
    x = batches[1][0]
    slim.save(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_net(tmp_path)(x), slim(x))
        torch.testing.assert_close(rebuild(dense, slim.record, batches)(x), slim(x))


def test_the_single_path_has_the_same_trunk(dense, batches, slim):
    path = single_path(dense, batches, tree(trunk_share=0.5), spec=SPEC)
    assert path.trunk.layer2[0].conv1.weight.shape == slim.trunk.layer2[0].conv1.weight.shape


def test_early_routers_read_the_slim_feature(dense, batches):
    net = convert(dense, batches, tree(trunk_share=0.5, decide_after="layer1"), spec=SPEC)
    x = batches[0][0]
    with torch.no_grad():
        assert net.router(()).channels == net.trunk_parts()[0](x).shape[1]
        assert torch.equal(net.hard(x).leaf, net.leaf_of(net.soft(x)))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ConfigError, match=r"trunk_share must lie in \(0, 1\]"):
        tree(trunk_share=share)
