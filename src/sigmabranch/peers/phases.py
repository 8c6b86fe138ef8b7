"""One recipe as two trainings, for systems that train in two phases."""

from __future__ import annotations

from dataclasses import replace

from sigmabranch.errors import ConfigError
from sigmabranch.training import FinetuneRecipe, Recipe

# Of all epochs.
FIRST_PHASE = 0.6


def phases(recipe: FinetuneRecipe) -> tuple[FinetuneRecipe, FinetuneRecipe]:
    """A recipe as two trainings that share its epochs, and its warm-up in proportion.

    Raises:
        ConfigError: it has a single epoch.
    """
    if recipe.epochs < 2:
        raise ConfigError("a system of two trainings needs two epochs: set finetune.epochs=2")
    first = min(max(1, round(FIRST_PHASE * recipe.epochs)), recipe.epochs - 1)
    pace = recipe.warmup_epochs / recipe.epochs
    last = recipe.epochs - first
    return (
        replace(recipe.lasting(first), warmup_epochs=pace * first),
        replace(recipe.lasting(last), warmup_epochs=pace * last),
    )


def phases_mark(first: Recipe, last: Recipe) -> str:
    """How two trainings depart from the table's recipe."""
    return f"the recipe twice, of {first.epochs} and {last.epochs} epochs"
