"""The training loop: one for dense training and for fine-tuning.

A run is a pure function of network, data, recipe and seed. Whatever is random in a step is seeded
from the step's number, so a checkpoint holds no generator state, and a resumed run on the CPU
equals an uninterrupted one bit for bit. Metrics stay on the device; the host reads them about
once a second, so that an accelerator is not kept waiting.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.errors import DataError
from sigmabranch.training.alarms import routing_alarms
from sigmabranch.training.batches import Batches
from sigmabranch.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sigmabranch.training.engine import Engine, FabricEngine
from sigmabranch.training.events import Event, Progress
from sigmabranch.training.learner import Learner
from sigmabranch.training.logs import write_csv
from sigmabranch.training.meter import Meter
from sigmabranch.training.objectives import Objective
from sigmabranch.training.recipe import Recipe
from sigmabranch.training.stopping import StopSwitch

PULSE_SECONDS = 1.0
CHECKPOINT_SECONDS = 180.0
# An epoch's end is saved unless that would take more than one part in so many of the run's time.
CHECKPOINT_SHARE = 20.0
# Processes vote on stopping only so often, because a vote makes the host wait for the device.
VOTE_STEPS = 16

Evaluate = Callable[[nn.Module], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """How a call of :func:`fit` ended.

    Attributes:
        complete: whether all epochs are done; if not, calling again goes on.
        epoch: epochs finished.
        history: one record per finished epoch.
        reason: why the run stopped early; empty if it is complete.
    """

    complete: bool
    epoch: int
    history: list[dict[str, Any]]
    reason: str = ""


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    recipe: Recipe,
    *,
    folder: Path | str,
    engine: Engine | None = None,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
    max_minutes: float | None = None,
    resume: bool = True,
    stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Train ``model`` in place; on return it is on the engine's device, in evaluation mode.

    With ``recipe.ema_decay`` the moving average is what gets evaluated, and what the model holds
    once the run is complete.

    Args:
        model: the network; ``objective.entry`` names the method that is trained.
        objective: the loss.
        batches: the data, on the engine's device.
        recipe: optimizer, schedule and the rest.
        folder: receives the checkpoint and ``metrics.csv``.
        engine: devices and processes; by default one process, on CUDA if there is a GPU.
        seed: of dropout and whatever else is random inside the network.
        identity: what else makes this run this run (task, tree, data); JSON-able.
        evaluate: called at an epoch's end, in every process, with the network in evaluation mode;
            its numbers join the epoch's record.
        progress: receives an :class:`Event` now and then.
        max_minutes: stop cleanly after this long.
        resume: continue from the checkpoint in ``folder`` if there is one.
        stop: asked after every step; true stops cleanly.

    Returns:
        ``complete=False`` after a stop by time, signal or wish: the checkpoint holds the state.

    Raises:
        CheckpointError: the checkpoint is damaged, belongs to another run, or cannot be written.
        DataError: the data ended early.
        NumericError: the loss or a weight became NaN or infinite; the last checkpoint remains.
    """
    engine = engine or FabricEngine()
    run_identity = {
        "recipe": recipe.to_dict(),
        "seed": seed,
        "objective": type(objective).__name__,
        "batches_per_epoch": len(batches),
        **(identity or {}),
    }
    steps = math.ceil(len(batches) / recipe.accumulate)
    cuda = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), StopSwitch(max_minutes, stop) as switch:
        learner = Learner(model, objective, recipe, engine, steps_per_epoch=steps, seed=seed)
        run = _Run(
            learner=learner,
            batches=batches,
            recipe=recipe,
            engine=engine,
            steps=steps,
            folder=Path(folder),
            identity=run_identity,
            evaluate=evaluate,
            progress=progress,
            switch=switch,
        )
        if resume:
            run.restore()
        return run.train()


@dataclass(kw_only=True)
class _Run:
    """One call of :func:`fit`: epochs, evaluations, stops and checkpoints."""

    learner: Learner
    batches: Batches
    recipe: Recipe
    engine: Engine
    steps: int
    folder: Path
    identity: Mapping[str, Any]
    evaluate: Evaluate | None
    progress: Progress | None
    switch: StopSwitch

    def __post_init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.meter = Meter(self.steps)
        self.seconds = 0.0  # in the current epoch, over all calls
        self.saved_at, self.save_cost = time.monotonic(), 0.0

    def train(self) -> FitResult:
        """Run the remaining epochs, or until the switch says stop."""
        self.emit("start")
        reason = ""
        while len(self.history) < self.recipe.epochs and not reason:
            reason = self.train_epoch()
            if self.meter.done == self.steps:
                self.finish_epoch()
                reason = reason or self.stop_reason(vote=True)
        complete = len(self.history) == self.recipe.epochs
        if complete:
            self.learner.finish()
        else:
            self.save()
        self.engine.barrier()
        self.emit("end", message="" if complete else reason)
        return FitResult(
            complete=complete,
            epoch=len(self.history),
            history=self.history,
            reason="" if complete else reason,
        )

    def train_epoch(self) -> str:
        """Run the current epoch's remaining steps; returns why it was left early, if it was."""
        self.learner.train()
        size, start = self.recipe.accumulate, self.meter.done
        pairs = self.batches.epoch(len(self.history), start * size)
        began = pulsed = time.monotonic()
        seconds_before = self.seconds
        for _ in range(start, self.steps):
            self.meter.record(self.learner.learn(self.next_batches(pairs)))
            now = time.monotonic()
            self.seconds = seconds_before + now - began
            if now - pulsed >= PULSE_SECONDS:
                self.meter.check_finite(len(self.history) + 1)
                self.emit("step", {"lr": self.learner.lr, **self.meter.recent()})
                pulsed = now
            reason = self.stop_reason(vote=self.learner.step % VOTE_STEPS == 0)
            if reason:
                return reason
            if now - self.saved_at >= CHECKPOINT_SECONDS:
                self.save()
        return ""

    def next_batches(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The batches of the next step; an epoch's last step may have fewer."""
        size = self.recipe.accumulate
        wanted = min(size, len(self.batches) - self.meter.done * size)
        group = list(islice(pairs, wanted))
        if len(group) < wanted:
            raise DataError(
                f"the data ended after {self.meter.done * size + len(group)} "
                f"of {len(self.batches)} batches: the set changed, or its length is wrong"
            )
        return group

    def finish_epoch(self) -> None:
        """Evaluate, record the epoch, warn, and save if it is time."""
        epoch = len(self.history) + 1
        last = epoch == self.recipe.epochs
        self.meter.check_finite(epoch)
        means = {name: self.engine.mean(value).item() for name, value in self.meter.means().items()}
        record = {"epoch": epoch, "seconds": self.seconds, "lr": self.learner.lr, **means}
        if self.evaluate and (last or epoch % self.recipe.eval_every == 0):
            with torch.no_grad(), self.engine.autocast(self.recipe.precision):
                record |= self.evaluate(self.learner.network.eval())
        self.history.append(plain(record))
        self.meter, self.seconds = Meter(self.steps), 0.0
        if self.engine.is_main:
            write_csv(self.folder / "metrics.csv", self.history)
        self.emit("epoch", self.history[-1])
        for alarm in routing_alarms(self.history[-1]):
            self.warn(alarm)
        if last or time.monotonic() - self.saved_at >= CHECKPOINT_SHARE * self.save_cost:
            self.save()

    def stop_reason(self, *, vote: bool) -> str:
        """Why to stop now; several processes only stop together, after a vote."""
        reason = self.switch.reason
        if self.engine.world_size == 1:
            return reason
        if not vote or not self.engine.agree(bool(reason)):
            return ""
        return reason or "another process stopped"

    def save(self) -> None:
        """Write a checkpoint, of finite numbers only."""
        began = time.monotonic()
        self.meter.check_finite(len(self.history) + 1)
        self.learner.check_finite()
        if self.engine.is_main:
            checkpoint = Checkpoint(
                step=self.learner.step,
                seconds=self.seconds,
                history=self.history,
                identity=self.identity,
                tensors={**self.learner.state_dict(), "meter": self.meter.state_dict()},
            )
            save_checkpoint(self.folder, checkpoint)
            self.emit("checkpoint")
        self.saved_at = time.monotonic()
        self.save_cost = self.saved_at - began

    def restore(self) -> None:
        """Continue from the folder's checkpoint, if there is one."""
        checkpoint = load_checkpoint(self.folder, self.identity)
        if checkpoint is not None:
            self.learner.load_state_dict(checkpoint.tensors, checkpoint.step)
            self.meter.load_state_dict(checkpoint.tensors["meter"], self.engine.device)
            self.history, self.seconds = list(checkpoint.history), checkpoint.seconds

    def warn(self, message: str) -> None:
        """Say what looks wrong, to the watcher or else to Python's warnings."""
        if self.progress is not None:
            self.emit("warning", message=message)
        elif self.engine.is_main:
            warnings.warn(message, stacklevel=2)

    def emit(self, kind: Any, metrics: dict[str, Any] | None = None, message: str = "") -> None:
        """Tell the watcher, in the main process."""
        if self.progress is not None and self.engine.is_main:
            self.progress(
                Event(
                    kind=kind,
                    epoch=len(self.history),
                    epochs=self.recipe.epochs,
                    step=self.meter.done,
                    steps=self.steps,
                    metrics=metrics or {},
                    message=message,
                )
            )


def plain(value: Any) -> Any:
    """``value`` as JSON keeps it: tensors and tuples as lists, NaN and infinity as None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
