"""The training loop: one for dense training and for fine-tuning.

A run is a pure function of network, data, recipe and seed. Whatever is random in a step is seeded
from the step's number, so a checkpoint holds no generator state, and a resumed run on the CPU
equals an uninterrupted one bit for bit. How many processes and passes share a step is no part of
the run: a checkpoint continues with any number of them. Metrics stay on the device; the host reads
them about once a second, so that an accelerator is not kept waiting.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.errors import CheckpointError, ConfigError, DataError
from sigmabranch.training.alarms import routing_alarms
from sigmabranch.training.batches import Batches
from sigmabranch.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sigmabranch.training.engine import Engine, FabricEngine, naming_lost_processes
from sigmabranch.training.events import Event, Progress
from sigmabranch.training.learner import Learner
from sigmabranch.training.logs import write_csv
from sigmabranch.training.meter import Meter
from sigmabranch.training.objectives import Objective
from sigmabranch.training.passes import pass_size
from sigmabranch.training.recipe import Recipe
from sigmabranch.training.stopping import StopSwitch

PULSE_SECONDS = 1.0
CHECKPOINT_SECONDS = 180.0
# An epoch's end is saved unless that would take more than one part in so many of the run's time.
CHECKPOINT_SHARE = 20.0
# Processes vote on stopping and saving only so often, because a vote makes the host wait for the
# device; but a launcher that was told to stop does not wait for long.
VOTE_STEPS = 16
VOTE_SECONDS = 5.0

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
    accumulate: int = 1,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
    max_minutes: float | None = None,
    resume: bool = True,
    stop: Callable[[], bool] | None = None,
    until: int | None = None,
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
        accumulate: passes through the network for each optimizer step, whose gradients are added:
            the more, the less memory. The batch size stays that of the batches, and the run the
            same run.
        seed: of dropout and whatever else is random inside the network.
        identity: what else makes this run this run (task, tree, data); JSON-able.
        evaluate: called at an epoch's end, in every process, with the network in evaluation mode;
            its numbers join the epoch's record.
        progress: receives an :class:`Event` now and then.
        max_minutes: stop cleanly after this long.
        resume: continue from the checkpoint in ``folder`` if there is one.
        stop: asked after every step; true stops cleanly.
        until: stop cleanly after so many of the recipe's epochs; a later call goes on.

    Returns:
        ``complete=False`` after a stop by time, signal or wish, or at ``until``: the checkpoint
        holds the state.

    Raises:
        CheckpointError: the checkpoint is damaged, belongs to another run, or cannot be written.
        ConfigError: ``accumulate`` below 1.
        DataError: the data ended early.
        NumericError: the loss or a weight became NaN or infinite; the last checkpoint remains.
        MemoryExhausted: a pass does not fit; the message says what would.
        ProcessLost: another process of the run is gone; the last checkpoint remains.
    """
    if accumulate < 1:
        raise ConfigError(f"accumulate is {accumulate}; give 1 or more")
    engine = engine or FabricEngine()
    run_identity = {
        "recipe": recipe.to_dict(),
        "seed": seed,
        "objective": type(objective).__name__,
        "steps_per_epoch": len(batches),
        "training_data": dict(batches.identity),
        **(identity or {}),
    }
    cuda = [engine.device] if engine.device.type == "cuda" else []
    with (
        torch.random.fork_rng(cuda),
        StopSwitch(max_minutes, stop) as switch,
        engine.joint_norms(model),
        naming_lost_processes(folder),
    ):
        learner = Learner(
            model,
            objective,
            recipe,
            engine,
            steps_per_epoch=len(batches),
            pass_size=pass_size(batches.batch_size, engine.world_size, accumulate),
            seed=seed,
        )
        run = _Run(
            learner=learner,
            batches=batches,
            recipe=recipe,
            engine=engine,
            folder=Path(folder),
            identity=run_identity,
            evaluate=evaluate,
            progress=progress,
            switch=switch,
            until=recipe.epochs if until is None else min(until, recipe.epochs),
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
    folder: Path
    identity: Mapping[str, Any]
    evaluate: Evaluate | None
    progress: Progress | None
    switch: StopSwitch
    until: int

    def __post_init__(self) -> None:
        self.steps = len(self.batches)
        self.history: list[dict[str, Any]] = []
        self.meter = Meter(self.steps)
        self.seconds = 0.0  # in the current epoch, over all calls
        self.saved_at, self.save_cost = time.monotonic(), 0.0
        self.next_vote = 0  # at this step, or the first after it

    def train(self) -> FitResult:
        """Run the remaining epochs, or until the switch says stop."""
        self.emit("start")
        reason = ""
        while len(self.history) < self.until and not reason:
            reason = self.train_epoch()
            if self.meter.done == self.steps:
                self.finish_epoch()
                reason = reason or self.decide(now=True)[0]
        complete = len(self.history) == self.recipe.epochs
        if complete:
            self.learner.finish()
        else:
            self.save()
            self.learner.rest()
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
        start = self.meter.done
        shares = self.batches.epoch(len(self.history), start)
        began = pulsed = time.monotonic()
        seconds_before = self.seconds
        for step in range(start, self.steps):
            share = next(shares, None)
            if share is None:
                raise DataError(
                    f"the data ended after {step} of {self.steps} batches: "
                    "the set changed, or its length is wrong"
                )
            self.meter.record(self.learner.learn(share))
            if self.learner.turns:
                self.turn()
                shares = self.batches.epoch(len(self.history), step + 1)
            now = time.monotonic()
            self.seconds = seconds_before + now - began
            if now - pulsed >= PULSE_SECONDS:
                self.pulse()
                pulsed = now
            reason, save = self.decide()
            if reason:
                return reason
            if save:
                self.save()
        return ""

    def turn(self) -> None:
        """Change the network's form, shown views that no epoch trains on; keep the outcome."""
        self.learner.turn(self.batches.epoch(self.recipe.epochs))
        self.save()

    def pulse(self) -> None:
        """Look at the latest metrics and tell the watcher."""
        if self.engine.world_size == 1:  # several look together, when they save
            self.meter.check_finite(len(self.history) + 1)
        self.emit("step", {"lr": self.learner.lr, **self.meter.recent()})

    def finish_epoch(self) -> None:
        """Evaluate, record the epoch, warn, and save if it is time."""
        epoch = len(self.history) + 1
        last = epoch == self.recipe.epochs
        self.meter.reduce(self.engine.mean)
        self.meter.check_finite(epoch)
        means = {name: value.item() for name, value in self.meter.means().items()}
        record = {"epoch": epoch, "seconds": self.seconds, "lr": self.learner.lr, **means}
        if self.evaluate and (last or epoch % self.recipe.eval_every == 0):
            self.engine.unify(self.learner.network)
            with torch.no_grad(), self.engine.autocast(self.recipe.precision):
                record |= self.evaluate(self.learner.network.eval())
        self.history.append(plain(record))
        self.meter, self.seconds = Meter(self.steps), 0.0
        if self.engine.is_main:
            write_csv(self.folder / "metrics.csv", self.history)
        self.emit("epoch", self.history[-1])
        if self.learner.has_turned:
            for alarm in routing_alarms(self.history[-1]):
                self.warn(alarm)
        if last or time.monotonic() - self.saved_at >= CHECKPOINT_SHARE * self.save_cost:
            self.save()

    def decide(self, *, now: bool = False) -> tuple[str, bool]:
        """Why to stop, empty to go on, and whether to save; the same in every process.

        Several processes vote, every few steps or ``now``; between votes they go on.
        """
        reason, late = self.switch.reason, time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS
        if self.engine.world_size == 1:
            return reason, late
        if not now and self.learner.step < self.next_vote:
            return "", False
        pace = self.seconds / max(1, self.meter.done)
        stop, save, pace = self.engine.totals(
            [bool(reason), late and self.engine.is_main, pace / self.engine.world_size]
        )
        steps = min(VOTE_STEPS, int(VOTE_SECONDS / max(pace, 1e-9)))
        self.next_vote = self.learner.step + max(1, steps)
        return (reason or "another process stopped") if stop else "", bool(save)

    def save(self) -> None:
        """Write a checkpoint, of finite numbers only."""
        began = time.monotonic()
        self.meter.reduce(self.engine.mean)
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
        steps = self.engine.totals([self.learner.step, self.learner.step**2])
        if steps[0] ** 2 != steps[1] * self.engine.world_size:  # equal only if all steps are
            raise CheckpointError(
                f"the processes find different checkpoints in {self.folder}: "
                "it must be one folder that all hosts share"
            )

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
