"""A saved single path and a saved narrow dense network, verb by verb."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

import sigmabranch as sb
from conftest import randomise
from sigmabranch.deploy import Package
from sigmabranch.tasks import open_task_data, ordered

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sklearn", "lightning_fabric", "fvcore")),
    reason="needs the data, train and measure extras",
)

KINDS = ("path", "dense")


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    """Both networks of a task, with random weights."""
    folder = tmp_path_factory.mktemp("unbranched")
    notes = {"task": task.to_dict(), "seed": 0}
    torch.manual_seed(0)
    narrow = task.with_settings(["model.stem_width=3", "model.planes=[1,2,3]"])
    sb.save_dense(randomise(narrow.model.build()), folder / "dense", notes)
    train = open_task_data(task, None, torch.device("cpu")).train
    path = sb.single_path(randomise(task.model.build()), ordered(train), task.tree)
    path.save(folder / "path", notes)
    return folder


def answer(shell, *arguments):
    done = shell.run(*arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_measured_and_counted(shell, task, folder, kind):
    net = sb.load(folder / kind)
    test = ordered(open_task_data(task, None, torch.device("cpu")).test)
    found = answer(shell, "evaluate", folder / kind)
    assert found == pytest.approx(sb.evaluate(net, test))
    assert found.keys() == {"samples", "top1", "top5", "loss"}
    counted = answer(shell, "count", folder / kind)
    assert counted["net"]["active_params"] == sum(p.numel() for p in net.parameters())
    assert counted["net"]["macs"] < counted["dense"]["macs"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_packed_exported_and_quantized(shell, task, folder, tmp_path, kind):
    package, ids = tmp_path / "package", ("--sample", 0, "--sample", 1)
    packed = answer(shell, "pack", folder / kind, "--out", package)
    assert packed["usage"] == {} and packed["nodes"].keys() == {"root"} == {*packed["path_bytes"]}
    assert Package(package).notes["classes"] == list("0123456789")
    rows = answer(shell, "predict", package, *ids)["inputs"]
    x, _ = next(iter(ordered(open_task_data(task, None, torch.device("cpu")).test)))
    likely = sb.load(folder / kind)(x[:2]).softmax(1).max(1)
    for row, best, label in zip(rows, *likely, strict=True):
        assert row["leaf"] == "root" and row["top"][0]["class"] == str(int(label))
        assert row["top"][0]["probability"] == pytest.approx(float(best), rel=1e-3)
    stored = answer(shell, "simulate", package, "--bandwidth", "100MB", "--compute", "1G")
    assert stored["latency"][0]["mb"] == pytest.approx(packed["path_bytes"]["root"] / 1e6)
    (check,) = answer(shell, "export", folder / kind, "--format", "pt2", "--out", tmp_path / "pt2")[
        "checks"
    ]
    assert check["leaf"] == "root" and check["routed"] == 16
    pytest.importorskip("onnxscript")
    few = tmp_path / "few"
    fp32, int8 = answer(shell, "quantize", folder / kind, "--out", few)["rows"]
    assert fp32["usage"] == int8["usage"] == {"root": 1.0} and int8["rerouted"] == 0
    rows = answer(shell, "predict", few / "fp32", "--engine", "onnx", *ids)["inputs"]
    for row, best in zip(rows, likely.values, strict=True):
        assert row["top"][0]["probability"] == pytest.approx(float(best), rel=1e-3)


def test_a_path_is_fine_tuned_like_any_network(shell, folder, tmp_path):
    done = shell.run("finetune", folder / "path", "--out", tmp_path, "--device", "cpu")
    assert done.code == 0, done.err
    assert "top-1 on one path per input" in done.out and "routing" not in done.out
    assert sb.load(tmp_path / "branched").tree == sb.TreeSpec.unbranched()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "{folder}/path", "--seed", "3"], "has no routes to shuffle"),
        (["evaluate", "{folder}/dense", "--seed", "3"], "has no routes to shuffle"),
        (["convert", "{folder}/path"], "holds a branched network, need a dense one"),
        (["finetune", "{folder}/dense"], "holds a dense network, need a branched one"),
        (["count", "digits-resnet", "--set", "tree.leaves=[[]]"], "has a single leaf"),
    ],
)
def test_what_makes_no_sense_is_one_line(shell, folder, arguments, said):
    done = shell.run(*(part.format(folder=folder) for part in arguments))
    assert done.code == 2 and done.out == ""
    assert said in done.err and done.err.count("\n") == 1 and "Traceback" not in done.err
