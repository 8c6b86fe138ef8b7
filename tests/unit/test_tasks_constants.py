"""Every constant of a task carries its source, and what the paper states is what the task does."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from sigmabranch.errors import ConfigError
from sigmabranch.fields import to_fields
from sigmabranch.report.recipe_table import recipe_table
from sigmabranch.tasks import PAPER, TASKS, Source, constants
from sigmabranch.tasks import constants as constants_of
from sigmabranch.tasks.task import SECTIONS
from sigmabranch.training import FinetuneRecipe

OTHERS = [name for name in TASKS if name not in PAPER]


def settings(task) -> list[str]:
    """All keys of a task's settings."""
    return [f"{part}.{item.name}" for part in SECTIONS for item in fields(getattr(task, part))]


def found(task) -> dict:
    return {f"{item.section}.{item.name}": item for item in constants_of(task)}


@pytest.mark.parametrize("name", PAPER)
def test_every_setting_of_a_task_of_the_paper_has_exactly_one_mark(name):
    paper = PAPER[name]
    marks = [*paper.stated, *paper.fitted, *paper.open]
    assert sorted(marks) == sorted(settings(TASKS[name]))


@pytest.mark.parametrize("name", PAPER)
def test_the_catalog_has_every_value_that_the_paper_states_or_its_counts_force(name):
    assert [item for item in constants(TASKS[name]) if item.replaces] == []


def test_a_setting_without_a_mark_is_refused_by_name(monkeypatch):
    paper = PAPER["cifar100-resnet50"]
    holed = replace(paper, open=paper.open - {"finetune.clip_norm"})
    monkeypatch.setitem(PAPER, "cifar100-resnet50", holed)
    with pytest.raises(ConfigError, match=r"finetune\.clip_norm of CIFAR-100 .* has no mark"):
        constants(TASKS["cifar100-resnet50"])


@pytest.mark.parametrize("name", TASKS)
def test_every_setting_is_listed_once_with_its_value(name):
    task = TASKS[name]
    listed = found(task)
    assert len(listed) == len(constants(task))
    for key in settings(task):
        section, _, field = key.partition(".")
        assert listed[key].value == to_fields(getattr(getattr(task, section), field))
    json.dumps([item.to_dict() for item in listed.values()])


@pytest.mark.parametrize("name", OTHERS)
def test_a_task_that_is_not_the_papers_owes_nothing_to_it(name):
    assert {item.source for item in constants(TASKS[name])} == {Source.OURS}
    assert "not the paper's" in recipe_table(constants(TASKS[name]), of_the_paper=False).to_text()


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        (
            "cifar100-resnet50",
            {"dense.epochs": 200, "finetune.epochs": 60, "dense.batch_size": 256,
             "finetune.batch_size": 256, "dense.optimizer": "sgd", "dense.schedule": "cosine",
             "dense.warmup_epochs": 5, "finetune.resp_weight": 0.3, "tree.projection_dim": 128},
        ),
        (
            "imagenet-resnet50",
            {"dense.epochs": 90, "finetune.epochs": 100, "finetune.optimizer": "sgd",
             "finetune.schedule": "cosine", "dense.batch_size": 256, "model.classes": 1000},
        ),
        (
            "modelnet40-pointnet2",
            {"dense.epochs": 200, "finetune.epochs": 200, "dense.optimizer": "adam",
             "dense.batch_size": 32, "dense.schedule": "step", "finetune.step_epochs": 20},
        ),
    ],
)  # fmt: skip
def test_the_papers_table_of_recipes(name, stated):
    assert {key: PAPER[name].stated.get(key) for key in stated} == stated


def test_what_the_paper_leaves_open_is_never_claimed_for_it():
    for paper in PAPER.values():
        for name in ("lr", "momentum", "weight_decay", "label_smoothing", "precision"):
            assert {f"dense.{name}", f"finetune.{name}"} <= paper.open
        assert {"conversion.shared_fraction", "finetune.resp_temperature"} <= paper.open
    assert "finetune.resp_weight" in PAPER["modelnet40-pointnet2"].open
    assert PAPER["modelnet40-pointnet2"].fitted["tree.projection_dim"] == 128


def test_a_changed_setting_is_ours_and_names_the_papers_value():
    task = TASKS["cifar100-resnet50"].with_settings(
        ["finetune.resp_weight=0.5", "model.stem=imagenet", "dense.lr=0.2", "tree.depth=3"]
    )
    listed = found(task)
    table = recipe_table(constants(task), of_the_paper=True)
    sources = {
        f"{section}.{row[0]}": row[2] for section, rows in table.groups for row in rows
    }  # fmt: skip
    assert sources["finetune.resp_weight"] == "ours (the paper: 0.3)"
    assert sources["model.stem"] == "ours (the paper's counts: cifar)"
    assert sources["tree.leaves"] == "ours (the paper: [[0,0],[0,1],[1,0],[1,1]])"
    assert sources["dense.lr"] == "ours"
    assert sources["finetune.epochs"] == "the paper"
    assert listed["finetune.resp_weight"].to_dict()["paper"] == 0.3
    assert "paper" not in listed["dense.lr"].to_dict()


def test_a_setting_that_another_makes_idle_says_so():
    listed = found(TASKS["cifar100-resnet50"])
    assert listed["dense.step_epochs"].unused == "schedule=cosine"
    assert listed["dense.betas"].unused == "optimizer=sgd"
    assert listed["dense.momentum"].unused == ""
    changed = TASKS["cifar100-resnet50"].with_settings(
        ["dense.schedule=step", "dense.optimizer=adam", "dense.distill_weight=0.5"]
    )
    listed = found(changed)
    assert listed["dense.step_epochs"].unused == listed["dense.betas"].unused == ""
    assert listed["dense.distill_temperature"].unused == ""
    assert listed["dense.momentum"].unused == "optimizer=adam"


def test_idle_rules_name_settings_that_exist():
    from sigmabranch.tasks.constants import _IDLE

    names = {field.name for field in fields(FinetuneRecipe)}
    assert set(_IDLE) <= names
    assert {decides for decides, _ in _IDLE.values()} <= names
