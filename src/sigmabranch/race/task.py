"""The race of a named task: its data, its dense network, its recipes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sigmabranch.archive import WEIGHTS, read_manifest
from sigmabranch.data import Dataset, EpochBatches, derive_seed
from sigmabranch.errors import ConfigError
from sigmabranch.race.candidates import Plan, make_plan
from sigmabranch.race.ground import Ground
from sigmabranch.race.race import Race, check_settings
from sigmabranch.tasks import Chain, Task, open_task_data, ordered
from sigmabranch.tasks.counting import example
from sigmabranch.tasks.provenance import provenance
from sigmabranch.training import Event, launched, resolve_device

# Held out unless the task says how many: one training sample in so many, and no more than these.
_ONE_IN, _MOST = 10, 5_000


@dataclass(kw_only=True)
class TaskRace:
    """What ``sigmabranch best`` runs.

    Attributes:
        task: data, dense network and recipes; the narrow network has the dense network's recipe,
            as long as source training and fine-tuning together.
        budget: bytes of the parameters that one input may read, or a part of the dense network.
        folder: of everything it writes.
        given: folder of a trained dense network; None trains one without the held-out samples.
        data, seed, device, accumulate, watch, calibrating: as for
            :class:`~sigmabranch.tasks.Chain`.
        max_minutes: stop cleanly after this long.
        say: told in one line how each part went.
    """

    task: Task
    budget: int | str
    folder: Path
    given: Path | None = None
    data: Path | None = None
    seed: int = 0
    device: str = "auto"
    accumulate: int = 1
    max_minutes: float | None = None
    watch: Callable[[str, Event], None] | None = None
    calibrating: Callable[[str, int, int], None] | None = None
    say: Callable[[str], None] = print

    def run(self) -> dict[str, Any]:
        """As :meth:`Race.run`; the result also has the task, the seed and the provenance.

        Raises:
            ConfigError: an impossible budget, or samples that cannot be held out.
            CheckpointError: the folder belongs to another race, or the network to another task.
            Stopped: by a signal or the time limit; the next call goes on.
        """
        if launched():
            raise ConfigError("a race runs in one process: start it without torchrun")
        minutes = self.max_minutes
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        plan = self._plan()
        task, dataset = self._held_out
        settings = {"plan": plan.to_dict(), "task": task.to_dict(), "seed": self.seed}
        check_settings(self.folder, settings)
        source = self._source(task, dataset)
        dense = source.dense()
        digest = read_manifest(source.folder / "dense", "dense")["files"][WEIGHTS]["sha256"]
        ground = Ground(
            dense=dense,
            batches=lambda recipe: EpochBatches(
                dataset.train, recipe.batch_size, seed=derive_seed(self.seed, 2)
            ),
            calibration=source.calibration(),
            held_out=ordered(dataset.measured("held-out")),
            engine=source.engine,
            folder=self.folder,
            settings=settings,
            seed=self.seed,
            accumulate=self.accumulate,
            deadline=deadline,
            watch=self.watch,
            calibrating=self.calibrating,
        )
        notes = {
            "task": task.to_dict(),
            "seed": self.seed,
            "source": digest,
            "provenance": provenance(source.engine.device, accumulate=self.accumulate),
        }
        test = ordered(dataset.test)
        return Race(plan=plan, ground=ground, test=test, notes=notes, say=self.say).run()

    def _plan(self) -> Plan:
        task = self.task
        return make_plan(
            task.model.build().eval(),
            example(task),
            self.budget,
            task.tree,
            task.conversion,
            task.finetune,
            task.dense.lasting(task.dense.epochs + task.finetune.epochs),
        )

    @cached_property
    def _held_out(self) -> tuple[Task, Dataset]:
        """The task with the number of samples it holds out, and its data."""
        task, data = self.task, self.task.data
        unlimited = replace(data, train_limit=None, test_limit=None, held_out=None)
        device = resolve_device(self.device)
        whole = open_task_data(replace(task, data=unlimited), self.data, device)
        held_out = data.held_out or min(_MOST, len(whole.train) // _ONE_IN)
        task = replace(task, data=replace(data, held_out=held_out))
        return task, whole.limit(train=data.train_limit, test=data.test_limit, held_out=held_out)

    def _source(self, task: Task, dataset: Dataset) -> Chain:
        return Chain(
            task,
            self.folder / "source",
            data=self.data,
            seed=self.seed,
            device=self.device,
            accumulate=self.accumulate,
            max_minutes=self.max_minutes,
            start=None if self.given is None else {"dense": self.given},
            branching=False,
            watch=self.watch,
            calibrating=self.calibrating,
            dataset=dataset,
        )
