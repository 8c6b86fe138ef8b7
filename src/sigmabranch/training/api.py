"""Training with a plain loader, for users with a network and data of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from sigmabranch.conversion.shards import Loader
from sigmabranch.coupling import fingerprint
from sigmabranch.errors import ConfigError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.training.batches import LoaderBatches
from sigmabranch.training.engine import FabricEngine
from sigmabranch.training.loop import FitResult, fit
from sigmabranch.training.objectives import DenseObjective, Objective, finetuning
from sigmabranch.training.recipe import FinetuneRecipe, Recipe


def train(
    model: nn.Module, loader: Loader, recipe: Recipe | None = None, **options: Any
) -> FitResult:
    """Train a dense network in place.

    Args:
        model: (B, ...) → (B, V) logits.
        loader: sized iterable of (inputs, labels), such as a ``DataLoader``; each batch is an
            optimizer step. Several processes all get the same loader and share every batch. It may
            give inputs alone where there is a teacher and ``recipe.distill_weight`` is 1.
        recipe: how; the paper's CIFAR-100 setting if None.
        options: ``folder`` (for checkpoints and metrics.csv: the same call continues a stopped
            run; without it nothing is kept), ``device``, ``teacher`` (put on the device and into
            evaluation mode), ``labels`` (False ignores those that the loader gives), and
            ``accumulate``, ``seed``, ``evaluate``, ``progress``, ``max_minutes``, ``resume`` of
            :func:`~sigmabranch.training.loop.fit`, which also lists the errors raised.
    """
    recipe = recipe or Recipe()
    objective = DenseObjective(recipe, options.pop("teacher", None))
    return _fit(model, objective, loader, recipe, **options)


def finetune(
    net: SigmaBranchNet, loader: Loader, recipe: FinetuneRecipe | None = None, **options: Any
) -> FitResult:
    """Train all paths of a branched network, in place.

    Together, by equations 5 to 8 of the paper, or with ``recipe.upcycle`` first as one path and
    then each on its own samples (:mod:`~sigmabranch.training.upcycling`).

    Args:
        net: from :func:`~sigmabranch.conversion.convert`, or a single path, which is trained as
            :func:`train` does.
        loader: as for :func:`train`.
        recipe: how; the paper's setting if None.
        options: as for :func:`train`; ``teacher`` is the dense network that the leaves imitate
            when ``recipe.distill_weight`` is set. Without labels they do nothing else, and its
            distribution takes the label's place in equation 6; label smoothing is then unused.
    """
    recipe = recipe or FinetuneRecipe()
    if not isinstance(recipe, FinetuneRecipe):
        raise ConfigError(f"fine-tuning takes a FinetuneRecipe, not a {type(recipe).__name__}")
    objective = finetuning(net, recipe, options.pop("teacher", None))
    return _fit(net, objective, loader, recipe, **options)


def _fit(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    recipe: Recipe,
    *,
    folder: Path | str | None = None,
    device: str = "auto",
    seed: int = 0,
    labels: bool = True,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    **options: Any,
) -> FitResult:
    engine = FabricEngine(device)
    batches = LoaderBatches(loader, engine.device, seed=seed, shards=engine.shards, labels=labels)
    with TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        return fit(
            model,
            objective,
            batches,
            recipe,
            folder=place,
            engine=engine,
            seed=seed,
            identity=_network_identity(model) | ({} if labels else {"labels": "ignored"}),
            evaluate=evaluate,
            **options,
        )


def _network_identity(model: nn.Module) -> dict[str, Any]:
    """What tells one network to train from another: its shapes, and how it was converted."""
    record = json.dumps(getattr(model, "record", None), sort_keys=True)
    return {
        "network": fingerprint(model.state_dict()),
        "record": hashlib.sha256(record.encode()).hexdigest(),
    }
