"""simulate as a user meets it."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import randomise
from sigmabranch.conversion import blueprint
from sigmabranch.deploy import pack

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def packages(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    x = torch.zeros(1, 1, 8, 8)
    pack(randomise(blueprint(dense, x)), folder / "path", x)
    pack(dense, folder / "dense", x)
    return folder


def test_a_path_beats_dense_where_storage_is_slow(shell, packages, tmp_path):
    arguments = ("--bandwidth", "10KB", "--bandwidth", "sd-uhs1", "--compute", "1G")
    both = (packages / "path", packages / "dense")
    done = shell.run("simulate", *both, *arguments, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    ms = {(row["package"], row["mb_per_s"]): row for row in result["latency"]}
    assert {rate for _, rate in ms} == {0.01, 104.0}
    path, dense = ms["path", 0.01], ms["dense", 0.01]
    assert dense["ms"] / path["ms"] == pytest.approx(dense["mb"] / path["mb"], rel=0.01)
    assert all(row["floor_ms"] <= row["foreseen_ms"] <= row["ms"] for row in ms.values())
    moved = [row["mb_per_input"] for row in result["stream"] if row["package"] == "path"]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.01 * path["mb"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("simulation.json", "latency.png", "latency.svg", "stream.png", "stream.svg"),
        ".sigmabranch",
    }


def test_computing_is_measured_here_unless_it_is_given(shell, packages):
    done = shell.run("simulate", packages / "path", "--bandwidth", "1MB")
    assert done.code == 0, done.err
    assert "1 MB/s" in done.out and "MB an input" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{packages}/path", "--bandwidth", "fast"], "is no size"),
        (["{packages}/path", "--compute", "much"], "is no size"),
        (["{packages}/path", "--persistence", "2"], "persistence"),
        (["{packages}/path", "{packages}/path"], "different names"),
        (["{packages}/none"], "holds no package"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(shell, packages, arguments, said):
    done = shell.run("simulate", *(part.format(packages=packages) for part in arguments))
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
