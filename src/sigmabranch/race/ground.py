"""What all candidates of a race share, and the training of one of them on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sigmabranch.conversion.shards import Loader
from sigmabranch.measure import correctness
from sigmabranch.tasks import Stopped
from sigmabranch.training import Batches, Event, FabricEngine, FitResult, Objective, Recipe, fit


@dataclass(kw_only=True)
class Ground:
    """Teacher, data and device of a race.

    Attributes:
        dense: the trained dense network, which all candidates imitate.
        batches: recipe → its training batches on the engine's device.
        calibration: training batches without augmentation.
        held_out: batches of samples that no candidate trains on.
        engine: one process on one device.
        folder: one folder for each candidate's checkpoints in it.
        settings: what makes this race this race, JSON-able.
        seed, accumulate: as for :func:`~sigmabranch.training.loop.fit`.
        deadline: of ``time.monotonic``, at which training stops; None for none.
        watch: called with (candidate, :class:`~sigmabranch.training.Event`) while training.
        calibrating: called with (what, samples done, samples in all) while converting.
    """

    dense: nn.Module
    batches: Callable[[Recipe], Batches]
    calibration: Loader
    held_out: Iterable[Sequence[Tensor]]
    engine: FabricEngine
    folder: Path
    settings: Mapping[str, Any]
    seed: int = 0
    accumulate: int = 1
    deadline: float | None = None
    watch: Callable[[str, Event], None] | None = None
    calibrating: Callable[[str, int, int], None] | None = None

    def train(
        self, name: str, network: nn.Module, objective: Objective, recipe: Recipe, until: int
    ) -> FitResult:
        """Train one candidate in place up to the end of epoch ``until``, or from a checkpoint on.

        Raises:
            Stopped: by a signal or the time limit; the next call goes on.
        """
        result = fit(
            network,
            objective,
            self.batches(recipe),
            recipe,
            folder=self.folder / name,
            engine=self.engine,
            accumulate=self.accumulate,
            seed=self.seed,
            identity={"race": dict(self.settings), "candidate": name},
            evaluate=lambda trained: {"top1": 100 * self.judge(trained).double().mean().item()},
            progress=None if self.watch is None else partial(self.watch, name),
            max_minutes=self._minutes_left(),
            until=until,
        )
        if result.epoch < until:
            raise Stopped(result.reason, self.folder)
        return result

    def judge(self, network: nn.Module) -> Tensor:
        """(N,) bool: the held-out samples that a network gets right."""
        return correctness(network, self.held_out)

    def _minutes_left(self) -> float | None:
        if self.deadline is None:
            return None
        return max(0.0, (self.deadline - time.monotonic()) / 60)
