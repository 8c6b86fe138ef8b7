"""Arm's Vela as a witness: what it says of a small tree, and of the dense network under it."""

from __future__ import annotations

from typing import Any

import pytest

from sigmabranch.backbones import ResNetSpec
from sigmabranch.tasks import DataSpec, Task
from sigmabranch.tree import TreeSpec

pytest.importorskip("ethosu.vela", reason="needs ethos-u-vela: run make test-exports")

from benchmarks import vela

FLASH, DRAM = (chip.name for chip in vela.CHIPS)
DENSE = vela.DENSE
PATHS = {"0": ("root", "0"), "1-0": ("root", "1", "1-0"), "1-1": ("root", "1", "1-1")}
TASK = Task(
    name="tiny",
    summary="",
    data=DataSpec(name="cifar100"),
    model=ResNetSpec(
        layers=(1, 1, 1, 1),
        planes=(16, 16, 32, 64),
        strides=(1, 2, 2, 1),
        stem="small",
        stem_width=16,
        classes=10,
    ),
    tree=TreeSpec(leaves=((0,), (1, 0), (1, 1)), projection_dim=16),
)


@pytest.fixture(scope="module")
def nodes() -> list[dict[str, Any]]:
    return vela.compiled_nodes(TASK)


@pytest.fixture(scope="module")
def of_node(nodes) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["chip"], row["node"]): row for row in nodes}


@pytest.fixture(scope="module")
def of_path(nodes) -> dict[tuple[str, str], dict[str, Any]]:
    rows = list(vela.compiled_paths(TASK.tree, nodes))
    assert len(rows) == 2 * (1 + len(PATHS))
    return {(row["chip"], row["path"]): row for row in rows}


@pytest.mark.parametrize("chip", [FLASH, DRAM])
@pytest.mark.parametrize("leaf", PATHS)
def test_a_path_is_the_sum_of_its_nodes(of_path, of_node, chip, leaf):
    for key in vela.SUMMED:
        parts = [of_node[chip, node][key] for node in PATHS[leaf]]
        assert of_path[chip, leaf][key] == pytest.approx(sum(parts))


@pytest.mark.parametrize("chip", [FLASH, DRAM])
@pytest.mark.parametrize("leaf", PATHS)
def test_a_path_moves_fewer_weights_than_the_dense_network(of_path, chip, leaf):
    path, dense = of_path[chip, leaf], of_path[chip, DENSE]
    assert 0 < path["weights"] < dense["weights"]
    assert path["dense_over_weights"] == dense["weights"] / path["weights"]
    assert path["dense_over_ms"] == dense["ms"] / path["ms"]


def test_maps_are_traffic_only_where_they_lie_off_the_chip(of_node):
    assert of_node[FLASH, DENSE]["maps"] < 100
    assert of_node[DRAM, DENSE]["maps"] > 1000
    row = of_node[DRAM, DENSE]
    assert vela.off_chip(row) == row["weights"] + row["maps"] + row["scales"]


def test_vela_finds_the_multiply_adds_that_we_count(nodes):
    for row in nodes:
        assert row["vela_macs"] == pytest.approx(row["our_macs"], rel=0.02)


def test_vela_reads_about_the_bytes_that_we_count(of_node):
    row = of_node[FLASH, DENSE]
    assert row["weights"] + row["scales"] == pytest.approx(row["our_bytes"], rel=0.3)


def test_only_routers_leave_operations_to_another_processor(nodes):
    assert {row["node"] for row in nodes if row["on_cpu"]} == {"root", "1"}
    assert all("LogSoftmax" in row["on_cpu"] for row in nodes if row["on_cpu"])


def test_a_slimmer_trunk_takes_fewer_cycles(of_node):
    rows = vela.compiled_nodes(vela.slimmed(TASK, 0.5), vela.CHIPS[:1])
    slim = {row["node"]: row for row in rows}
    assert slim["root"]["cycles"] < of_node[FLASH, "root"]["cycles"]
    assert slim["1-0"]["our_macs"] == of_node[FLASH, "1-0"]["our_macs"]
