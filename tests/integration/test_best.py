"""``sigmabranch best``: stopped and continued, its table and its network, and what it refuses."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from conftest import TINY
from sigmabranch.files import read_json
from sigmabranch.measure import count_parameters
from sigmabranch.saving import load

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sklearn", "lightning_fabric", "jinja2")),
    reason="needs the data, train and report extras",
)

SETTINGS = [part for setting in (*TINY, "model.strides=[1,1,1]") for part in ("--set", setting)]
HELD_OUT = ["--set", "data.held_out=50"]
BEST = ["best", "digits-resnet", *SETTINGS, *HELD_OUT, "--out", "out"]
BUDGET = ["--budget", "70%"]
BAD = {
    "no budget": (BEST, "Missing option '--budget'"),
    "budget too small": ([*BEST, "--budget", "1B"], "the smallest path has"),
    "budget for everything": ([*BEST, "--budget", "1GB"], "holds the whole dense network"),
    "unknown task": (["best", "digits", *BUDGET], "unknown task 'digits'"),
    "too many held out": (
        [*BEST, *BUDGET, "--set", "data.held_out=2000"], "samples cannot be held out",
    ),
    "no teacher for the dense network": (
        [*BEST, *BUDGET, "--out", "new", "--set", "dense.distill_weight=0.5"], "needs a teacher",
    ),
    "other budget": ([*BEST, "--budget", "60%"], "out was made with other settings (plan.budget"),
    "other seed": ([*BEST, *BUDGET, "--seed", "1"], "seed is 0 there and 1 here"),
    "a winner is no dense network of a task": (
        ["best", "out/source", *BUDGET], "holds no saved network: try one of dense",
    ),
    "a model that has seen everything": (["best", "seen/dense", *BUDGET], "data.held_out=N"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(shell, tmp_path_factory):
    """A folder, and how three calls in it ended."""
    folder = tmp_path_factory.mktemp("best")
    calls = (("--max-minutes", "0"), (), ("--json", "--result", "copy.json"))
    ends = [shell.run(*BEST, *BUDGET, *call, cwd=folder) for call in calls]
    train = ["train", "digits-resnet", *SETTINGS, "--out", "seen"]
    assert shell.run(*train, cwd=folder).code == 0
    return folder, *ends


def test_a_stopped_race_continues_and_a_finished_one_only_reports(made):
    folder, stopped, whole, again = made
    assert [end.code for end in (stopped, whole, again)] == [3, 0, 0], whole.err + again.err
    assert "continues from" in stopped.err
    assert "after 100% of the fine-tuning" in whole.err
    assert "epoch" not in again.err
    found = json.loads(again.out)
    assert found == read_json(folder / "out" / "result.json") == read_json(folder / "copy.json")
    assert f"{found['winner']}, best" in whole.out


def test_all_three_keep_within_the_budget_and_are_judged_by_the_same_held_out_samples(made):
    *_, again = made
    found = json.loads(again.out)
    rows = {row["name"]: row for row in found["candidates"]}
    assert [*rows] == ["narrow-dense", "single-path", "tree"]
    assert found["held_out"] == 50 and found["task"]["data"]["held_out"] == 50
    for row in rows.values():
        assert 4 * row["active_params"] <= found["budget"]
        assert row["held_out"]["low"] <= row["held_out"]["mean"] <= row["held_out"]["high"]
        assert ("test" in row) == (row["state"] == "complete")
    assert rows[found["winner"]]["behind"]["low"] <= 0


def test_the_winner_is_a_saved_network_like_any_other(shell, made):
    folder, *_, again = made
    found = json.loads(again.out)
    row = next(row for row in found["candidates"] if row["name"] == found["winner"])
    assert count_parameters([load(folder / "out" / "best")]) == row["stored_params"]
    end = shell.run("evaluate", "out/best", "--json", cwd=folder)
    assert end.code == 0, end.err
    assert json.loads(end.out)["top1"] == pytest.approx(row["test"]["mean"])


def test_a_dense_network_that_left_samples_out_can_be_given(shell, made):
    folder, *_, again = made
    end = shell.run("best", "out/source/dense", *BUDGET, "--out", "given", "--json", cwd=folder)
    assert end.code == 0, end.err
    theirs, ours = json.loads(again.out), json.loads(end.out)
    assert ours["source"] == theirs["source"]
    assert ours["candidates"] == theirs["candidates"]


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(shell, made, arguments, message):
    end = shell.run(*arguments, cwd=made[0])
    assert end.code == 2 and message in end.err
    assert len(end.err.strip().splitlines()) == 1 and end.out == ""
