"""The paper's Table III, exactly, as a user gets it from the command line."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fvcore", "lightning_fabric", "sklearn")),
    reason="needs the measure, train and data extras",
)


@pytest.mark.parametrize(
    ("task", "dense", "net", "reductions"),
    [
        (
            "cifar100-resnet50",
            (23_705_252, 1_304_911_872),
            (25_549_594, 9_405_834, 888_053_248),
            (60.32, 31.95),
        ),
        (
            "imagenet-resnet50",
            (25_557_032, 4_111_512_576),
            (29_247_274, 10_336_014, 2_833_842_640),
            (59.56, 31.08),
        ),
        (
            "modelnet40-pointnet2",
            (1_473_128, 580_562_432),
            (1_456_230, 614_636, 521_248_256),
            (58.28, 10.22),
        ),
    ],
)
def test_counts_are_the_papers(shell, task, dense, net, reductions, tmp_path):
    done = shell.run("count", task, "--json", cwd=tmp_path)
    assert (done.code, done.out.count("\n"), done.err) == (0, 1, "")
    cost = json.loads(done.out)
    assert (cost["dense"]["params"], cost["dense"]["macs"]) == dense
    keys = ("total_params", "active_params", "macs")
    assert tuple(cost["net"][key] for key in keys) == net
    assert {path["active_params"] for path in cost["paths"].values()} == {net[1]}
    assert {path["macs"] for path in cost["paths"].values()} == {net[2]}
    assert list(cost["paths"]) == ["0-0", "0-1", "1-0", "1-1"]
    saved = cost["reduction_percent"]
    assert (round(saved["active_params"], 2), round(saved["macs"], 2)) == reductions
    if task == "modelnet40-pointnet2":  # the paper's 1.148 and 1.030 G
        doubled = (cost["dense"]["flops_doubled"], cost["net"]["flops_doubled"])
        assert doubled == (1_148_081_664, 1_029_649_408)
        assert "doubled" in cost["convention"]
    assert not list(tmp_path.iterdir())
