"""Every figure in the pages is the paper's, a count, or from a file in results/."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from sigmabranch.tasks import PAPER, count_task, find_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "results" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_tables_in_the_pages_are_those_of_the_result_files(tables, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.search(r"<!-- table:\S+ -->", text)
    assert tables.filled(text) == text


def test_every_result_names_its_command_seed_commit_data_hardware_and_date():
    results = [path for path in (ROOT / "results").glob("*.json") if "seed" in path.stem]
    assert results
    for path in results:
        result = json.loads(path.read_text(encoding="utf-8"))
        origin = result["provenance"]
        assert isinstance(result["seed"], int), path
        assert result["task"]["data"]["name"], path
        for key in ("command", "commit", "hardware", "date"):
            assert origin[key], (path, key)


def test_readme_counts_are_what_count_prints():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    counted = count_task(find_task("cifar100-resnet50"))
    dense, net = counted["dense"], counted["net"]
    row = "| CIFAR-100 / ResNet-50, parameters | {:,} | {:,} | {:,} |"
    assert row.format(dense["params"], net["total_params"], net["active_params"]) in text
    assert f"| {dense['macs']:,} | | {net['macs']:,} |" in text


# -- the paper's table III -----------------------------------------------------------------------

# Task → dense (parameters, FLOPs, top-1, top-5), branched (stored, run, FLOPs, top-1, top-5,
# balance), saved (parameters, FLOPs).
PRINTED = {
    "cifar100-resnet50": (
        (23.71, 1.305, 76.99, 94.65),
        (25.55, 9.41, 0.888, 76.92, 95.30, 0.935),
        (60.3, 32.0),
    ),
    "imagenet-resnet50": (
        (25.56, 4.112, 76.54, None),
        (29.25, 10.34, 2.834, 74.82, None, 0.965),
        (59.5, 31.1),
    ),
    "modelnet40-pointnet2": (
        (1.47, 1.148, 90.15, None),
        (1.46, 0.61, 1.030, 91.25, None, None),
        (58.3, 10.3),
    ),
}


@pytest.fixture(scope="module")
def rows(tables):
    """The paper's tasks beside ours, by name."""
    return {row["task"]: row for row in tables.paper_rows()}


def test_the_papers_tasks_and_no_others_have_a_row(rows):
    assert list(rows) == list(PAPER) == list(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_the_papers_columns_hold_what_it_prints(rows, name):
    dense, branched, saved = PRINTED[name]
    paper = rows[name]["paper"]
    theirs = paper["dense"]
    assert tuple(theirs[key] for key in ("run", "flops", "top1", "top5")) == dense
    assert (theirs["stored"], theirs["balance"]) == (theirs["run"], None)
    keys = ("stored", "run", "flops", "top1", "top5", "balance")
    assert tuple(paper["branched"][key] for key in keys) == branched
    assert (paper["active_reduction"], paper["flops_reduction"]) == saved


@pytest.mark.parametrize("name", PRINTED)
def test_our_counts_round_to_what_the_paper_prints(rows, name):
    paper, counts = rows[name]["paper"], rows[name]["counts"]
    flops = {1: "macs", 2: "flops_doubled"}[paper["flops_per_mac"]]
    for net in ("dense", "branched"):
        assert round(counts[net]["stored"] / 1e6, 2) == paper[net]["stored"]
        assert round(counts[net]["run"] / 1e6, 2) == paper[net]["run"]
        if flops in counts[net]:
            assert round(counts[net][flops] / 1e9, 3) == paper[net]["flops"]
