"""Interrupted processes: what they leave, and that going on equals never having stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sigmabranch

SCRIPT = Path(__file__).with_name("train_tiny.py")
TIMEOUT = 120


def start(folder, *options, launcher=()):
    source = str(Path(sigmabranch.__path__[0]).parent)
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), str(folder), *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    return json.loads(out.strip().splitlines()[-1])


def wait_for_step(folder, process, step):
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        try:
            if json.loads((folder / "state.json").read_text())["step"] >= step:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.005)
    pytest.fail(f"no checkpoint of step {step}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return finish(start(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize(("number", "step"), [(signal.SIGKILL, 5), (signal.SIGINT, 16)])
def test_interrupted_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path, uninterrupted, number, step
):
    process = start(tmp_path, "--pause", "0.03")
    wait_for_step(tmp_path, process, step)
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.communicate(timeout=TIMEOUT)
    else:
        stopped = finish(process)
        assert not stopped["complete"]
        assert stopped["reason"] == f"interrupted by {number.name}"
    assert json.loads((tmp_path / "state.json").read_text())["step"] < 48
    resumed = finish(start(tmp_path))
    assert resumed["complete"]
    assert resumed["digest"] == uninterrupted["digest"]
    assert resumed["curve"] == uninterrupted["curve"]


def test_a_run_resumes_bit_for_bit_on_either_side_of_its_turn(tmp_path):
    options = ("--upcycle", "0.4")  # the leaves part after step 19
    whole = finish(start(tmp_path / "whole", *options))
    folder = tmp_path / "parts"
    for step in (9, 19, 30):
        process = start(folder, *options, "--pause", "0.03")
        wait_for_step(folder, process, step)
        process.kill()
        process.communicate(timeout=TIMEOUT)
    resumed = finish(start(folder, *options))
    assert resumed["complete"]
    assert resumed["digest"] == whole["digest"]
    assert resumed["curve"] == whole["curve"]


@pytest.mark.parametrize("upcycle", ["0", "0.4"])
def test_two_processes_train_as_one(tmp_path, upcycle):
    options = ("--dropout", "0", "--no-norm", "--upcycle", upcycle)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    one = start(tmp_path / "one", *options)
    two = start(tmp_path / "two", *options, launcher=launcher)
    single, joint = finish(one), finish(two)
    assert joint["weights"] == pytest.approx(single["weights"], abs=1e-5)
    for row, expected in zip(joint["curve"], single["curve"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
