"""The samples that a search may see: a part of the training split to judge by, the rest to learn.

The test split is left alone, so that a tree's accuracy there is not what it was chosen for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sigmabranch.archive import read_manifest
from sigmabranch.data import Dataset, derive_seed
from sigmabranch.data.split import stratified
from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.tasks import Task, open_task_data
from sigmabranch.tasks.task import completed, first_difference

# Of the data set's own limit, so that both choose the same samples.
_LIMIT_SEED = derive_seed(0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A task without the samples that are held out.

    Attributes:
        task: with ``data.train_limit`` at what is left, which names just these samples.
        dataset: its ``test`` are the held-out training samples.
    """

    task: Task
    dataset: Dataset


def hold_out(task: Task, folder: Path | str | None, device: torch.device, share: float) -> Held:
    """Hold out ``share`` of a task's training samples, classes in proportion.

    Raises:
        ConfigError: nothing would be left on one of the sides.
        DataError: see :func:`~sigmabranch.tasks.open_task_data`.
    """
    unlimited = replace(task.data, train_limit=None, test_limit=None, held_out=None)
    whole = open_task_data(replace(task, data=unlimited), folder, device)
    train = whole.train
    # What the task itself holds out stays unseen, to judge the tree that was found.
    free = len(train) - (task.data.held_out or 0)
    used = min(free, task.data.train_limit or free)
    left = used - round(share * used)
    if not 0 < left < used:
        raise ConfigError(
            f"holding out {share:g} of {used} training samples leaves {left} to learn from and "
            f"{used - left} to judge by: choose another --validation"
        )
    everything, learnt = (stratified(train.labels, n, _LIMIT_SEED) for n in (used, left))
    judged = everything[~torch.isin(everything, learnt)]
    return Held(
        task=replace(task, data=replace(task.data, train_limit=left)),
        dataset=replace(whole, train=train.select(learnt), test=train.select(judged)),
    )


def has_seen(dense: Path, task: Task, held: Held) -> bool:
    """Whether a saved dense network has learnt from the samples that are held out.

    Raises:
        CheckpointError: it is of another task.
    """
    theirs = completed(read_manifest(dense, "dense")["notes"].get("task"))

    def difference(ours: Task) -> str:
        own = ours.to_dict()
        sections = ("data", "model")
        return first_difference({s: theirs.get(s) for s in sections}, {s: own[s] for s in sections})

    if not difference(held.task):
        return False
    if difference(task):
        raise CheckpointError(f"{dense} belongs to another task: {difference(task)}")
    return True
