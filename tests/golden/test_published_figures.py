"""Every figure in the pages comes from a file in results/."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from sigmabranch.tasks import count_task, find_task

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
