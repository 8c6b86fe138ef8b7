"""Point clouds from the command line: the paper's task on a folder of the public form."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from shell import Done

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("h5py", "fvcore", "lightning_fabric", "jinja2")),
    reason="needs the data, measure, train and report extras",
)

TINY = {
    "model.classes": 3,
    "model.centroids": "[16,8]",
    "model.neighbours": "[4,4]",
    "model.widths": "[[8,12],[12,16],[16,24,32]]",
    "model.connected": "[24,12]",
    "tree.widths": "[22,12]",
    "tree.projection_dim": 4,
    "dense.epochs": 15,
    "dense.eval_every": 15,
    "dense.lr": 0.01,
    "dense.batch_size": 10,
    "finetune.epochs": 1,
    "finetune.batch_size": 10,
    "conversion.restarts": 2,
}


def run(shell, *arguments: object, **changes: object) -> Done:
    settings = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return shell.run("run", "modelnet40-pointnet2", *arguments, *options)


def test_the_chain_runs_on_clouds_with_controls_and_repeats_nothing(shell, modelnet, tmp_path):
    arguments = ("--data", modelnet, "--out", tmp_path, "--control", "dense-equal", "--json")
    done = run(shell, *arguments)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["branched"]["samples"] == 12
    assert result["dense"]["top1"] > 35  # three kinds that differ much
    assert result["cost"]["net"]["active_params"] < result["cost"]["dense"]["params"]
    equal = result["controls"]["dense-equal"]["params"]
    assert abs(equal - result["cost"]["net"]["active_params"]) <= 0.01 * equal
    assert Path(result["report"]).is_file()
    trained = (tmp_path / "dense" / "manifest.json").stat().st_mtime_ns
    again = run(shell, *arguments)
    assert json.loads(again.out)["branched"] == result["branched"]
    assert (tmp_path / "dense" / "manifest.json").stat().st_mtime_ns == trained


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__classes": 40}, "--set model.classes=3"),
        ({"model__centroids": "[2000,8]"}, "model.centroids"),
        ({"model__channels": 6}, "--set model.channels=3"),
        ({"data__name": "digits"}, "clouds"),
        ({"tree__widths": "[99,6]"}, "choose at most 32"),
    ],
)
def test_settings_that_do_not_fit_end_in_one_line_before_anything_is_written(
    shell, modelnet, tmp_path, changes, said
):
    done = run(shell, "--data", modelnet, "--out", tmp_path / "out", **changes)
    assert (done.code, done.err.count("\n"), done.out) == (2, 1, "")
    assert said in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_ends_in_one_line_that_names_it(shell, modelnet, tmp_path):
    broken = tmp_path / "modelnet40_ply_hdf5_2048"
    broken.mkdir()
    for file in (modelnet / broken.name).iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(
            content[: len(content) // 2] if "test0" in file.name else content
        )
    done = run(shell, "--data", tmp_path, "--out", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "ply_data_test0.h5" in done.err
    assert not (tmp_path / "out").exists()
