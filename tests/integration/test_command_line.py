"""The command line as a user meets it: artefacts, interrupts, separate steps, and bad input."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from shell import COMMAND, ENVIRONMENT, Done

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sklearn", "fvcore", "lightning_fabric", "jinja2")),
    reason="needs the data, measure, train and report extras",
)

TIMEOUT = 180
TINY = {
    "model.layers": "[1,1,1]",
    "model.planes": "[2,3,4]",
    "model.strides": "[1,2,1]",
    "model.stem_width": 4,
    "tree.projection_dim": 4,
    "data.train_limit": 200,
    "data.test_limit": 50,
    "dense.epochs": 10,
    "dense.batch_size": 20,
    "finetune.epochs": 2,
    "finetune.batch_size": 20,
    "conversion.restarts": 2,
}


def tiny(**changes: object) -> list[str]:
    settings = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> Done:
    out, err = process.communicate(timeout=TIMEOUT)
    return Done(process.returncode, out, err)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, finish(start("run", "digits-resnet", "--out", folder, "--json", *tiny()))


# -- what a run gives ----------------------------------------------------------------------------


def test_a_run_prints_one_object_and_leaves_every_artefact(whole):
    folder, done = whole
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    result = json.loads(done.out)
    assert {"task", "seed", "provenance", "cost", "dense", "converted", "branched"} <= set(result)
    assert Path(result["report"]).read_text().lstrip().lower().startswith("<!doctype html")
    assert sum("dense epoch" in line for line in done.err.splitlines()) == 10
    assert sum("branched epoch" in line for line in done.err.splitlines()) == 2
    assert not [line for line in done.err.splitlines() if line.startswith("sigmabranch:")]
    names = set(contents(folder))
    assert {"task.json", "measured.json", "result.json"} <= names
    for step in ("dense", "converted", "branched"):
        assert {f"{step}/manifest.json", f"{step}/weights.safetensors"} <= names
    for step in ("dense", "branched"):
        assert {f"{step}/metrics.csv", f"{step}/history.json"} <= names
        assert len((folder / step / "metrics.csv").read_text().splitlines()) == 1 + (
            10 if step == "dense" else 2
        )
    for step in ("converted", "branched"):
        assert f"{step}/record.json" in names
    pictures = {Path(name).suffix for name in names if name.startswith("report/")}
    assert {".html", ".png", ".svg"} <= pictures
    hidden = {Path(name).name for name in names if Path(name).name.startswith(".")}
    assert hidden <= {".sigmabranch"}  # the mark of what is ours, and no temporary


def test_the_same_command_again_repeats_the_result_and_trains_nothing(whole, shell):
    folder, first = whole
    before = {name: data for name, data in contents(folder).items() if "weights" in name}
    again = shell.run("run", "digits-resnet", "--out", folder, "--json", *tiny())
    assert again.code == 0
    assert "epoch" not in again.err
    ours, theirs = json.loads(again.out), json.loads(first.out)
    for key in ("task", "cost", "dense", "converted", "branched", "history"):
        assert ours[key] == theirs[key]
    assert before == {name: data for name, data in contents(folder).items() if "weights" in name}


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_interrupted_run_goes_on_and_ends_as_if_nothing_had_been(whole, shell, tmp_path):
    line = ["run", "digits-resnet", "--out", tmp_path, "--json", *tiny()]
    process = start(*line)
    wait_for(tmp_path / "dense" / "metrics.csv", process)
    process.send_signal(signal.SIGINT)
    stopped = finish(process)
    assert stopped.code == 3, stopped.err
    assert stopped.out == ""
    last = stopped.err.splitlines()[-1]
    assert last.startswith("sigmabranch: stopped: interrupted by SIGINT")
    assert "the same command continues" in last
    assert not (tmp_path / "dense" / "manifest.json").exists()
    resumed = shell.run(*line)
    assert resumed.code == 0
    assert 0 < sum("dense epoch" in row for row in resumed.err.splitlines()) < 10
    folder, uninterrupted = whole
    for step in ("dense", "converted", "branched"):
        name = f"{step}/weights.safetensors"
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), step
    ours, theirs = json.loads(resumed.out), json.loads(uninterrupted.out)
    for key in ("dense", "converted", "branched"):
        assert ours[key] == theirs[key]


def test_a_time_limit_stops_with_code_3_and_a_checkpoint(whole, shell, tmp_path):
    line = ["train", "digits-resnet", "--out", tmp_path, *tiny()]
    stopped = shell.run(*line, "--max-minutes", "0.0002")
    assert stopped.code == 3
    assert stopped.out == ""
    assert stopped.err.splitlines()[-1].startswith("sigmabranch: stopped: the time limit")
    finished = shell.run(*line)
    assert finished.code == 0
    assert (tmp_path / "dense" / "weights.safetensors").read_bytes() == (
        whole[0] / "dense" / "weights.safetensors"
    ).read_bytes()


def test_the_steps_in_folders_of_their_own_equal_the_run(whole, shell, tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    trained = shell.run("train", "digits-resnet", "--out", a, "--json", *tiny())
    converted = shell.run("convert", a / "dense", "--out", b, "--json")
    tuned = shell.run("finetune", b / "converted", "--out", c, "--json")
    measured = shell.run("evaluate", c / "branched", "--json")
    dense = shell.run("evaluate", a / "dense", "--json")
    held = "evaluate", c / "branched", "--set", "data.held_out=70", "--split", "held-out", "--json"
    kept = shell.run(*held)
    counted = shell.run("count", c / "branched", "--json")
    assert json.loads(kept.out)["samples"] == 70
    for done in (trained, converted, tuned, measured, dense, counted):
        assert done.code == 0, done.err
        assert done.out.count("\n") == 1
        assert isinstance(json.loads(done.out), dict)
    folder, expected = whole[0], json.loads(whole[1].out)
    for here, step in ((a, "dense"), (b, "converted"), (c, "branched")):
        assert (here / step / "weights.safetensors").read_bytes() == (
            folder / step / "weights.safetensors"
        ).read_bytes(), step
    assert json.loads(trained.out)["dense"] == json.loads(dense.out) == expected["dense"]
    assert json.loads(tuned.out)["branched"] == expected["branched"]
    assert json.loads(measured.out)["top1"] == expected["branched"]["top1"]
    assert json.loads(counted.out) == expected["cost"]


def test_help_is_for_newcomers_and_bare_calls_show_it(shell):
    lines = ([], ["--help"], ["run", "--help"], ["--version"])
    bare, asked, run, version = (shell.run(*line) for line in lines)
    assert bare.code == asked.code == run.code == version.code == 0
    assert bare.out == asked.out
    for verb in ("demo", "run", "train", "convert", "finetune", "evaluate", "count"):
        assert verb in asked.out
    for option in ("--data", "--out", "--seed", "--device", "--json", "--set", "--max-minutes"):
        assert option in run.out
    assert asked.err == run.err == ""


# -- bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(whole, shell, tmp_path_factory):
    """What each bad input does: a function from its name to (outcome, its output folder)."""
    root = tmp_path_factory.mktemp("bad")
    good = whole[0]
    junk = root / "junk" / "cifar-100-binary"
    junk.mkdir(parents=True)
    for name in ("train.bin", "test.bin", "fine_label_names.txt"):
        (junk / name).write_bytes(b"\0" * 3074)
    damaged = shutil.copytree(good / "branched", root / "damaged")
    weights = bytearray((damaged / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "weights.safetensors").write_bytes(weights)
    half = root / "half"
    half.mkdir()
    (half / "manifest.json").write_text("{")
    digits, tests = ["digits-resnet"], {}

    def case(name: str, verb: str, *arguments: object) -> None:
        out = root / name.replace(" ", "-") / "out"
        tests[name] = (out, [verb, *arguments, "--out", out])

    case("unknown task", "run", "digit-resnet")
    case("unknown verb", "walk", *digits)
    case("unknown option", "run", *digits, "--fast")
    case("unknown key", "run", *digits, "--set", "finetune.lrr=1")
    case("wrong value", "run", *digits, "--set", "dense.epochs=many")
    case("unknown device", "run", *digits, "--device", "abacus")
    case("absent device", "run", *digits, "--device", "cuda")
    case("unknown control", "run", *digits, "--control", "twin")
    case("missing task", "run")
    case("negative seed", "run", *digits, "--seed", "-1")
    case("no data folder", "train", "cifar100-small")
    case("missing data", "train", "cifar100-small", "--data", root / "nowhere")
    case("damaged data", "train", "cifar100-small", "--data", junk.parent)
    case("other classes", "run", *digits, *tiny(model__classes=7))
    case("wide tree", "run", *digits, *tiny(tree__widths="[99,99]"))
    case("deep tree", "run", *digits, *tiny(tree__depth=3))
    case("missing network", "convert", root / "nowhere")
    case("no network", "convert", junk)
    case("half a manifest", "evaluate", half)
    case("damaged network", "finetune", damaged)
    case("dense for branched", "finetune", good / "dense")
    case("branched for dense", "convert", good / "branched")
    case("another task", "run", *digits, *tiny(model__stem_width=5), "--dense", good / "dense")
    case("another tree", "finetune", good / "converted", "--set", "tree.depth=1")
    case("settings of what is made", "evaluate", good / "branched", "--set", "tree.depth=3")
    case("nothing held out", "evaluate", good / "dense", "--split", "held-out")
    case("held out too late", "evaluate", good / "dense", "--split", "held-out",
         "--set", "data.held_out=1200")  # fmt: skip
    case("routes of a dense network", "evaluate", good / "dense", "--seed", "1")
    case("bits without a budget", "convert", good / "dense", "--bits", "8")
    case("input of a folder", "convert", good / "dense", "--input", "1x8x8")
    case("seed out of reach", "run", *digits, "--seed", 2**32)
    case("few samples", "convert", good / "dense", "--set", "conversion.samples=1")
    case("infinite loss", "train", *digits, *tiny(dense__lr=1e30, dense__warmup_epochs=0))
    return lambda name: (shell.run(*tests[name][1]), tests[name][0])


BAD = {
    "unknown task": "digit-resnet.*known are digits-resnet.*did you mean digits-resnet",
    "unknown verb": "walk.*--help",
    "unknown option": "--fast.*--help",
    "unknown key": "finetune.lrr.*did you mean finetune.lr",
    "wrong value": "epochs.*must be int.*many",
    "unknown device": "abacus.*cpu",
    "absent device": "cuda",
    "unknown control": "twin.*single-path",
    "missing task": "Missing argument.*task.*--help",
    "negative seed": "seed.*--help",
    "no data folder": "cifar100 needs a folder.*--data",
    "missing data": "nowhere",
    "damaged data": r"train\.bin is damaged.*get .* again",
    "other classes": "10 classes.*for 7.*model.classes=10",
    "wide tree": "99 channels wide.*choose at most 12",
    "deep tree": "smaller depth",
    "missing network": "nowhere holds no saved network",
    "no network": "holds no saved network",
    "half a manifest": "manifest.json is damaged",
    "damaged network": "weights.safetensors is damaged.*copy it again",
    "dense for branched": "holds a dense network, need a branched one",
    "branched for dense": "holds a branched network, need a dense one",
    "another task": "belongs to another task.*stem_width",
    "another tree": "belongs to another task.*tree",
    "settings of what is made": "tree.depth=3 changes nothing.*only settings of data",
    "nothing held out": "no samples are held out: set data.held_out",
    "held out too late": "has learnt from 103 of the samples that data.held_out=1200",
    "routes of a dense network": "no routes to shuffle: leave out --seed",
    "bits without a budget": "--bits need a --budget",
    "input of a folder": "--input is the task's",
    "seed out of reach": "seed.*--help",
    "few samples": "1 calibration samples cannot make 2 clusters.*more data",
    "infinite loss": "loss.*epoch",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_code_2_and_nothing_half_written(bad, name):
    if name == "absent device" and torch.version.cuda and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done, out = bad(name)
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    *before, last = done.err.splitlines()
    assert last.startswith("sigmabranch: ")
    assert not any(line.startswith("sigmabranch") for line in before)
    assert re.search(BAD[name], last), last
    left = set(contents(out)) if out.exists() else set()
    if name == "few samples":
        # The dense network was copied, whole, before its conversion failed.
        assert {n for n in left if not n.startswith("dense/")} == {"task.json"}
    elif name == "infinite loss":
        assert not {n for n in left if "manifest" in n or n.endswith((".tmp", ".pt"))}
    else:
        assert left == set()


def test_a_damaged_checkpoint_is_refused_and_kept(shell, tmp_path):
    line = ["train", "digits-resnet", "--out", tmp_path, *tiny()]
    stopped = shell.run(*line, "--max-minutes", "0.0002")
    assert stopped.code == 3
    state = tmp_path / "dense" / "state.json"
    state.write_text(state.read_text()[:-40])
    before = contents(tmp_path / "dense")
    refused = shell.run(*line)
    assert refused.code == 2
    last = refused.err.splitlines()[-1]
    assert last.startswith("sigmabranch: ")
    assert "state.json is damaged" in last
    after = contents(tmp_path / "dense")
    assert {n: b for n, b in after.items() if "tensorboard" not in n} == {
        n: b for n, b in before.items() if "tensorboard" not in n
    }


def test_other_settings_need_another_folder(whole, shell):
    folder, _ = whole
    before = contents(folder)
    line = ["run", "digits-resnet", "--out", folder]
    changed = shell.run(*line, *tiny(finetune__lr=0.5))
    taken = shell.run(*line, "--no-resume", *tiny())
    assert changed.code == taken.code == 2
    assert "task.finetune.lr is" in changed.err
    assert "choose another --out" in changed.err
    assert "is in use" in taken.err
    assert contents(folder) == before
