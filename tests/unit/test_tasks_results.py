"""Result files: what is read, what is averaged, and what never is."""

from __future__ import annotations

import copy
import json
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmabranch.errors import CheckpointError
from sigmabranch.tasks import TASKS, Result, Spread, Task, group_results, read_results

TASK = TASKS["cifar100-resnet50"]


def content(task: Task = TASK, seed: int = 0, top1: float = 70.0, samples: int = 100) -> dict:
    """A small result file."""
    accuracy = {"samples": samples, "top1": top1, "top5": 90.0}
    return {
        "task": task.to_dict(),
        "seed": seed,
        "cost": {
            "dense": {"params": 10, "macs": 100},
            "net": {"total_params": 12, "active_params": 4, "macs": 60},
        },
        "dense": {**accuracy, "loss": top1 / 7},
        "branched": {**accuracy, "balance": 0.9},
    }


def made(*contents: dict) -> list[Result]:
    return [
        Result(file=f"{n}.json", task=Task.from_dict(part["task"]), seed=part["seed"], content=part)
        for n, part in enumerate(contents)
    ]


# -- averaging -----------------------------------------------------------------------------------

figures = st.lists(st.floats(-100, 100), min_size=1, max_size=8)


@given(figures)
def test_a_spread_is_the_mean_and_the_sample_deviation(values):
    spread = Spread.of(values)
    assert spread.n == len(values)
    assert spread.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    if len(values) == 1:
        assert spread.sd is None
        assert "±" not in spread.to_text()
    else:
        squares = sum((value - spread.mean) ** 2 for value in values)
        assert spread.sd == pytest.approx(math.sqrt(squares / (len(values) - 1)), abs=1e-6)


def test_a_spread_is_written_with_its_deviation():
    assert Spread.of([97.8, 99.0, 99.0]).to_text() == "98.60 ± 0.69"
    assert Spread.of([0.93456]).to_text(3) == "0.935"


variants = st.lists(
    st.tuples(st.sampled_from([0.1, 0.05, 0.02]), st.sampled_from([100, 200]), st.integers(0, 9)),
    unique=True,
    max_size=12,
)


@settings(max_examples=20, deadline=None)
@given(variants, st.randoms())
def test_runs_are_grouped_by_settings_and_test_set_and_by_nothing_else(drawn, random):
    tasks = {lr: TASK.with_settings([f"finetune.lr={lr}"]) for lr, _, _ in drawn}
    contents = [
        content(tasks[lr], seed, top1=70 + seed + lr, samples=size) for lr, size, seed in drawn
    ]
    expected = {(lr, size): sorted(s for a, b, s in drawn if (a, b) == (lr, size))
                for lr, size, _ in drawn}  # fmt: skip

    def seen(order: list[dict]) -> dict:
        groups = group_results(made(*order))
        return {
            (group.task.finetune.lr, group.first["branched"]["samples"]): (
                list(group.seeds), group.spread("branched", "top1").mean
            )
            for group in groups
        }  # fmt: skip

    groups = seen(contents)
    assert {key: seeds for key, (seeds, _) in groups.items()} == expected
    for (lr, _), (seeds, mean) in groups.items():
        assert mean == pytest.approx(statistics.fmean(70 + seed + lr for seed in seeds))
    random.shuffle(contents)
    assert seen(contents) == groups


def test_moving_averages_are_never_mixed_with_last_weights():
    averaged = TASK.with_settings(["finetune.ema_decay=0.999"])
    groups = group_results(made(content(), content(averaged, 1), content(seed=2)))
    assert [group.seeds for group in groups] == [(0, 2), (1,)]


def test_provenance_and_summary_do_not_split_a_group():
    other = content(seed=1) | {"provenance": {"commit": "b"}}
    other["task"] = {**other["task"], "summary": "reworded"}
    assert len(group_results(made(content() | {"provenance": {"commit": "a"}}, other))) == 1


def test_two_files_of_one_seed_are_refused():
    with pytest.raises(CheckpointError, match=r"0\.json and 1\.json hold .* seed 3"):
        group_results(made(content(seed=3), content(seed=3, top1=71)))


def test_a_dense_network_that_several_runs_share_counts_once():
    runs = [content(seed=seed, top1=70 + seed) for seed in range(3)]
    for run in runs:
        run["dense"] = dict(runs[0]["dense"])
    (group,) = group_results(made(*runs))
    assert group.spread("dense", "top1") == Spread(mean=70.0, sd=None, n=1)
    assert group.spread("branched", "top1").n == 3


def test_departures_name_every_setting_that_differs_and_no_other():
    task = TASK.with_settings(["dense.epochs=10", "tree.round_to=8"])
    (group,) = group_results(made(content(task)))
    assert group.departures(TASK) == {"dense.epochs": (10, 200), "tree.round_to": (8, 1)}
    assert group.departures(task) == {}


# -- reading -------------------------------------------------------------------------------------


def write(folder, name: str, value) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name).write_text(text, encoding="utf-8")


def test_only_results_in_the_folder_itself_are_read(tmp_path):
    write(tmp_path, "b.json", content(seed=1))
    write(tmp_path, "a.json", content(seed=0))
    write(tmp_path, "task.json", {"task": TASK.to_dict(), "seed": 0})
    write(tmp_path, "list.json", [1, 2])
    write(tmp_path, "notes.txt", "{")
    (tmp_path / "benchmarks").mkdir()
    write(tmp_path / "benchmarks", "c.json", content(seed=2))
    assert [(run.file, run.seed) for run in read_results(tmp_path)] == [
        ("a.json", 0),
        ("b.json", 1),
    ]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere"):
        read_results(tmp_path / "nowhere")


def damaged() -> dict[str, object]:
    whole = content()

    def without(*where: str) -> dict:
        part = copy.deepcopy(whole)
        inner = part
        for name in where[:-1]:
            inner = inner[name]
        del inner[where[-1]]
        return part

    return {
        "cut short": json.dumps(whole)[:-20],
        "no branched": without("branched"),
        "no seed": without("seed"),
        "no top-1": without("branched", "top1"),
        "no count": without("cost", "net", "macs"),
        "a text for a figure": whole | {"dense": {**whole["dense"], "top1": "70"}},
        "not a number": whole | {"dense": {**whole["dense"], "top1": math.nan}},
        "a list for a part": whole | {"cost": [1]},
        "a seed of no kind": whole | {"seed": "0"},
        "an unknown setting": whole | {"task": {**whole["task"], "data": {"nam": "x"}}},
        "no settings": whole | {"task": 3},
    }


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_result_is_one_line_that_names_the_file(kind, tmp_path):
    write(tmp_path, "good.json", content(seed=1))
    write(tmp_path, "bad.json", damaged()[kind])
    with pytest.raises(CheckpointError, match=r"bad\.json") as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_from_before_a_setting_existed_has_its_default(tmp_path):
    old = content()
    del old["task"]["finetune"]["ema_decay"]
    del old["task"]["model"]["family"]
    old["task"]["dense"]["accumulate"] = 1
    write(tmp_path, "old.json", old)
    write(tmp_path, "new.json", content(seed=1))
    assert [group.seeds for group in group_results(read_results(tmp_path))] == [(0, 1)]


def test_a_retired_setting_that_had_an_effect_is_refused(tmp_path):
    old = content()
    old["task"]["dense"]["accumulate"] = 4
    write(tmp_path, "old.json", old)
    with pytest.raises(CheckpointError, match=r"old\.json .*accumulate"):
        read_results(tmp_path)
