"""``sigmabranch compare``, its tables and ``count --peer`` as a user meets them."""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from shell import Done

pytestmark = pytest.mark.skipif(
    any(
        find_spec(name) is None
        for name in ("sklearn", "fvcore", "lightning_fabric", "jinja2", "torch_pruning", "scipy")
    ),
    reason="needs the data, measure, train, report and peers extras",
)

TINY = {
    "model.layers": "[1,1,1]",
    "model.planes": "[4,6,8]",
    "model.strides": "[1,2,1]",
    "model.stem_width": 8,
    "tree.projection_dim": 4,
    "data.train_limit": 100,
    "data.test_limit": 50,
    "dense.epochs": 1,
    "dense.batch_size": 25,
    "finetune.epochs": 2,
    "finetune.batch_size": 25,
    "conversion.restarts": 2,
}
OWN = ("skipnet.mode=rate", "skipnet.target=0.5", "deepmoe.target=0.5")
SETTINGS = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
ROWS = (
    "sigma-branch,single-path,always-leaf-1,oracle-leaf,fpgm,l1,skipnet,deepmoe,decisionet-source"
)
COMPARE = [
    "compare",
    "digits-resnet",
    *SETTINGS,
    *(p for own in OWN for p in ("--set", own)),
    "--seeds",
    "0,1",
    "--rows",
    ROWS,
    "--json",
]
BAD = {
    "unknown row": (["compare", "digits-resnet", "--rows", "fpgn"], "unknown peer 'fpgn'.*fpgm"),
    "no row": (["compare", "digits-resnet", "--rows", ","], "names no row"),
    "unknown task": (["compare", "digits"], "unknown task 'digits'"),
    "same seed twice": (["compare", "digits-resnet", "--seeds", "1,01"], "different whole numbers"),
    "seed out of reach": (["compare", "digits-resnet", "--seeds", "4294967296"], "none above"),
    "unknown setting of a row": (
        ["compare", "digits-resnet", "--rows", "fpgm", "--set", "fpgm.rat=1"],
        "unknown fpgm key 'rat': did you mean rate",
    ),
    "row without its setting": (
        ["compare", "digits-resnet", "--rows", "fpgm", "--set", "hrank.rate=0.5"],
        "'hrank', which is not compared",
    ),
    "other data for a row": (
        ["compare", "digits-resnet", "--rows", "sigma-branch",
         "--set", 'sigma-branch.settings=["data.train_limit=5"]'],
        "share data and source network",
    ),
    "impossible row": (
        ["compare", "shapes-pointnet2", "--rows", "skipnet"], "skipnet.*shapes-pointnet2",
    ),
    "nothing to gather": (
        ["compare", "digits-resnet", "--rows", "single-path", "--gather"], "holds no saved network",
    ),
    "unknown peer": (["count", "cifar100-small", "--peer", "gater"], "unknown peer 'gater'"),
    "unknown convention": (
        ["count", "cifar100-small", "--peer", "fpgm", "--set", "convention=outer"],
        "inner, official, coupled",
    ),
    "rate of one": (
        ["count", "cifar100-small", "--peer", "fpgm", "--set", "rate=1"], r"in \[0, 1\), got 1",
    ),
    "negative rate": (
        ["count", "cifar100-small", "--peer", "l1", "--set", "rate=-0.1"], r"in \[0, 1\), got -0.1",
    ),
    "emptied layer": (
        ["count", "cifar100-small", "--peer", "fpgm", "--set", "rate=0.99"],
        "leave nothing of .*conv.* use a smaller rate",
    ),
    "unpublished rates": (
        ["count", "imagenet-resnet50", "--peer", "hrank", "--set", "rates=44"], "44.*62",
    ),
    "no transformer": (["count", "cifar100-small", "--peer", "ffn-moe"], "fc1.*cifar100-vit"),
    "no blocks": (["count", "modelnet40-pointnet2", "--peer", "deepmoe"], "deepmoe.*modelnet40"),
    "projected transformer": (
        ["count", "cifar100-vit", "--set", "tree.entry=project"], "no level can project",
    ),
    "unknown setting of a peer": (
        ["count", "cifar100-small", "--peer", "fpgm", "--set", "rates=1"], "fpgm has .*rate",
    ),
    "unknown table": (["table", "second"], "known are systems, main, published"),
    "folder for a file": (["table", "comparison", "--results", "."], "is a folder"),
}  # fmt: skip


def run(shell, folder: Path, commands: list[list[str]]) -> list[Done]:
    """The ends of command lines in ``folder``."""
    return [shell.run(*command, cwd=folder) for command in commands]


@pytest.fixture(scope="module")
def made(shell, tmp_path_factory):
    """A folder and the ends of a comparison, its repetition, and what its tables print."""
    folder = tmp_path_factory.mktemp("compare")
    result = ["--out", "out", "--result", "found.json"]
    elsewhere = ["--out", "other", "--dense", "out/source/dense", "--include", "found.json"]
    commands = [
        [*COMPARE, *result],
        [*COMPARE, *result],
        [*COMPARE, *elsewhere],
        ["table", "comparison", "--results", "found.json", "--csv"],
        ["table", "systems", "--markdown"],
        [*COMPARE[:-1], "--out", "out", "--gather"],
        ["table", "ablations", "--results", "found.json", "--csv"],
        [*COMPARE, "--out", "out", "--set", "single-path.match=training"],
    ]
    return folder, run(shell, folder, commands)


def test_every_row_of_every_seed_is_made_and_measured(made):
    folder, (first, *_) = made
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert sorted(found["rows"]) == sorted(ROWS.split(","))
    for name, seeds in found["rows"].items():
        assert sorted(seeds) == ["0", "1"], name
        for row in seeds.values():
            net = row["cost"]["net"]
            assert 0 < net["active_params"] <= net["active_params_max"] <= net["total_params"]
            assert 0 <= row["accuracy"]["top1"] <= 100
            assert row["latency"]["ratio"] > 0
            assert row["provenance"]["command"].startswith("sigmabranch compare")
    assert found["failed"] == []
    rows = {name: seeds["0"] for name, seeds in found["rows"].items()}
    assert rows["oracle-leaf"]["accuracy"]["top1"] >= rows["sigma-branch"]["accuracy"]["top1"]
    assert rows["skipnet"]["cost"]["net"]["active_params_max"] > 0
    report = folder / "out" / "report"
    written = {path.name for path in report.rglob("*") if path.is_file()}
    assert {"comparison.csv", "comparison.md", "comparison.tex", "index.html"} <= written
    assert any(name.endswith(".png") for name in written)


def test_peers_are_as_large_as_a_path(made):
    _, (first, *_) = made
    rows = json.loads(first.out)["rows"]
    active = rows["sigma-branch"]["0"]["cost"]["net"]["active_params"]
    for name in ("fpgm", "l1"):
        assert rows[name]["0"]["cost"]["net"]["active_params"] == pytest.approx(active, rel=0.1)


def test_the_same_command_again_makes_nothing_and_finds_the_same(made):
    _, (first, again, *_) = made
    assert again.code == 0
    assert "begins" in first.err
    assert "begins" not in again.err
    assert "epoch" not in again.err
    assert json.loads(again.out)["rows"] == json.loads(first.out)["rows"]


def test_rows_of_an_earlier_result_are_taken_over(made):
    _, (first, _, elsewhere, *_) = made
    assert elsewhere.code == 0, elsewhere.err
    assert "begins" not in elsewhere.err
    assert json.loads(elsewhere.out)["rows"] == json.loads(first.out)["rows"]


def test_tables_come_from_the_result(made):
    folder, (_, _, _, table, systems, gathered, ablations, _) = made
    assert table.code == systems.code == gathered.code == 0
    assert ablations.code == 0, ablations.err
    assert "sigma-branch" in ablations.out
    # What only a comparison with the branched network has.
    assert "weights read per input" in (folder / "out" / "report" / "index.html").read_text()
    for name in ROWS.split(","):
        assert name in table.out
        assert name in gathered.out
    assert "| sigma-branch | path | per input | activations | no | yes | yes |" in systems.out


def test_a_folder_of_other_settings_is_refused_before_any_work(made):
    _, (*_, other) = made
    assert other.code == 2
    assert other.out == ""
    assert "single-path with other settings" in other.err
    assert other.err.count("\n") == 1


@pytest.fixture(scope="module")
def refused(shell, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    ended = run(shell, folder, [arguments for arguments, _ in BAD.values()])
    return folder, dict(zip(BAD, ended, strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_code_2_and_nothing_written(refused, name):
    folder, ends = refused
    assert ends[name].code == 2, ends[name]
    assert ends[name].out == ""
    assert ends[name].err.count("\n") == 1
    assert re.search(BAD[name][1], ends[name].err), ends[name].err
    assert os.listdir(folder) == []
