"""The steps from data to a result; each writes its folder once and is skipped when it is complete.

folder/
  task.json     all settings and the seed
  dense/        the dense network          (checkpoint and metrics.csv while it trains)
  converted/    the branched network before fine-tuning
  branched/     the branched network after it
  measured.json cost and accuracy of the three
  result.json   all of this for publication
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch import files
from sigmabranch.archive import MANIFEST, WEIGHTS, read_manifest
from sigmabranch.conversion import convert
from sigmabranch.data import ConditionSplit, Dataset, EpochBatches, Split, derive_seed, open_data
from sigmabranch.errors import CheckpointError, ConfigError, DataError, MissingDependency
from sigmabranch.measure import evaluate, evaluate_dense
from sigmabranch.net import RECORD, SigmaBranchNet, is_branched
from sigmabranch.saving import load_dense, load_net, save_dense
from sigmabranch.tasks.counting import count_net, sketch
from sigmabranch.tasks.provenance import provenance
from sigmabranch.tasks.task import Task, completed, first_difference
from sigmabranch.temporaries import temporary_folder
from sigmabranch.training import (
    DenseObjective,
    Event,
    FabricEngine,
    Objective,
    Recipe,
    TensorBoardLog,
    finetuning,
    fit,
)

EVALUATION_BATCH = 250
# Enough training samples to tell which leaf suits which class.
CEILING_SAMPLES = 10_000


Measure = Callable[..., dict[str, Any]]

# The settings that a network brought in from elsewhere must share, beside data and model.
_DECIDED_BY: Mapping[str, tuple[str, ...]] = {
    "dense": ("dense",),
    "converted": ("tree", "conversion"),
}


class Stopped(Exception):
    """A run ended early on request; its checkpoint holds the state."""

    def __init__(self, reason: str, folder: Path) -> None:
        super().__init__(f"{reason}; the same command continues from {folder}")


class Chain:
    """Train, convert, fine-tune and measure one task in one folder.

    Args:
        task: what to do.
        folder: where to keep it.
        data: folder of the data set, None for an embedded one.
        seed: of initialisation, order, augmentation and conversion.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        accumulate: passes through the network for each optimizer step, for a device too small for
            one; changes no setting of the task.
        max_minutes: stop cleanly after this long, all steps together.
        resume: go on with what the folder holds; otherwise it must be new.
        start: folders of saved networks to begin with, by step: ``{"dense": …}`` skips training,
            ``{"converted": …}`` skips conversion too.
        branching: refuse a tree that does not fit the network at once, before any training.
        watch: called with (step name, :class:`~sigmabranch.training.Event`) while training.
        calibrating: called with (what, samples done, samples in all) while converting; both in the
            main process only.
        dataset: the task's data, where they have been read already.
    """

    def __init__(
        self,
        task: Task,
        folder: Path | str,
        *,
        data: Path | str | None = None,
        seed: int = 0,
        device: str = "auto",
        accumulate: int = 1,
        max_minutes: float | None = None,
        resume: bool = True,
        start: Mapping[str, Path] | None = None,
        branching: bool = True,
        watch: Callable[[str, Event], None] | None = None,
        calibrating: Callable[[str, int, int], None] | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        if dataset is not None:
            self.dataset = dataset
        self.task, self.folder, self.data, self.seed = task, Path(folder), data, seed
        self.engine, self.accumulate = FabricEngine(device), accumulate
        self.resume, self.watch = resume, watch
        self.calibrating = calibrating if self.engine.is_main else None
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._check_folder()
        start = {step: Path(source) for step, source in (start or {}).items()}
        for step, source in start.items():
            self._check_start(step, source)
        # What cannot work is refused before the first file is written.
        _check_recipes(task)
        if branching and not _complete(self.folder / "converted"):
            sketch(task)
        if not (self.folder / "measured.json").exists():
            _ = self.dataset
        self._check_free()
        self.once(self._note)
        if sum(self.engine.totals([not (self.folder / "task.json").exists()])):
            raise ConfigError(f"{self.folder} is not the same folder on all hosts: share it")
        for step, source in start.items():
            self.once(partial(self._adopt, step, source))

    def variant(self, task: Task, folder: Path) -> Chain:
        """A chain of another tree, conversion or fine-tuning on this one's dense network and data.

        Raises:
            ConfigError, CheckpointError: as for :class:`Chain`.
        """
        self.dense()
        return Chain(
            task,
            folder,
            data=self.data,
            seed=self.seed,
            device=self.engine.device.type,
            accumulate=self.accumulate,
            max_minutes=self._minutes_left(),
            start={"dense": self.folder / "dense"},
            watch=self.watch,
            calibrating=self.calibrating,
            dataset=self.dataset,
        )

    def _check_folder(self) -> None:
        """Refuse a folder that holds another task, other settings or another seed."""
        path = self.folder / "task.json"
        if not path.exists():
            return
        if not self.resume:
            raise CheckpointError(f"{self.folder} is in use: choose another --out or use --resume")
        theirs = files.read_json(path)
        if not isinstance(theirs, dict):
            raise CheckpointError(f"{path} is no run's: choose another --out or remove it")
        theirs["task"] = completed(theirs.get("task"))
        difference = first_difference(theirs, self._notes())
        if difference:
            raise CheckpointError(
                f"{self.folder} was made with other settings ({difference}): "
                "choose another --out or remove it"
            )

    def _check_free(self) -> None:
        """Refuse a folder in which files would be lost that are not ours."""
        for name in ("task.json", "measured.json", "result.json"):
            files.check_free(self.folder / name)
        for folder in (self.folder / step for step in ("dense", "converted", "branched")):
            names = (WEIGHTS, RECORD, "state.json", "metrics.csv", "history.json")
            for name in (MANIFEST,) if _complete(folder) else names:
                files.check_free(folder / name)

    def _note(self) -> None:
        """Write down whose folder this is, once."""
        path = self.folder / "task.json"
        if not path.exists():
            files.write_json(path, self._notes())

    def _check_start(self, step: str, source: Path) -> None:
        """Refuse a network of another kind or task, or beside one that is already there."""
        manifest = read_manifest(source, "dense" if step == "dense" else "branched")
        sections = ("data", "model", *_DECIDED_BY[step])
        theirs, ours = completed(manifest["notes"].get("task")), self.task.to_dict()
        difference = first_difference(
            {name: theirs.get(name) for name in sections}, {name: ours[name] for name in sections}
        )
        if difference:
            raise CheckpointError(f"{source} belongs to another task: {difference}")
        folder = self.folder / step
        if _complete(folder) and read_manifest(folder)["files"] != manifest["files"]:
            raise CheckpointError(
                f"{folder} already holds another network than {source}: choose another --out"
            )

    def _adopt(self, step: str, source: Path) -> None:
        """Copy a saved network in as this chain's ``step``, the manifest last."""
        folder = self.folder / step
        if _complete(folder):
            return
        folder.mkdir(parents=True, exist_ok=True)
        if history := _history(source):
            files.write_json(folder / "history.json", {"epochs": history})
        with temporary_folder(folder) as copied:
            for name in (*read_manifest(source)["files"], MANIFEST):
                shutil.copyfile(source / name, copied / name)
            files.write_together(folder, {path.name: path for path in copied.iterdir()})

    @cached_property
    def dataset(self) -> Dataset:
        """The task's data, checked against its network."""
        return open_task_data(self.task, self.data, self.engine.device)

    def dense(self) -> nn.Module:
        """The trained dense network."""
        folder = self.folder / "dense"
        if not _complete(folder):
            with seeded(self.seed):
                model = self.task.model.build()
            self.train(model, self.task.dense, folder)
            self.once(lambda: save_dense(model, folder, self._origin()))
        return load_dense(folder).to(self.engine.device)

    def converted(self) -> SigmaBranchNet:
        """The branched network as conversion leaves it."""
        folder = self.folder / "converted"
        if not _complete(folder):
            net = convert(
                self.dense(),
                self.calibration(),
                self.task.tree,
                spec=replace(self.task.conversion, seed=self.seed + self.task.conversion.seed),
                progress=self.calibrating,
                shards=self.engine.shards,
            )
            self.once(lambda: net.save(folder, self._origin()))
        return load_net(folder).to(self.engine.device)

    def branched(self) -> SigmaBranchNet:
        """The fine-tuned branched network."""
        folder = self.folder / "branched"
        if not _complete(folder):
            net, recipe = self.converted(), self.task.finetune
            teacher = self.dense() if recipe.distills else None
            self._fit(net, finetuning(net, recipe, teacher), recipe, folder, evaluate)
            self.once(lambda: net.save(folder, self._origin()))
        return load_net(folder).to(self.engine.device)

    def train(
        self, model: nn.Module, recipe: Recipe, folder: Path, objective: Objective | None = None
    ) -> None:
        """Train a plain network in place, keeping its checkpoint in ``folder``.

        Args:
            model: (B, ...) → (B, V) logits in eval mode.
            recipe: how.
            folder: of this training alone.
            objective: what to minimise; cross-entropy if None, and with ``recipe.distill_weight``
                imitation of the chain's dense network.
        """
        if objective is None:
            teacher = self.dense() if recipe.distills else None
            objective = DenseObjective(recipe, teacher)
        self._fit(model, objective, recipe, folder, evaluate_dense)

    def dense_accuracy(self, split: str = "test") -> dict[str, Any]:
        """Accuracy of the dense network."""
        return self._measure(evaluate_dense, self.dense(), self.dataset.measured(split))

    def measured(self) -> dict[str, Any]:
        """Cost and accuracy of all three networks, from their test split.

        Where samples are held out, ``held_out`` has the same accuracies on them.
        """
        path = self.folder / "measured.json"
        if not path.exists():
            measured = {
                "cost": count_net(self.branched().cpu(), self.task),
                **self._accuracies("test"),
            }
            if self.dataset.held_out is not None:
                measured["held_out"] = self._accuracies("held-out")
            self.once(lambda: files.write_json(path, measured))
        return files.read_json(path)

    def _accuracies(self, split: str) -> dict[str, Any]:
        return {
            "dense": self.dense_accuracy(split),
            "converted": self.accuracy(self.converted(), split),
            "branched": self.accuracy(self.branched(), split),
        }

    def result(self, controls: Mapping[str, Any]) -> dict[str, Any]:
        """Everything worth publishing about this run, JSON-able; also written to the folder."""
        result = {
            **self._notes(),
            "provenance": self._provenance(),
            "made": {step: self._made(step) for step in ("dense", "converted", "branched")},
            **self.measured(),
            "controls": dict(controls),
            "history": {step: self.history(step) for step in ("dense", "branched")},
        }
        self.once(lambda: files.write_json(self.folder / "result.json", result))
        return result

    def _made(self, step: str) -> dict[str, Any] | None:
        """Provenance of one step's network, which another command may have made."""
        return read_manifest(self.folder / step)["notes"].get("provenance")

    def history(self, step: str) -> list[dict[str, Any]]:
        """The epochs of one training; none if its network came from elsewhere."""
        return _history(self.folder / step)

    def accuracy(self, net: SigmaBranchNet, split: str = "test") -> dict[str, Any]:
        """All figures of one network; a class's best leaf is chosen on training data.

        Raises:
            ConfigError: the held-out split is asked for, and the data have none.
        """
        measured = self.dataset.measured(split)
        if not is_branched(net):
            return self._measure(evaluate, net, measured)
        known = Ordered(self.dataset.train, self.calibration().order[:CEILING_SAMPLES])
        class_leaf = evaluate(net, known, shards=self.engine.shards)["best_leaf_of_class"]
        return self._measure(evaluate, net, measured, class_leaf=class_leaf, seed=self.seed)

    def _measure(
        self, measure: Measure, network: Any, split: Split, **options: Any
    ) -> dict[str, Any]:
        """Figures on a split, which the processes divide."""
        return measure(network, ordered(split), shards=self.engine.shards, **options)

    def calibration(self) -> Ordered:
        """The training split without augmentation, in one random order."""
        return shuffled(self.dataset.train, self.seed)

    def _fit(
        self,
        model: nn.Module,
        objective: Objective,
        recipe: Recipe,
        folder: Path,
        measure: Measure,
    ) -> None:
        batches = EpochBatches(
            self.dataset.train,
            recipe.batch_size,
            seed=derive_seed(self.seed, 2),
            rank=self.engine.rank,
            world_size=self.engine.world_size,
        )
        result = fit(
            model,
            objective,
            batches,
            recipe,
            folder=folder,
            engine=self.engine,
            accumulate=self.accumulate,
            seed=self.seed,
            identity=self._notes(),
            evaluate=lambda trained: _curves(
                self._measure(measure, trained, self.dataset.validation)
            ),
            progress=self._watchers(folder),
            max_minutes=self._minutes_left(),
        )
        if not result.complete:
            raise Stopped(result.reason, folder)
        self.once(lambda: files.write_json(folder / "history.json", {"epochs": result.history}))

    def _watchers(self, folder: Path) -> Callable[[Event], None]:
        """Whoever called, and TensorBoard where it is installed."""
        listeners: list[Callable[[Event], None]] = []
        if self.engine.is_main:
            with suppress(MissingDependency):
                listeners.append(TensorBoardLog(folder / "tensorboard"))
        if self.watch is not None:
            step = folder.relative_to(self.folder).as_posix().removeprefix("rows/")
            listeners.append(partial(self.watch, step))

        def tell(event: Event) -> None:
            for listener in listeners:
                listener(event)

        return tell

    def once(self, write: Callable[[], None]) -> None:
        """Let one process write while the others wait."""
        if self.engine.is_main:
            write()
        self.engine.barrier()

    def _minutes_left(self) -> float | None:
        if self.deadline is None:
            return None
        return max(0.0, (self.deadline - time.monotonic()) / 60)

    def _notes(self) -> dict[str, Any]:
        return {"task": self.task.to_dict(), "seed": self.seed}

    def _origin(self) -> dict[str, Any]:
        return {**self._notes(), "provenance": self._provenance()}

    def _provenance(self) -> dict[str, Any]:
        return provenance(self.engine.device, self.engine.world_size, self.accumulate)


def open_task_data(task: Task, folder: Path | str | None, device: torch.device) -> Dataset:
    """A task's data on ``device``.

    Raises:
        DataError: files that are missing or damaged, or classes or channels that do not fit the
            task's network.
    """
    dataset = open_data(
        task.data.name,
        folder,
        device=device,
        image_size=task.data.image_size,
        channels_last=True,
    ).limit(train=task.data.train_limit, test=task.data.test_limit, held_out=task.data.held_out)
    task.model.check_input(dataset.shape)
    if dataset.classes != task.model.classes:
        raise DataError(
            f"{task.data.name} has {dataset.classes} classes but the network is made for "
            f"{task.model.classes}: use --set model.classes={dataset.classes}"
        )
    return dataset


class Ordered:
    """A split in a fixed order, as a loader that can be read again and again, or in parts."""

    def __init__(self, split: Split, order: Tensor) -> None:
        self.split, self.order = split, order

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.part(0, 1)

    def part(
        self, rank: int, world_size: int, samples: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every ``world_size``-th batch of the first ``samples`` samples, from ``rank`` on.

        Batches are the same for any number of processes, unless there are too few for all.
        """
        order, size = self.share(rank, world_size, samples)
        return self.split.batches(order, size)

    def share(self, rank: int, world_size: int, samples: int | None) -> tuple[Tensor, int]:
        """Sample numbers of a part, and how many make a batch."""
        order = self.order[:samples]
        size = max(1, min(EVALUATION_BATCH, math.ceil(len(order) / world_size)))
        return torch.cat([order[:0], *order.split(size)[rank::world_size]]), size


class UnderConditions:
    """The same for evaluation: each batch also tells its samples' conditions.

    Attributes:
        conditions: their names.
    """

    def __init__(self, ordered: Ordered, condition: Tensor, names: tuple[str, ...]) -> None:
        self._ordered, self._condition, self.conditions = ordered, condition, names

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self.part(0, 1)

    def part(
        self, rank: int, world_size: int, samples: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See :meth:`Ordered.part`; (inputs, labels, numbers of conditions)."""
        order, size = self._ordered.share(rank, world_size, samples)
        pairs = self._ordered.part(rank, world_size, samples)
        for (x, y), part in zip(pairs, order.split(size), strict=False):  # nothing splits into one
            yield x, y, self._condition[part.to(self._condition.device)]


def ordered(split: Split) -> Ordered | UnderConditions:
    """All of a split in its own order, without augmentation, to be measured on."""
    plain = Ordered(split, torch.arange(len(split)))
    if not isinstance(split, ConditionSplit):
        return plain
    return UnderConditions(plain, split.condition, split.conditions)


def shuffled(split: Split, seed: int) -> Ordered:
    """All of a split in one random order, without augmentation: some are stored by class."""
    generator = torch.Generator().manual_seed(derive_seed(seed, 1))
    return Ordered(split, torch.randperm(len(split), generator=generator))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under ``seed`` and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _check_recipes(task: Task) -> None:
    """Raise :class:`ConfigError` at recipes that could only fail after hours of work."""
    if task.dense.distills:
        raise ConfigError(
            "dense.distill_weight needs a teacher, and the dense network is the first to be "
            "trained: set finetune.distill_weight instead"
        )
    if task.finetune.class_target and task.conversion.clusters != "classes":
        raise ConfigError(
            "finetune.class_target needs conversion.clusters=classes: set both or neither"
        )


def _history(folder: Path) -> list[dict[str, Any]]:
    path = folder / "history.json"
    found = files.read_json(path) if path.exists() else []
    return found["epochs"] if isinstance(found, dict) else found  # a list in earlier versions


def _complete(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def _curves(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What an epoch's record keeps of an evaluation: everything but the tables."""
    tables = ("class_leaf_share", "best_leaf_of_class", "condition_leaf_share")
    return {key: value for key, value in evaluation.items() if key not in tables}
