"""What all trials of a search share: data, the dense network, a short fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from sigmabranch.archive import WEIGHTS, read_manifest
from sigmabranch.measure import cost, evaluate_dense
from sigmabranch.saving import load_dense
from sigmabranch.search.holdout import Held, has_seen, hold_out
from sigmabranch.tasks import Chain, Stopped, Task, ordered
from sigmabranch.tasks.counting import example
from sigmabranch.training import Event, FinetuneRecipe, resolve_device
from sigmabranch.training.stopping import StopSwitch


@dataclass(kw_only=True)
class Bench:
    """The bench that every tree is put on.

    Attributes:
        task: data, dense network, tree, conversion and fine-tuning.
        folder: of everything the search writes.
        epochs: of each trial's fine-tuning; a fifth of the recipe's, at least one, if None.
        validation: share of the training samples that is held out to judge by.
        given: folder of a trained dense network; None trains one without the held-out samples.
        data: folder of the data set, None for an embedded one.
        seed: of everything that training and trials draw; the same for all trials.
        device, accumulate: as for :class:`~sigmabranch.tasks.Chain`.
        max_minutes: stop cleanly after this long.
        watch: called with (step name, :class:`~sigmabranch.training.Event`) while training.
        calibrating: called with (what, samples done, samples in all) while converting.
    """

    task: Task
    folder: Path
    epochs: int | None = None
    validation: float = 0.1
    given: Path | None = None
    data: Path | None = None
    seed: int = 0
    device: str = "auto"
    accumulate: int = 1
    max_minutes: float | None = None
    watch: Callable[[str, Event], None] | None = None
    calibrating: Callable[[str, int, int], None] | None = None

    def __post_init__(self) -> None:
        minutes = self.max_minutes
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.switch = StopSwitch(minutes)

    def go_on(self) -> None:
        """Raise :class:`~sigmabranch.tasks.Stopped` if a signal or the time limit asks for it."""
        if self.switch.reason:
            raise Stopped(self.switch.reason, self.folder)

    @cached_property
    def held(self) -> Held:
        """The task and its data without the test split."""
        return hold_out(self.task, self.data, resolve_device(self.device), self.validation)

    @cached_property
    def seen(self) -> bool:
        """Whether the dense network has learnt from the held-out samples.

        Raises:
            CheckpointError: it is of another task.
        """
        return self.given is not None and has_seen(self.given, self.task, self.held)

    @cached_property
    def recipe(self) -> FinetuneRecipe:
        """The task's fine-tuning, shortened in all its parts."""
        whole = self.task.finetune
        epochs = max(1, round(whole.epochs / 5)) if self.epochs is None else self.epochs
        part = epochs / whole.epochs
        return replace(
            whole.lasting(epochs), warmup_epochs=whole.warmup_epochs * part, eval_every=epochs
        )

    @cached_property
    def source(self) -> HeldOutChain:
        """The chain of the dense network."""
        return self._chain(self.held.task, self.folder / "source", self.given)

    @cached_property
    def network(self) -> nn.Module:
        """The dense network, trained on first use."""
        return self.source.dense()

    @property
    def digest(self) -> str:
        """SHA-256 of the dense network's weights, once it is there."""
        return read_manifest(self._dense, "dense")["files"][WEIGHTS]["sha256"]

    @property
    def _dense(self) -> Path:
        return self.given or self.folder / "source" / "dense"

    @cached_property
    def counted(self) -> dict[str, Any]:
        """Cost of the dense network."""
        return cost(self.task.model.build().eval(), example(self.task))["dense"]

    @cached_property
    def reference(self) -> dict[str, Any]:
        """The dense network, JSON-able: its weights, cost and accuracy on the held-out samples."""
        return {
            "top1": evaluate_dense(self.network, ordered(self.held.dataset.test))["top1"],
            "sha256": self.digest,
            "params": self.counted["params"],
            "macs": self.counted["macs"],
            "seen": self.seen,
        }

    def trial(self, drafted: Task, folder: Path, name: str) -> HeldOutChain:
        """The chain of one tree.

        Args:
            drafted: the task with its tree and conversion.
            folder: to work in.
            name: to tell its training by.
        """
        task = replace(drafted, data=self.held.task.data, finetune=self.recipe)
        return self._chain(task, folder, self._dense, f"{name}, ")

    def _chain(
        self, task: Task, folder: Path, dense: Path | None, prefix: str = ""
    ) -> HeldOutChain:
        watch, end = self.watch, self._deadline
        return HeldOutChain(
            self.held,
            task,
            folder,
            dense=dense,
            seed=self.seed,
            device=self.device,
            accumulate=self.accumulate,
            max_minutes=None if end is None else max(0.0, (end - time.monotonic()) / 60),
            watch=None if watch is None else lambda step, event: watch(prefix + step, event),
            calibrating=self.calibrating,
        )


class HeldOutChain(Chain):
    """A chain whose data are given; what it takes for its test split are the held-out samples.

    Args:
        held: the data.
        task: the held task, with another tree, conversion or fine-tuning.
        folder: to keep it in.
        dense: of the dense network, which is read from there instead of being trained.
        options: as for :class:`~sigmabranch.tasks.Chain`.
    """

    def __init__(
        self, held: Held, task: Task, folder: Path, *, dense: Path | None = None, **options: Any
    ) -> None:
        self.dataset, self._dense = held.dataset, dense
        super().__init__(task, folder, branching=False, **options)

    def dense(self) -> nn.Module:
        """The trained dense network."""
        if self._dense is None:
            return super().dense()
        return load_dense(self._dense).to(self.engine.device)
