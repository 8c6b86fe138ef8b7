"""The race of a network and loaders of the user's own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.conversion import ConversionSpec
from sigmabranch.conversion.calibrate import stream
from sigmabranch.conversion.shards import Loader
from sigmabranch.errors import ConfigError
from sigmabranch.race.candidates import make_plan
from sigmabranch.race.ground import Ground
from sigmabranch.race.race import Race
from sigmabranch.training import (
    Event,
    FabricEngine,
    FinetuneRecipe,
    LoaderBatches,
    Recipe,
    launched,
)
from sigmabranch.tree import TreeSpec

# The narrow network has no start, so it trains longer: about as long as a source network and its
# fine-tuning together.
_SCRATCH = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """How a race ended.

    Attributes:
        name: of the winner: ``"tree"``, ``"single-path"`` or ``"narrow-dense"``.
        network: the winner, in eval mode.
        result: all candidates with their intervals, JSON-able
            (:meth:`~sigmabranch.race.race.Race.run`).
    """

    name: str
    network: nn.Module
    result: dict[str, Any]


def best(
    dense: nn.Module,
    loader: Loader,
    *,
    budget: int | str,
    held_out: Loader,
    recipe: FinetuneRecipe | None = None,
    scratch: Recipe | None = None,
    tree: TreeSpec | None = None,
    spec: ConversionSpec | None = None,
    folder: Path | str | None = None,
    device: str = "auto",
    seed: int = 0,
    accumulate: int = 1,
    max_minutes: float | None = None,
    progress: Callable[[str, Event], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Best:
    """The best network that reads at most ``budget`` bytes of parameters for an input.

    A tree, a single path and, where this library can build one, a narrow dense network are trained
    and compared on ``held_out``; of those that the samples cannot tell apart from the most
    accurate, the smallest to store wins.

    Args:
        dense: (B, ...) → (B, V) logits, trained; all candidates imitate it.
        loader: sized iterable of (inputs, labels), for training and calibration.
        budget: bytes of float32 parameters, such as ``"12MB"``, or ``"40%"`` of the dense network.
        held_out: (inputs, labels) batches in a fixed order, of samples that neither ``dense`` nor
            the candidates train on.
        recipe: fine-tuning of tree and path; the paper's if None. Where it says nothing of
            imitation and late upcycling, the values in ``docs/best.md`` are taken.
        scratch: recipe of the narrow dense network; ``recipe``, three times as long, if None.
        tree: as for :func:`~sigmabranch.conversion.plan_budget`.
        spec: of the conversion; channels are chosen on average over all samples.
        folder: keeps everything; the same call then continues a stopped race. None keeps nothing.
        device, seed, accumulate: as for :func:`~sigmabranch.training.train`.
        max_minutes: stop after this long.
        progress: called with (candidate, :class:`~sigmabranch.training.Event`).
        say: told in one line how each part went.

    Raises:
        ConfigError: an impossible budget or recipe, or no candidate that could be made.
        CheckpointError: the folder belongs to another race.
        Stopped: by a signal or the time limit; the same call continues.
    """
    if launched():
        raise ConfigError("a race runs in one process: start it without torchrun")
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    recipe = recipe or FinetuneRecipe()
    if not isinstance(recipe, FinetuneRecipe):
        raise ConfigError(f"best takes a FinetuneRecipe, not a {type(recipe).__name__}")
    if iter(held_out) is held_out:
        raise ConfigError("held_out is used up after one pass: give a list or a DataLoader")
    engine = FabricEngine(device)
    dense = dense.to(engine.device).eval()
    plan = make_plan(
        dense,
        next(stream(loader, 1, engine.device))[0],
        budget,
        tree or TreeSpec(),
        spec or ConversionSpec(),
        recipe,
        scratch or _longer(recipe),
    )
    with TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        ground = Ground(
            dense=dense,
            batches=lambda _: LoaderBatches(loader, engine.device, seed=seed),
            calibration=loader,
            held_out=held_out,  # type: ignore[arg-type]  # its batches are checked when read
            engine=engine,
            folder=Path(place),
            settings={"plan": plan.to_dict(), "seed": seed, "source": _digest(dense)},
            seed=seed,
            accumulate=accumulate,
            deadline=deadline,
            watch=progress,
        )
        race = Race(plan=plan, ground=ground, notes={"seed": seed}, say=say)
        result = race.run()
        return Best(name=result["winner"], network=race.network(result["winner"]), result=result)


def _longer(recipe: FinetuneRecipe) -> Recipe:
    """The plain part of a fine-tuning recipe, over more epochs."""
    known = Recipe().to_dict()
    plain = {name: value for name, value in recipe.to_dict().items() if name in known}
    return Recipe.from_dict(plain).lasting(_SCRATCH * recipe.epochs)


def _digest(model: nn.Module) -> str:
    """SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16
