from importlib.util import find_spec

import pytest
import torch
from torch import nn

from sigmabranch.backbones.base import GlobalAveragePool
from sigmabranch.backbones.resnet import Bottleneck, ResNet, ResNetSpec
from sigmabranch.measure import cost
from sigmabranch.net import SigmaBranchNet
from sigmabranch.routing import Router
from sigmabranch.tree import TreeSpec

pytestmark = pytest.mark.skipif(find_spec("fvcore") is None, reason="fvcore is not installed")


def stage(inputs, planes, blocks, stride):
    first = Bottleneck(inputs, planes, stride)
    return nn.Sequential(first, *(Bottleneck(4 * planes, planes, 1) for _ in range(blocks - 1)))


def branched_resnet50(dense, tree, planes, classes):
    """The paper's shapes, put together by hand: no conversion has a say in the counts."""
    widths = [512, *(4 * p for p in planes)]
    blocks, strides = (6, 3), (2, 2)
    pool = GlobalAveragePool()

    def specializer(node):
        return nn.Sequential(
            *(
                stage(widths[level - 1], planes[level - 1], blocks[level - 1], strides[level - 1])
                for level in tree.levels_of(node)
            )
        )

    return SigmaBranchNet(
        tree=tree,
        trunk=nn.Sequential(
            dense.conv1, dense.bn1, dense.act1, dense.maxpool, dense.layer1, dense.layer2
        ),
        specializers={node: specializer(node) for node in tree.specializers},
        routers={node: Router(widths[len(node)], pool, tree) for node in tree.inner},
        heads={leaf: nn.Sequential(pool, nn.Linear(widths[-1], classes)) for leaf in tree.leaves},
        plans={},
        source=None,
        record={"widths": widths[1:]},
    )


@pytest.fixture(scope="module")
def cifar():
    with torch.device("meta"):
        dense = ResNet(ResNetSpec(stem="cifar", classes=100))
        net = branched_resnet50(dense, TreeSpec.balanced(2), (181, 256), 100)
    return cost(net, torch.zeros(1, 3, 32, 32), dense=dense)


def test_cifar_resnet50_counts_are_the_papers(cifar):
    assert cifar["dense"]["params"] == 23_705_252
    assert cifar["dense"]["macs"] == 1_304_911_872
    assert cifar["net"]["total_params"] == 25_549_594
    assert cifar["net"]["active_params"] == 9_405_834
    assert cifar["net"]["macs"] == 888_053_248
    assert cifar["net"]["soft_macs"] == 1_362_106_496
    assert cifar["reduction_percent"]["active_params"] == pytest.approx(60.32, abs=0.01)
    assert cifar["reduction_percent"]["macs"] == pytest.approx(31.95, abs=0.01)


def test_all_leaves_of_the_papers_tree_cost_the_same(cifar):
    assert len(cifar["paths"]) == 4
    assert {path["active_params"] for path in cifar["paths"].values()} == {9_405_834}
    assert {path["macs"] for path in cifar["paths"].values()} == {888_053_248}


def test_the_node_table_adds_up_to_total_and_to_each_path(cifar):
    rows = {row["node"]: row for row in cifar["nodes"]}
    assert sum(row["params"] for row in rows.values()) == cifar["net"]["total_params"]
    assert sum(row["macs"] for row in rows.values()) == cifar["net"]["soft_macs"]
    for leaf, path in cifar["paths"].items():
        passed = [rows["root"], rows[leaf[0]], rows[leaf]]
        assert sum(row["params"] for row in passed) == path["active_params"]
        assert sum(row["macs"] for row in passed) == path["macs"]
    assert [rows[key]["width"] for key in ("root", "0", "0-1")] == [512, 724, 1024]
    routed = (rows["0"]["macs"] + rows["0-1"]["macs"]) / cifar["net"]["macs"]
    assert cifar["net"]["routed_macs_share"] == pytest.approx(routed)


def test_only_a_tree_routes_a_share_of_its_arithmetic():
    narrow, dense = (ResNet(ResNetSpec(layers=(1,), planes=(n,), strides=(1,))) for n in (4, 8))
    assert "routed_macs_share" not in cost(narrow, torch.zeros(1, 3, 16, 16), dense=dense)["net"]


def test_torchs_counter_sees_the_products_and_nothing_else(cifar):
    norms_and_pooling = cifar["dense"]["macs"] - cifar["dense"]["macs_flop_counter"]
    assert 0 < norms_and_pooling < 0.01 * cifar["dense"]["macs"]
    assert cifar["net"]["macs_flop_counter"] < cifar["net"]["macs"]


def test_bytes_follow_the_parameters(cifar):
    assert cifar["net"]["bytes_per_path"] == {
        "fp32": 4 * 9_405_834,
        "fp16": 2 * 9_405_834,
        "int8": 9_405_834,
    }
    assert cifar["net"]["bytes_total"]["int8"] == 25_549_594


def test_imagenet_resnet50_counts_are_the_papers():
    with torch.device("meta"):
        dense = ResNet(ResNetSpec())
        net = branched_resnet50(dense, TreeSpec.balanced(2), (181, 256), 1000)
    counted = cost(net, torch.zeros(1, 3, 224, 224), dense=dense)
    assert (counted["dense"]["params"], counted["dense"]["macs"]) == (25_557_032, 4_111_512_576)
    assert counted["net"]["total_params"] == 29_247_274
    assert counted["net"]["active_params"] == 10_336_014
    assert counted["net"]["macs"] == 2_833_842_640


def test_an_uneven_tree_is_charged_by_its_largest_path():
    tree = TreeSpec(leaves=((0,), (1, 0), (1, 1)))
    dense = ResNet(ResNetSpec(stem="cifar", classes=10))
    counted = cost(branched_resnet50(dense, tree, (16, 16), 10), torch.zeros(1, 3, 32, 32))
    active = {leaf: path["active_params"] for leaf, path in counted["paths"].items()}
    assert active["1-0"] > active["0"]
    assert counted["net"]["active_params"] == active["1-0"]
    assert "dense" not in counted


def test_a_dense_network_is_counted_alone_and_left_as_it_was():
    model = ResNet(ResNetSpec(stem="cifar", planes=(4, 4, 4, 4), classes=10)).train()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counted = cost(model, torch.randn(7, 3, 32, 32))
    assert set(counted) == {"dense", "convention"}
    assert counted == cost(model, torch.randn(1, 3, 32, 32))
    assert model.training and model.layer2.training and not model.layer1.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
