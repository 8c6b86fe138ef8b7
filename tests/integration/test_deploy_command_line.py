"""pack and predict as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch

from conftest import randomise
from shell import ENVIRONMENT
from sigmabranch.conversion import blueprint
from sigmabranch.deploy import Package, Runtime
from sigmabranch.saving import load_net, save_dense
from sigmabranch.tasks import find_task, open_task_data
from sigmabranch.tasks.counting import example
from sigmabranch.tree import node_key

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sklearn", "PIL", "lightning_fabric", "jinja2")),
    reason="needs the data, train and report extras",
)


# The command line, saying when the package is open.
STARTED = """
from sigmabranch.cli import main
from sigmabranch.deploy import Runtime
predict = Runtime.predict
def said(runtime, x):
    print("open", flush=True)
    return predict(runtime, x)
Runtime.predict = said
main()
"""


def saved(task, folder):
    """A dense and a branched network of a task with random weights."""
    torch.manual_seed(0)
    dense = randomise(task.model.build())
    notes = {"task": task.to_dict(), "seed": 0}
    save_dense(dense, folder / "dense", notes)
    net = randomise(blueprint(dense, example(task), task.tree))
    net.save(folder / "net", notes)


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy")
    saved(task, folder)
    return folder


@pytest.fixture(scope="module")
def packed(shell, folder):
    """The branched network as a package, and what pack printed."""
    done = shell.run("pack", folder / "net", "--out", folder / "package", "--json")
    assert done.code == 0, done.err
    return folder / "package", json.loads(done.out)


def test_pack_says_what_one_input_reads_and_where_inputs_go(packed):
    path, printed = packed
    package = Package(path)
    assert printed["path_bytes"] == {leaf: package.path_bytes(leaf) for leaf in package.leaves}
    assert sum(printed["usage"].values()) == pytest.approx(1)
    assert package.notes["classes"] == list("0123456789")


def test_predict_gives_what_the_network_says_and_a_trace(shell, task, folder, packed):
    path, _ = packed
    arguments = ("--sample", 0, "--sample", 1, "--budget", "1MB", "--json")
    done = shell.run("predict", path, *arguments)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert [row["input"] for row in result["inputs"]] == ["sample 0", "sample 1"]
    assert result["peak_bytes"] <= result["budget"] == 10**6
    first = result["inputs"][0]
    assert len(first["top"]) == 5 and first["trace"]["bytes_read"] > 0
    net = load_net(folder / "net")
    test = open_task_data(task, None, torch.device("cpu")).test
    x, _ = next(iter(test.batches(torch.tensor([0, 1]), 2)))
    with torch.no_grad():
        expected = net.hard(x)
    for number, row in enumerate(result["inputs"]):
        probability, label = expected.logits[number].softmax(0).max(0)
        assert row["leaf"] == node_key(net.tree.leaves[expected.leaf[number]])
        assert row["top"][0]["class"] == str(int(label))
        assert row["top"][0]["probability"] == pytest.approx(float(probability), 1e-3)
    text = shell.run("predict", path, "--sample", 0)
    assert first["top"][0]["class"] in text.out and f"leaf {first['leaf']}" in text.out


def test_a_stream_is_filtered_by_what_it_showed_before(shell, folder, packed):
    tree = Package(packed[0])
    assert [len(row) for row in tree.class_share] == [len(tree.leaves)] * tree.classes
    path = folder / "dense-stream"
    assert shell.run("pack", folder / "dense", "--out", path).code == 0
    arguments = [part for number in range(6) for part in ("--sample", number)]

    def answers(*options):
        done = shell.run("predict", path, *arguments, "--json", *options)
        assert done.code == 0, done.err
        return [row["top"] for row in json.loads(done.out)["inputs"]]

    alone, filtered = answers(), answers("--stream", "--stickiness", 0.9)
    assert answers("--stream", "--stickiness", 0) == alone
    first, expected = (rows[0][0]["probability"] for rows in (filtered, alone))
    assert first == pytest.approx(expected)  # nothing came before it
    assert filtered[1:] != alone[1:]
    for options, message in (
        (("--stream", "--stickiness", 1), "must be in [0, 1), got 1.0"),
        (("--stickiness", 0.5), "add --stream"),
        (("--stream", "--engine", "onnx"), "the engine onnx filters no streams"),
    ):
        done = shell.run("predict", path, "--sample", 0, *options)
        assert done.code == 2 and message in done.err


def test_onnx_nodes_say_what_the_package_says(shell, task, tmp_path):
    pytest.importorskip("onnxscript")
    saved(task.with_settings(["tree.depth=1"]), tmp_path)
    path, nodes = tmp_path / "package", tmp_path / "nodes"
    assert shell.run("pack", tmp_path / "net", "--out", path).code == 0
    done = shell.run("export", tmp_path / "net", "--format", "onnx-nodes", "--out", nodes)
    assert done.code == 0, done.err
    samples = ("--sample", 0, "--sample", 1, "--json")
    done = shell.run("predict", nodes, "--engine", "onnx", *samples)
    assert done.code == 0, done.err
    found, expected = json.loads(done.out), json.loads(shell.run("predict", path, *samples).out)
    for one, other in zip(found["inputs"], expected["inputs"], strict=True):
        assert one["leaf"] == other["leaf"]
        assert one["top"][0]["class"] == other["top"][0]["class"]
        assert one["top"][0]["probability"] == pytest.approx(other["top"][0]["probability"], 1e-3)
    assert found["inputs"][0]["trace"]["bytes_read"] > 0
    done = shell.run("predict", nodes, "--engine", "onnx", "--budget", "1KB", "--sample", 0)
    assert done.code == 2 and "its largest node takes" in done.err


def test_a_dense_network_packs_as_one_node(shell, folder):
    out = folder / "dense-package"
    done = shell.run("pack", folder / "dense", "--out", out)
    assert done.code == 0, done.err
    assert Package(out).leaves == ("root",)
    assert shell.run("predict", out, "--sample", 3).code == 0


def test_a_picture_of_any_size_is_scaled_to_the_network(shell, tmp_path):
    from PIL import Image

    tiny = ("model.layers=[1,1,1]", "model.planes=[2,3,4]", "model.strides=[1,2,1]")
    saved(find_task("cifar100-small").with_settings([*tiny, "model.stem_width=4"]), tmp_path)
    done = shell.run("pack", tmp_path / "net", "--out", tmp_path / "package")
    assert done.code == 0, done.err
    Image.new("RGB", (61, 47), "teal").save(tmp_path / "teal.png")
    done = shell.run("predict", tmp_path / "package", tmp_path / "teal.png", "--json")
    assert done.code == 0, done.err
    row = json.loads(done.out)["inputs"][0]
    from sigmabranch.data.single import picture_input

    x = picture_input("cifar100", tmp_path / "teal.png", 32)
    assert x.shape == (1, 3, 32, 32)
    with Runtime.open(tmp_path / "package") as runtime:
        assert str(int(runtime(x).argmax())) == row["top"][0]["class"]
    (tmp_path / "text.png").write_text("no picture")
    done = shell.run("predict", tmp_path / "package", tmp_path / "text.png")
    assert done.code == 2 and "no picture that can be read" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", "{package}"], "nothing to predict"),
        (["predict", "{package}", "--sample", "99999"], "there is no sample 99999"),
        (["predict", "{package}", "--sample", "0", "--budget", "1KB"], "at least"),
        (["predict", "{package}", "--sample", "0", "--budget", "lots"], "is no size"),
        (["predict", "{package}", "x.png"], "reads no pictures"),
        (
            ["predict", "{package}", "--sample", "0", "--engine", "onnx", "--no-prefetch"],
            "leave out --no-prefetch",
        ),
        (["predict", "{folder}/net", "--sample", "0"], "belongs to no package"),
        (["predict", "{folder}/nothing", "--sample", "0"], "holds no package"),
        (["pack", "{folder}/package"], "was not written by sigmabranch"),
        (["pack", "{folder}/nothing"], "holds no saved network"),
        (["pack", "{folder}/net", "--out", "{folder}/net"], "would be lost: choose another"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(shell, folder, packed, arguments, said):
    path, _ = packed
    filled = [part.format(package=path, folder=folder) for part in arguments]
    done = shell.run(*filled)
    assert done.code == 2 and done.out == ""
    assert said in done.err and done.err.count("\n") == 1 and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("number", "code", "how"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_while_weights_arrive_ends_at_once_and_says_what_continues(
    packed, number, code, how
):
    path, _ = packed
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, "predict", path, "--sample", "0", "--bandwidth", "1KB"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "open\n"
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert err == f"sigmabranch: {how}; the same command starts anew\n"


@pytest.mark.parametrize(
    ("arguments", "continues"),
    [(["run", "digits-resnet"], True), (["--version", "search"], True), (["pack", "run"], False)],
)
def test_an_interrupt_promises_what_the_command_keeps(monkeypatch, capsys, arguments, continues):
    from sigmabranch.cli import app

    def interrupted(**_):
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(app, "app", interrupted)
    monkeypatch.setattr(sys, "argv", ["sigmabranch", *arguments])
    with pytest.raises(SystemExit) as end:
        app.main()
    assert end.value.code == 143
    assert ("continues from the last complete step" in capsys.readouterr().err) == continues
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_before_the_command_begins_is_one_line(tmp_path):
    """While torch is imported, which takes seconds."""
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "-m", "sigmabranch", "recipe"],
        env={
            **ENVIRONMENT,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT.get('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "sigmabranch: interrupted before it began\n")
