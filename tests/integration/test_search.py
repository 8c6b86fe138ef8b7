"""``sigmabranch search``: trials that go on, a front that is one, and a test split left alone."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from conftest import TINY
from sigmabranch.errors import CheckpointError, ConfigError, ConversionError
from sigmabranch.files import read_json
from sigmabranch.report import search_table
from sigmabranch.saving import save_dense
from sigmabranch.search import Bench, Search, Space, best_of, holdout, pareto
from sigmabranch.search.holdout import has_seen, hold_out
from sigmabranch.search.trees import Trees
from sigmabranch.tasks import Stopped, chain, find_task, open_task_data

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("optuna", "sklearn", "lightning_fabric", "fvcore")),
    reason="needs the search, data, train and measure extras",
)

TASK = "digits-resnet"
OWN = (*TINY, "model.strides=[1,1,1]")
SPACE = Space(stages=("layer2", "layer3"))
EPOCHS, SHARE = 2, 0.25
SETTINGS = [part for setting in OWN for part in ("--set", setting)]
SEARCH = ["search", TASK, *SETTINGS, "--epochs", EPOCHS, "--validation", SHARE,
          "--space", "stages=layer2,layer3", "--json"]  # fmt: skip
BAD = {
    "unknown task": (["search", "digits"], "unknown task 'digits'"),
    "no trial": (["search", TASK, "--trials", "0"], "--trials"),
    "unknown knob": (["search", TASK, "--space", "depht=2"], "did you mean depth"),
    "knob without a value": (["search", TASK, "--space", "depth="], "depth has no value"),
    "no knob": (["search", TASK, "--space", "depth"], "takes knob=value"),
    "value of another type": (["search", TASK, "--space", "depth=deep"], "depth must be"),
    "unknown shape": (["search", TASK, "--space", "shape=round"], "'round': choose from"),
    "range upside down": (["search", TASK, "--space", "active=0.6,0.2"], "least and the most"),
    "no trunk": (["search", TASK, "--space", "trunk_share=0"], "must lie in (0, 1], got [0.0]"),
    "unknown stage": (["search", TASK, "--space", "stages=layer9"], "'layer9': choose from layer1"),
    "too few stages": (
        ["search", TASK, "--space", "stages=layer2", "--space", "depth=2"], "needs as many stages",
    ),
    "nothing possible": (
        [*SEARCH, "--space", "active=0.01,0.01"], "no tree of this space is possible",
    ),
    "no budget": (["search", TASK, "--budget", "much"], "is no size"),
    "nothing to judge by": ([*SEARCH, "--set", "data.train_limit=1"], "another --validation"),
    "other settings": ([*SEARCH, "--out", "out", "--seed", 1], "seed is 0 there and 1 here"),
    "other space": (
        [*SEARCH, "--out", "out", "--space", "depth=1"], "other settings (knobs.cuts is",
    ),
    "source of another task": (
        [*SEARCH, "--out", "new", "--dense", "out/source/dense", "--set", "model.stem_width=5"],
        "belongs to another task",
    ),
    "no source": ([*SEARCH, "--out", "new", "--dense", "nowhere"], "nowhere holds no saved"),
    "damaged journal": ([*SEARCH, "--out", "damaged"], "damaged/study.log is damaged: line 2"),
    "lost record": (
        [*SEARCH, "--out", "lost", "--trials", 5], "cannot read lost/trials/001/trial.json",
    ),
}  # fmt: skip


def worth(found) -> list[dict]:
    """The trials without the time that they took."""
    return [{k: v for k, v in trial.items() if k != "seconds"} for trial in found["trials"]]


@pytest.fixture(scope="module")
def made(shell, tmp_path_factory):
    """A folder, what three trials in it found, and what two more did."""
    folder = tmp_path_factory.mktemp("search")
    calls = (("--trials", 3), ("--trials", 5, "--budget", "45%"))
    ends = [shell.run(*SEARCH, "--out", "out", *call, cwd=folder) for call in calls]
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    return folder, *(json.loads(end.out) for end in ends)


def test_three_trials_are_made_and_the_next_call_adds_two(made):
    folder, three, five = made
    assert [trial["number"] for trial in five["trials"]] == [0, 1, 2, 3, 4]
    assert five["trials"][:3] == three["trials"]
    assert read_json(folder / "out" / "search.json") == five
    for trial in five["trials"]:
        assert trial["state"] == "complete"
        assert 0 <= trial["top1"] <= 100
        low, high = (share * five["source"]["params"] for share in five["space"]["active"])
        assert 0.8 * low <= trial["active_params"] <= high
        cuts = trial["choice"]["cuts"].split(",")
        assert trial["tree"]["cuts"] == cuts[: len(trial["tree"]["cuts"])]
    assert five["epochs"] == EPOCHS
    assert (five["validation"]["samples"], five["validation"]["training_samples"]) == (16, 48)
    assert five["provenance"]["command"].startswith(f"sigmabranch search {TASK}")
    assert not [*(folder / "out").glob("trials/*/work")]


def test_no_trial_beats_one_of_the_front_and_the_front_beats_all_others(made):
    _, _, five = made
    by_number = {trial["number"]: trial for trial in five["trials"]}

    def beats(one, other):
        a, b = ((-t["top1"], t["active_params"], t["macs"]) for t in (one, other))
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    beaten = {n for n, t in by_number.items() if any(beats(o, t) for o in by_number.values())}
    front = set(five["pareto"])
    assert front
    assert not front & beaten
    twins = by_number.keys() - front - beaten
    assert all("same_as" in by_number[number] for number in twins)


def test_the_best_is_the_most_accurate_one_within_the_budget(made):
    _, three, five = made
    limit = 0.45 * five["source"]["params"]
    within = [trial for trial in five["trials"] if trial["active_params"] <= limit]
    assert 0 < len(within) < 5
    best = five["trials"][five["best"]]
    assert best in within
    assert best["top1"] == max(trial["top1"] for trial in within)
    assert three["trials"][three["best"]]["top1"] == max(t["top1"] for t in three["trials"])


def test_the_front_is_written_as_a_table_and_drawn(made):
    folder, _, five = made
    text = (folder / "out" / "pareto.txt").read_text()
    assert f"{five['pareto'][0]}" in text
    assert "5 trials, 0 of them not possible" in text
    for name in ("pareto.png", "pareto.svg"):
        assert (folder / "out" / name).stat().st_size > 1000


def test_the_printed_command_trains_the_tree_in_full_on_all_samples(made, shell):
    folder, _, five = made
    verb, named, *options = shlex.split(five["commands"][str(five["best"])])[1:]
    assert (verb, named, options[0]) == ("run", TASK, "--out")
    best, task = five["trials"][five["best"]], find_task(TASK).with_settings(OWN)
    full = find_task(TASK).with_settings(options[3::2])
    assert set(options[2::2]) == {"--set"}
    assert full.tree.to_dict() == best["tree"]
    assert full.conversion.shared_fraction == best["choice"]["shared_fraction"]
    assert (full.data, full.dense, full.finetune) == (task.data, task.dense, task.finetune)
    done = shell.run("count", TASK, *options[2:], "--json", cwd=folder)
    assert json.loads(done.out)["net"]["active_params"] == best["active_params"]


def test_a_source_is_known_by_what_it_has_learnt_from(made, tmp_path):
    folder, _, _ = made
    task = find_task(TASK).with_settings(OWN)
    held = hold_out(task, None, torch.device("cpu"), SHARE)
    assert not has_seen(folder / "out" / "source" / "dense", task, held)
    save_dense(task.model.build(), tmp_path / "whole", {"task": task.to_dict()})
    assert has_seen(tmp_path / "whole", task, held)
    other = task.with_settings(["data.train_limit=50"])
    save_dense(task.model.build(), tmp_path / "other", {"task": other.to_dict()})
    with pytest.raises(CheckpointError, match=r"train_limit is 50 there and 64 here"):
        has_seen(tmp_path / "other", task, held)


def test_a_source_that_has_seen_the_held_out_samples_is_told(made):
    _, _, five = made
    note = "has learnt from the held-out samples"
    assert note not in search_table(five).to_text(1000)
    text = search_table({**five, "source": {**five["source"], "seen": True}, "best": None})
    assert note in text.to_text(1000)
    assert "No trial is within the budget" in text.to_text(1000)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(made, shell, name):
    folder = made[0]
    for copy in ("damaged", "lost"):
        if not (folder / copy).exists():
            shutil.copytree(folder / "out", folder / copy)
    journal = (folder / "out" / "study.log").read_text().splitlines(keepends=True)
    (folder / "damaged" / "study.log").write_text("".join([journal[0], "{\n", *journal[2:]]))
    (folder / "lost" / "trials" / "001" / "trial.json").unlink(missing_ok=True)
    arguments, words = BAD[name]
    code, out, err = shell.run(*arguments, cwd=folder)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert not (folder / "new").exists()
    assert not (folder / "runs" / f"search-{TASK}").exists()


# -- in this process, where a split can refuse to be read -----------------------------------------


class Unreadable:
    """A split of which nothing may be known."""

    def __getattr__(self, name):
        raise AssertionError(f"the test split's {name} was asked for")

    def __len__(self):
        raise AssertionError("the test split was counted")


@pytest.fixture
def no_test_split(monkeypatch):
    def opened(*arguments):
        dataset = open_task_data(*arguments)
        return type(dataset)(
            name=dataset.name,
            train=dataset.train,
            test=Unreadable(),
            class_names=dataset.class_names,
            shape=dataset.shape,
        )

    monkeypatch.setattr(holdout, "open_task_data", opened)
    monkeypatch.setattr(chain, "open_task_data", None)


@pytest.fixture
def begun(made, tmp_path, no_test_split) -> Path:
    """A folder that holds the dense network already."""
    shutil.copytree(made[0] / "out" / "source", tmp_path / "source")
    return tmp_path


def search(folder: Path, **options) -> Search:
    task = find_task(TASK).with_settings(OWN)
    bench = Bench(
        task=task, folder=folder, epochs=EPOCHS, validation=SHARE, device="cpu", **options
    )
    return Search(bench=bench, space=SPACE, say=lambda _: None)


@pytest.mark.parametrize(
    ("moment", "number"), [("training", signal.SIGTERM), ("converting", signal.SIGINT)]
)
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(made, begun, moment, number):
    """In another process than the first, and without reading the test split."""
    _, three, _ = made
    sent = []

    def interrupt(now):
        if now and not sent:  # a second signal would end the process
            sent.append(number)
            os.kill(os.getpid(), number)

    def training(step, event):
        trial = step.startswith("trial 0,") and event.kind == "epoch"
        interrupt(moment == "training" and trial)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"interrupted by {number.name}; the same command"):
        search(
            begun,
            watch=training,
            calibrating=lambda *_: interrupt(moment == "converting"),
        ).run(1)
    assert signal.getsignal(number) is before
    assert not (begun / "trials" / "000" / "trial.json").exists()
    assert (begun / "trials" / "000" / "work").exists()
    found = search(begun).run(1)
    assert worth(found) == worth(three)[:1]
    assert found["source"] == three["source"]


def test_time_that_is_up_stops_the_search_before_a_trial_is_asked(begun):
    with pytest.raises(Stopped, match="time limit"):
        search(begun, max_minutes=0).run(3)
    assert not (begun / "trials").exists()


def test_a_tree_that_is_not_possible_is_told_as_failed_and_the_others_go_on(begun, monkeypatch):
    draft, calls = Trees.draft, []

    def failing(self, *arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise ConversionError("no such tree")
        return draft(self, *arguments)

    monkeypatch.setattr(Trees, "draft", failing)
    with pytest.raises(ConfigError, match="none of 1 trees is possible: no such tree"):
        search(begun).run(1)
    found = search(begun).run(2)
    assert [trial["state"] for trial in found["trials"]] == ["failed", "complete"]
    assert found["trials"][0]["reason"] == "no such tree"
    assert found["pareto"] == [1]


def test_a_journal_line_that_a_crash_cut_short_costs_nothing(made, tmp_path, no_test_split):
    folder, _, five = made
    shutil.copytree(folder / "out", tmp_path / "out")
    journal = tmp_path / "out" / "study.log"
    journal.write_bytes(journal.read_bytes() + b'{"op_code":4,"wor')
    assert worth(search(tmp_path / "out").run(5)) == worth(five)
    assert journal.read_bytes().endswith(b"}\n")


# -- parts ----------------------------------------------------------------------------------------


def told(study, trials: int) -> list:
    """What is asked until there are so many trials; every fifth is not possible."""
    asked = []
    while (trial := study.next(trials)) is not None:
        number, choice = trial
        asked.append(choice)
        found = {"top1": choice["active"] % 7, "active_params": choice["active"], "macs": number}
        study.tell(number, None if number % 5 == 4 else found)
    return asked


def test_what_is_asked_depends_on_the_seed_and_the_past_alone(tmp_path):
    from sigmabranch.search.study import Study

    knobs = Space().knobs([("a",), ("b",), ("a", "b")])
    whole = told(Study(tmp_path / "whole.log", knobs, 3), 16)
    parts = [told(Study(tmp_path / "parts.log", knobs, 3), trials) for trials in range(1, 17)]
    assert [choice for part in parts for choice in part] == whole
    assert told(Study(tmp_path / "other.log", knobs, 4), 4) != whole[:4]
    assert all(20 <= choice["active"] <= 60 for choice in whole)
    assert {choice["cuts"] for choice in whole} == {"a", "b", "a,b"}
    finished = Study(tmp_path / "parts.log", knobs, 3).finished()
    assert [number for number, complete in finished.items() if not complete] == [4, 9, 14]


def test_a_trial_that_was_asked_is_asked_again_until_it_is_told(tmp_path):
    from sigmabranch.search.study import Study

    knobs = Space().knobs([("a",), ("b",)])
    first = Study(tmp_path / "study.log", knobs, 0).next(5)
    study = Study(tmp_path / "study.log", knobs, 0)
    assert study.next(5) == first
    study.tell(0, None)
    assert study.next(5) != first
    assert study.next(1) is None


def test_held_out_samples_are_the_rest_of_what_the_limit_leaves():
    task = find_task(TASK).with_settings(["data.train_limit=100"])
    held = hold_out(task, None, torch.device("cpu"), 0.2)
    learnt, judged = held.dataset.train, held.dataset.test
    assert (held.task.data.train_limit, len(learnt), len(judged)) == (80, 80, 20)
    limited = open_task_data(held.task, None, torch.device("cpu")).train
    assert limited.inputs.equal(learnt.inputs)
    whole = open_task_data(task, None, torch.device("cpu")).train
    both = torch.cat([learnt.inputs, judged.inputs])
    assert sorted(both.flatten(1).tolist()) == sorted(whole.inputs.flatten(1).tolist())
    assert judged.labels.bincount(minlength=10).min() >= 1


def test_what_a_task_holds_out_is_neither_learnt_nor_judged_by():
    task = find_task(TASK).with_settings(["data.held_out=297"])
    held = hold_out(task, None, torch.device("cpu"), 0.2)
    own = open_task_data(task, None, torch.device("cpu"))
    assert (len(held.dataset.train), len(held.dataset.test)) == (800, 200)
    both = torch.cat([held.dataset.train.inputs, held.dataset.test.inputs])
    assert sorted(both.flatten(1).tolist()) == sorted(own.train.inputs.flatten(1).tolist())
    limited = open_task_data(held.task, None, torch.device("cpu"))
    assert limited.train.inputs.equal(held.dataset.train.inputs)
    assert limited.held_out.inputs.equal(own.held_out.inputs)


def test_a_space_is_read_from_settings_and_keeps_every_knob():
    space = Space.with_settings(
        ["depth=3", "active=0.3,0.5", "stages=c,a,b", "early=true", "entry=inner"]
    )
    assert Space.from_dict(space.to_dict()) == space
    cuts = space.cuts(["a", "b", "c", "d"])
    assert cuts == [("a", "b", "c")]
    knobs = space.knobs(cuts)
    assert knobs["active"] == range(30, 51)
    assert (knobs["early"], knobs["entry"], knobs["cuts"]) == ((True,), ("inner",), ("a,b,c",))
    assert "projection_dim" not in knobs
    many = Space(depth=(1,)).cuts([f"block{number}" for number in range(20)])
    assert len(many) == 6
    assert (many[0], many[-1]) == (("block0",), ("block19",))


def test_of_equal_trials_the_first_counts_and_the_cheaper_one_is_best():
    def trial(number, top1, active, macs):
        return {"number": number, "state": "complete", "top1": top1, "active_params": active,
                "macs": macs}  # fmt: skip

    trials = [
        trial(0, 50.0, 10, 10), trial(1, 50.0, 10, 10), trial(2, 50.0, 11, 9),
        trial(3, 49.0, 12, 10), trial(4, 40.0, 1, 100), {"number": 5, "state": "failed"},
    ]  # fmt: skip
    assert pareto(trials) == [4, 0, 2]
    assert best_of(trials, None) == 0


def test_every_knob_reaches_the_tree():
    trees = Trees(task=find_task(TASK).with_settings(OWN), space=Space())
    choice = {
        "cuts": "layer2,layer3",
        "shape": "balanced",
        "active": 50,
        "trunk_share": 0.75,
        "shared_fraction": 0.25,
        "early": True,
        "projection_dim": 6,
    }
    drafted = trees.draft(choice, torch.nn.Identity(), [], 0)
    tree = drafted.tree
    assert (tree.cuts, tree.decide_after) == (("layer2", "layer3"), "layer1")
    assert (tree.trunk_share, tree.projection_dim) == (0.75, 6)
    assert drafted.conversion.shared_fraction == 0.25
    assert tree.widths is not None
