"""A comparison: row by row and seed by seed, nothing twice, and no row at the cost of another."""

from __future__ import annotations

import pytest
from torch import nn

from sigmabranch import files
from sigmabranch.errors import CheckpointError
from sigmabranch.peers import Comparison, System, Trained, compare, find_system
from sigmabranch.peers.bench import Bench
from sigmabranch.tasks import Chain, Stopped, Task, open_task_data
from sigmabranch.tasks import chain as chains

pytest.importorskip("sklearn")
pytest.importorskip("fvcore")


class Broken(System):
    name = "broken"
    summary = "fails"

    def sketch(self, task: Task) -> nn.Module:
        return task.model.build()

    def run(self, bench: Bench) -> Trained:
        raise ValueError("it broke\nbadly")


def comparison(task, folder, rows, *, seeds=(0, 1), minutes=None) -> Comparison:
    def chain(place, seed, start, dataset):
        return Chain(
            task, place, seed=seed, start=start, max_minutes=minutes, branching=False,
            dataset=dataset,
        )  # fmt: skip

    return Comparison(
        task=task, folder=folder, rows=rows, groups={}, skipped={}, seeds=seeds, chain=chain,
        say=lambda line: None,
    )  # fmt: skip


def test_a_failed_row_loses_no_other_and_nothing_is_made_twice(task, tmp_path, monkeypatch):
    rows = {"broken": Broken(), "single-path": find_system("single-path")}
    found = comparison(task, tmp_path, rows).run()
    assert [(row["row"], row["seed"]) for row in found["failed"]] == [("broken", 0), ("broken", 1)]
    assert found["failed"][0]["reason"] == "it broke badly"
    measured = found["rows"]["single-path"]
    assert sorted(measured) == ["0", "1"]
    assert measured["0"]["accuracy"] != measured["1"]["accuracy"]
    starts = [tmp_path / f"seed{seed}" / "dense" / "weights.safetensors" for seed in (0, 1)]
    assert starts[0].read_bytes() == starts[1].read_bytes()
    monkeypatch.setattr(compare, "run_row", lambda *_: pytest.fail("made twice"))
    again = comparison(task, tmp_path, {"single-path": rows["single-path"]}).run()
    assert again["rows"] == {"single-path": measured}
    assert again["failed"] == []


def test_held_out_samples_are_measured_beside_the_test_split(task, tmp_path):
    held = task.with_settings(["data.held_out=30"])
    names = ("sigma-branch", "always-leaf-0", "dense-continued", "skipnet")
    rows = {name: find_system(name) for name in names}
    found = comparison(held, tmp_path, rows, seeds=(0,)).run()
    assert found["failed"] == []
    for row in (found["source"], *(found["rows"][name]["0"] for name in names)):
        assert (row["accuracy"]["samples"], row["held_out"]["samples"]) == (40, 30)
    tree, leaf = (found["rows"][name]["0"]["held_out"] for name in names[:2])
    assert leaf["top1"] == tree["always_leaf"][0]


KNOWN = {"schema": 1, "task": {}, "source": {"sha256": ""}, "rows": {}}


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ([], "no result of compare"),
        ({"schema": 1, "task": {}, "rows": {}}, "no result of compare"),
        ({**KNOWN, "source": []}, "no result of compare"),
        ({**KNOWN, "source": {}}, "no result of compare"),
        ({**KNOWN, "rows": {"single-path": [1]}}, "no result of compare"),
        ({**KNOWN, "rows": {"single-path": {"0": {}}}}, "no result of compare"),
        ({**KNOWN, "rows": {"single-path": {"0/../..": {"system": {}}}}}, "no result of compare"),
        ({**KNOWN, "schema": 7}, "schema 7"),
        (KNOWN, "another task"),
    ],
)
def test_what_cannot_be_included_is_refused_before_any_work(task, tmp_path, known, said):
    asked = comparison(task, tmp_path, {"single-path": find_system("single-path")})
    asked.known = [known]
    with pytest.raises(CheckpointError, match=said):
        asked.run()
    assert not (tmp_path / "source").exists()


def test_only_rows_that_were_asked_for_are_taken_over_and_what_is_left_is_said(task, tmp_path):
    rows = {"single-path": find_system("single-path")}
    known = comparison(task, tmp_path / "first", rows, seeds=(0, 1)).run()
    start = {"dense": tmp_path / "first" / "source" / "dense"}
    asked = comparison(task, tmp_path / "second", rows, seeds=(1,))
    chain, said = asked.chain, []
    asked.chain = lambda place, seed, given, dataset: chain(place, seed, given or start, dataset)
    asked.known, asked.say = [known], said.append
    assert asked.run()["rows"]["single-path"] == {"1": known["rows"]["single-path"]["1"]}
    assert not (tmp_path / "second" / "seed0").exists() and not said
    other = comparison(task, tmp_path / "third", {
        "single-path": find_system("single-path").changed({"match": "training"})
    }, seeds=(1,))  # fmt: skip
    other.chain, other.known, other.say = asked.chain, [known], said.append
    other.run()
    assert said[0] == "single-path, seed 1: the included row has other settings and is left out"


def test_a_comparison_reads_its_data_once(task, tmp_path, monkeypatch):
    opened = []

    def counted(*arguments):
        opened.append(arguments)
        return open_task_data(*arguments)

    monkeypatch.setattr(chains, "open_task_data", counted)
    rows = {name: find_system(name) for name in ("sigma-branch", "centred")}
    comparison(task, tmp_path, rows, seeds=(0, 1)).run()
    assert len(opened) == 1


def test_the_table_names_the_seed_of_the_source_network(task, tmp_path):
    made = Chain(task, tmp_path / "made", seed=3, branching=False)
    made.dense()
    asked = comparison(task, tmp_path / "out", {}, seeds=(5,))
    chain = asked.chain
    asked.chain = lambda place, seed, start, dataset: chain(
        place, seed, start or {"dense": made.folder / "dense"}, dataset
    )
    assert asked.run()["source"]["seed"] == 3


def test_a_comparison_without_time_stops_and_goes_on(task, tmp_path):
    rows = {"single-path": find_system("single-path")}
    with pytest.raises(Stopped):
        comparison(task, tmp_path, rows, seeds=(0,), minutes=0).run()
    found = comparison(task, tmp_path, rows, seeds=(0,)).run()
    assert found["rows"]["single-path"]["0"]["epochs"] == 2


def test_a_row_of_other_settings_needs_another_folder(task, tmp_path):
    files.write_json(
        compare.row_path(tmp_path / "seed0", "single-path"),
        {"system": {"name": "single-path", "match": "training"}},
    )
    with pytest.raises(CheckpointError, match="other settings"):
        comparison(task, tmp_path, {"single-path": find_system("single-path")}).run()
    assert not (tmp_path / "source").exists()


@pytest.mark.parametrize("name", ["flat-routing", "hash-routing"])
def test_rerouted_trees_are_taught_as_the_tree_is(task, tmp_path, name):
    settings = ("finetune.distill_weight=0.5", "finetune.class_target=true",
                "finetune.resp_prior=false", "conversion.clusters=classes")  # fmt: skip
    taught = task.with_settings(settings)
    found = comparison(taught, tmp_path, {name: find_system(name)}, seeds=(0,)).run()
    assert found["failed"] == []
    assert found["rows"][name]["0"]["epochs"] == 2
