"""A race: intervals, ties, early stops, what is trained again, and networks of one's own."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sigmabranch as sb
from sigmabranch import files
from sigmabranch.errors import CheckpointError, ConfigError, NumericError
from sigmabranch.race import Race, accuracy, choose, lead, losers
from sigmabranch.race.candidates import imitating, make_plan
from sigmabranch.report import best_table
from sigmabranch.tasks import Stopped
from sigmabranch.training import FinetuneRecipe, Recipe

SAMPLES = 1000
TREE = sb.TreeSpec(projection_dim=4)
RECIPE = FinetuneRecipe(epochs=2, batch_size=32, lr=0.01, warmup_epochs=0.0)


def right(first: int, last: int) -> torch.Tensor:
    """The samples from ``first`` to ``last`` are answered correctly."""
    number = torch.arange(SAMPLES)
    return (first <= number) & (number < last)


# The figures are SciPy's (Wilson), and those of the mean and variance of paired samples.
def test_an_accuracy_has_wilsons_interval():
    found = accuracy(right(0, 800))
    assert [found.mean, found.low, found.high] == pytest.approx([80, 77.4081, 82.3623], abs=1e-4)
    none = accuracy(right(0, 0))
    assert [none.mean, none.low, none.high] == pytest.approx([0, 0, 0.3827], abs=1e-4)


@pytest.mark.parametrize(
    ("ahead", "behind", "expected"),
    [
        ((0, 800), (0, 800), (0.0, -0.196, 0.196)),  # alike: open, but narrow
        ((0, 800), (0, 790), (1.0, 0.352, 1.644)),  # the second is never right alone
        ((0, 800), (50, 840), (1.0, -0.867, 2.863)),  # as far ahead, but they differ more
    ],
)
def test_a_lead_is_judged_by_the_samples_that_differ(ahead, behind, expected):
    found = lead(right(*ahead), right(*behind))
    assert [found.mean, found.low, found.high] == pytest.approx(expected, abs=1e-3)
    other = lead(right(*behind), right(*ahead))
    assert [other.mean, other.low, other.high] == pytest.approx(
        [-found.mean, -found.high, -found.low]
    )


STORED = {"narrow-dense": 100, "single-path": 98, "tree": 300}


@pytest.mark.parametrize(
    ("dense", "path", "tree", "winner"),
    [
        ((0, 700), (0, 710), (0, 800), "tree"),  # clearly ahead
        ((0, 700), (50, 840), (0, 800), "single-path"),  # a tie goes to what is cheaper to store
        ((0, 800), (0, 700), (50, 840), "narrow-dense"),
        ((0, 800), (0, 800), (0, 800), "single-path"),
    ],
)
def test_ties_go_to_the_cheapest_to_store_and_nothing_clearly_worse_wins(dense, path, tree, winner):
    correct = {"narrow-dense": right(*dense), "single-path": right(*path), "tree": right(*tree)}
    assert choose(correct, STORED) == winner


def test_only_a_candidate_that_stays_below_the_leaders_interval_is_stopped():
    correct = {"a": right(0, 800), "b": right(0, 760), "c": right(0, 700)}
    before = {"a": right(0, 790), "b": right(0, 760), "c": right(0, 690)}
    reason = "73.76 % at most, when a already had at least 77.41 %"
    assert losers(correct, before) == {"c": reason}
    assert losers(correct, before | {"c": right(0, 600)}) == {}  # it gains ten points a part
    assert losers(correct, {}) == losers({"c": correct["c"]}, before) == {}


# -- a race without training ---------------------------------------------------------------------


@dataclass
class Runner:
    """A candidate whose answers after each epoch are given."""

    name: str
    size: int
    answers: tuple[tuple[int, int], ...]
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=4))

    def make(self, ground):
        return nn.Linear(self.size, 1, bias=False)

    def objective(self, network, ground):
        return self


@dataclass
class Course:
    """Keeps the epochs that were trained; stops after ``most`` of them."""

    folder: object
    most: int = 100
    dense: object = (0, 900)
    settings: dict = field(default_factory=lambda: {"seed": 0})
    trained: list = field(default_factory=list)
    now: object = None

    def train(self, name, network, runner, recipe, until):
        place = self.folder / f"{name}.json"
        done = files.read_json(place)["epoch"] if place.exists() else 0
        for epoch in range(done + 1, until + 1):
            if len(self.trained) == self.most:
                raise Stopped("the time limit is reached", self.folder)
            if runner.answers[epoch - 1] is None:
                raise NumericError("a weight became NaN")
            self.trained.append((name, epoch))
            files.write_json(place, {"epoch": epoch})
        self.now = runner.answers[until - 1]
        return SimpleNamespace(epoch=until, history=[{"seconds": 60.0}] * until)

    def judge(self, network):
        return right(*(self.dense if network is self.dense else self.now))


RUNNERS = [
    Runner("narrow-dense", 100, ((0, 300), (0, 300), (0, 300), (0, 300))),
    Runner("single-path", 98, ((0, 700), (0, 740), (0, 780), (0, 800))),
    Runner("odd", 50, ((0, 700), None, None, None)),
    Runner("tree", 300, ((0, 690), (0, 740), (0, 790), (0, 802))),
]


def race(folder, most=100, said=None):
    plan = SimpleNamespace(
        budget=400,
        finetune=Recipe(epochs=4),
        candidates=lambda: RUNNERS,
        left_out=lambda: {"other": "it cannot be built"},
    )
    saying = (lambda line: None) if said is None else said.append
    course = Course(folder, most)
    runner = Race(plan=plan, ground=course, say=saying)
    return runner, course


def test_losers_stop_early_the_broken_is_reported_and_the_winner_is_saved(tmp_path):
    said = []
    runner, course = race(tmp_path, said=said)
    found = runner.run()
    assert found["winner"] == "single-path"  # two samples behind the tree, which is no difference
    rows = {row["name"]: row for row in found["candidates"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "narrow-dense": "stopped", "single-path": "complete", "odd": "failed", "tree": "complete",
        "other": "left out",
    }  # fmt: skip
    assert ("narrow-dense", 3) not in course.trained and ("tree", 4) in course.trained
    assert "when single-path already had at least" in rows["narrow-dense"]["reason"]
    assert rows["odd"]["reason"] == "a weight became NaN"
    assert rows["narrow-dense"]["epochs"] == 2 and rows["tree"]["epochs"] == 4
    assert rows["single-path"]["behind"]["mean"] == pytest.approx(0.2)
    assert "about 12 min left" in said[0]  # four candidates, three epochs each, a minute an epoch
    assert (tmp_path / "best" / "manifest.json").exists()
    text = best_table(found).to_text()
    assert "single-path, best" in text and "other, left out: it cannot be built" in text


def test_a_stopped_race_goes_on_where_it_was_and_ends_alike(tmp_path):
    whole, course = race(tmp_path / "whole")
    expected = whole.run()
    parts = []
    for most in (2, 3, 100):
        runner, stage = race(tmp_path / "parts", most)
        with suppress(Stopped):
            found = runner.run()
        parts += stage.trained
    assert parts == course.trained
    for result in (expected, found):
        del result["folder"]
    assert found == expected
    again, stage = race(tmp_path / "parts")
    assert again.run() | {"folder": ""} == expected | {"folder": ""} and stage.trained == []


def test_a_folder_of_another_race_is_refused(tmp_path):
    race(tmp_path)[0].run()
    runner, course = race(tmp_path)
    course.settings = {"seed": 1}
    with pytest.raises(CheckpointError, match="seed is 0 there and 1 here"):
        runner.run()


# -- networks and loaders of one's own -----------------------------------------------------------


def test_best_hands_out_a_network_within_the_budget_and_goes_on_in_its_folder(
    dense, batches, tmp_path
):
    def run():
        return sb.best(
            dense, batches[:2], budget="60%", held_out=batches[2:], recipe=RECIPE, tree=TREE,
            scratch=Recipe(epochs=2, lr=0.01, warmup_epochs=0.0), folder=tmp_path, device="cpu",
        )  # fmt: skip

    first, again = run(), run()
    rows = {row["name"]: row for row in first.result["candidates"]}
    assert list(rows) == ["narrow-dense", "single-path", "tree"]
    assert all(4 * row["active_params"] <= first.result["budget"] for row in rows.values())
    assert rows["tree"]["recipe"]["upcycle"] == 0.4 and rows["tree"]["recipe"]["distill_weight"] > 0
    x = batches[2][0]
    assert again.result == first.result
    assert torch.equal(again.network(x), first.network(x))
    torch.testing.assert_close(sb.load(tmp_path / "best")(x), first.network(x))


def test_a_network_that_cannot_be_narrowed_races_without_its_narrow_form(dense, batches):
    own = copy.deepcopy(dense)
    own.skeleton_source = None
    found = sb.best(
        own, batches[:2], budget="60%", held_out=batches[2:], recipe=RECIPE, tree=TREE, device="cpu"
    )
    left_out = found.result["candidates"][-1]
    assert left_out["state"] == "left out" and "builds no narrower ResNet" in left_out["reason"]
    assert found.name in ("single-path", "tree")


@pytest.mark.parametrize(
    ("budget", "message"),
    [("1B", "the smallest path has"), ("100%", "holds the whole dense network"), ("x", "no size")],
)
def test_an_impossible_budget_is_refused(dense, budget, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(
            dense, torch.zeros(1, 1, 8, 8), budget, TREE, sb.ConversionSpec(),
            RECIPE, RECIPE,
        )  # fmt: skip


def test_other_recipes_and_loaders_are_refused(dense, batches):
    with pytest.raises(ConfigError, match="FinetuneRecipe, not a Recipe"):
        sb.best(dense, batches, budget="60%", held_out=batches, recipe=Recipe(epochs=1))
    with pytest.raises(ConfigError, match="used up after one pass"):
        sb.best(dense, batches, budget="60%", held_out=iter(batches))


def test_imitation_that_a_recipe_sets_is_kept():
    assert imitating(Recipe(), 0.3).distill_weight == 0.3
    assert imitating(Recipe(distill_weight=1.0), 0.3).distill_weight == 1.0
