"""Recipes: the paper's defaults, and refusal of anything that is not a recipe."""

from __future__ import annotations

import json

import pytest

from sigmabranch.errors import ConfigError
from sigmabranch.training import FinetuneRecipe, Recipe
from sigmabranch.training.optim import lr_factor


def test_defaults_are_the_papers_cifar_setting():
    dense, fine = Recipe(), FinetuneRecipe()
    assert (dense.epochs, fine.epochs, dense.batch_size) == (200, 60, 256)
    assert (dense.optimizer, dense.schedule, dense.warmup_epochs) == ("sgd", "cosine", 5)
    assert (fine.resp_weight, fine.resp_temperature) == (0.3, 1.0)
    assert not (fine.resp_prior or fine.class_target or fine.node_grad_scale)
    assert fine.balance_weight == fine.distill_weight == 0


def test_json_round_trip_gives_an_equal_recipe():
    recipe = FinetuneRecipe(betas=(0.8, 0.99), resp_weight_end=0.0, node_grad_scale=True)
    assert FinetuneRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_unknown_key_is_refused_with_the_near_match():
    with pytest.raises(ConfigError, match=r"'weight_deacy'.*weight_decay"):
        Recipe.from_dict({"weight_deacy": 0.1})


def test_fine_tuning_key_is_unknown_to_dense_training():
    with pytest.raises(ConfigError, match="resp_weight"):
        Recipe.from_dict({"resp_weight": 0.1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("lr", -0.1),
        ("lr", "fast"),
        ("lr", float("nan")),
        ("optimizer", "lion"),
        ("precision", "fp8"),
        ("compile", 1),
        ("betas", [0.9]),
        ("label_smoothing", 1.5),
        ("distill_temperature", 0),
        ("resp_temperature", 0.0),
        ("resp_temperature_end", -1.0),
        ("balance_weight", -1),
    ],
)
def test_value_of_wrong_type_or_range_is_refused_naming_its_key(key, value):
    with pytest.raises(ConfigError, match=key):
        FinetuneRecipe.from_dict({key: value})


def test_whole_numbers_pass_for_floats():
    assert Recipe.from_dict({"lr": 1}).lr == 1.0


def test_two_definitions_of_the_responsibility_are_refused():
    with pytest.raises(ConfigError, match="choose one"):
        FinetuneRecipe(resp_prior=True, class_target=True)


def test_a_longer_recipe_has_as_many_drops():
    stepped = FinetuneRecipe(epochs=200, schedule="step", step_epochs=20, warmup_epochs=0)
    long = stepped.lasting(400)
    assert (long.epochs, long.step_epochs) == (400, 40)
    for share in (0, 0.3, 0.999):
        assert lr_factor(long, int(share * 4000), 10) == lr_factor(stepped, int(share * 2000), 10)
    assert stepped.lasting(3).step_epochs == 1
    assert FinetuneRecipe(epochs=60).lasting(90) == FinetuneRecipe(epochs=90)


def test_lambda_moves_linearly_and_tau_geometrically_to_their_ends():
    recipe = FinetuneRecipe(
        resp_weight=0.4, resp_weight_end=0.0, resp_temperature=4.0, resp_temperature_end=0.25
    )
    assert recipe.resp_weight_at(0.0) == 0.4
    assert recipe.resp_weight_at(0.5) == pytest.approx(0.2)
    assert recipe.resp_weight_at(1.0) == pytest.approx(0.0)
    assert recipe.resp_temperature_at(0.5) == pytest.approx(1.0)
    assert recipe.resp_temperature_at(1.0) == pytest.approx(0.25)


def test_lambda_and_tau_stay_constant_without_an_end():
    recipe = FinetuneRecipe()
    assert recipe.resp_weight_at(0.7) == 0.3
    assert recipe.resp_temperature_at(0.7) == 1.0
