"""Several processes: the same conversion, figures and files as one; a lost one ends the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

import sigmabranch
from sigmabranch.measure import evaluate_dense
from sigmabranch.saving import load_dense
from sigmabranch.tasks import find_task, open_task_data, ordered

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sklearn", "fvcore", "lightning_fabric")),
    reason="needs the data, measure and train extras",
)

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TIMEOUT = 120
TINY = (
    "model.layers=[1,1,1]",
    "model.planes=[2,3,4]",
    "model.strides=[1,2,1]",
    "model.stem_width=4",
    "data.train_limit=201",  # the last of eleven batches has one sample, and one process none
    "data.test_limit=51",
    "dense.epochs=24",
    "dense.batch_size=20",
)


def start(*arguments: object) -> subprocess.Popen:
    source = str(Path(sigmabranch.__path__[0]).parent)
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    hidden = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **hidden},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines that the command itself wrote on stderr."""
    out, err = process.communicate(timeout=TIMEOUT)
    own = ("sigmabranch:", "sigmabranch, process")
    lines = [line for line in err.splitlines() if line.startswith(own)]
    return process.returncode, out, lines


def line(folder: Path, *options: object) -> tuple[object, ...]:
    settings = [part for setting in TINY for part in ("--set", setting)]
    return "train", "digits-resnet", "--out", folder, *settings, *options


def train(folder: Path, *options: object) -> subprocess.Popen:
    return start(*TORCHRUN, "-m", "sigmabranch", *line(folder, *options))


def wait_for_epochs(folder: Path, process: subprocess.Popen, epochs: int) -> None:
    path, deadline = folder / "dense" / "metrics.csv", time.monotonic() + TIMEOUT
    while not path.exists() or len(path.read_text().splitlines()) <= epochs:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def workers(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The launcher's processes by rank."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


def step(folder: Path) -> int:
    return json.loads((folder / "dense" / "state.json").read_text())["step"]


def test_two_processes_convert_and_measure_as_one(tmp_path):
    script = Path(__file__).with_name("convert_tiny.py")
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        (tmp_path / name).mkdir()
        process = start(*launcher, script, tmp_path / name)
        _, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, err
    single = json.loads((tmp_path / "one" / "0.json").read_text())
    joint, other = (json.loads((tmp_path / "two" / f"{rank}.json").read_text()) for rank in (0, 1))
    assert joint == other
    assert joint["dense"] == single["dense"]
    for clusters in ("latents", "classes"):
        mine, theirs = joint[clusters], single[clusters]
        assert mine["record"]["samples"] == 140
        for node, split in theirs["record"]["splits"].items():
            same = mine["record"]["splits"][node]
            assert same["sizes"] == split["sizes"]
            for ours, expected in zip(same["gate_weight"], split["gate_weight"], strict=True):
                assert ours == pytest.approx(expected, abs=1e-5)
        for node, levels in theirs["record"]["nodes"].items():
            kept = [level["kept"] for level in mine["record"]["nodes"][node]]
            assert kept == [level["kept"] for level in levels]
        assert mine["statistics"] == pytest.approx(theirs["statistics"], rel=1e-4, abs=1e-5)
        for figure, expected in theirs["evaluation"].items():
            if isinstance(expected, int | float):
                assert mine["evaluation"][figure] == pytest.approx(expected, abs=1e-4), figure


def test_a_run_outlives_a_lost_process_and_goes_on_with_any_number(shell, tmp_path):
    process = train(tmp_path)
    wait_for_epochs(tmp_path, process, 2)
    workers(process)[1].send_signal(signal.SIGKILL)
    code, out, lines = finish(process)
    assert code != 0
    assert out == ""
    assert len(lines) == 1
    assert lines[0].startswith("sigmabranch: another process of this run has ended")
    assert "the same command, with any number of processes, continues" in lines[0]
    assert not (tmp_path / "dense" / "manifest.json").exists()

    # Two processes → one, in more passes, stopped soon.
    lost_at = step(tmp_path)
    stopped = shell.run(*line(tmp_path, "--accumulate", 3, "--max-minutes", 0.0002))
    assert stopped.code == 3, stopped.err
    assert step(tmp_path) > lost_at > 0

    # One process → two, which are told to stop and do so together.
    (tmp_path / "dense" / "metrics.csv").unlink()
    process = train(tmp_path)
    wait_for_epochs(tmp_path, process, 1)
    process.send_signal(signal.SIGTERM)
    code, out, lines = finish(process)
    assert code != 0
    assert len(lines) == 1
    assert lines[0].startswith("sigmabranch: stopped: interrupted by SIGTERM")

    # And to the end, where one process alone prints.
    process = train(tmp_path, "--json")
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["dense"]["samples"] == 51
    history = json.loads((tmp_path / "dense" / "history.json").read_text())["epochs"]
    assert [row["epoch"] for row in history] == list(range(1, 25))
    assert history[-1]["top1"] == result["dense"]["top1"]

    task = find_task("digits-resnet").with_settings(TINY)
    test = open_task_data(task, None, torch.device("cpu")).test
    alone = evaluate_dense(load_dense(tmp_path / "dense"), ordered(test))
    assert result["dense"]["top1"] == alone["top1"]
    assert result["dense"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_bad_input_to_several_processes_is_still_one_line(tmp_path):
    code, out, lines = finish(train(tmp_path, "--set", "dense.batch_size=1"))
    assert code != 0
    assert out == ""
    assert len(lines) == 1
    assert "a batch_size of 1 leaves some of 2 processes without a sample" in lines[0]
