"""Result files: reading them, grouping runs that differ only in their seed, averaging.

A result file is what ``sigmabranch run --result FILE`` writes. Nothing is averaged over runs of
different settings, or over different test sets.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sigmabranch import files
from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.tasks.task import SECTIONS, Task

# Settings of earlier versions, with the value at which their absence means the same.
_RETIRED = {"accumulate": 1}
_NEEDED = (
    *(("cost", part, name) for part, name in
      (("dense", "params"), ("dense", "macs"), ("net", "active_params"), ("net", "macs"))),
    *((part, name) for part in ("dense", "branched") for name in ("samples", "top1", "top5")),
    ("branched", "balance"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One result file.

    Attributes:
        file: its name.
        task: the settings it was made with; those that are younger than the file have their
            defaults.
        seed: of the run.
        content: all of the file.
    """

    file: str
    task: Task
    seed: int
    content: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Mean and sample standard deviation of ``n`` values; one value has no deviation."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(mean=statistics.fmean(values), sd=sd, n=len(values))

    def to_text(self, digits: int = 2) -> str:
        """``"76.92 ± 0.13"``, or the bare value of a single run."""
        deviation = "" if self.sd is None else f" ± {self.sd:.{digits}f}"
        return f"{self.mean:.{digits}f}{deviation}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that differ in nothing but their seed, in the order of their seeds.

    Attributes:
        task: their settings.
        runs: at least one.
    """

    task: Task
    runs: tuple[Result, ...]

    @property
    def first(self) -> Mapping[str, Any]:
        """Content of the first run; what depends on settings alone is the same in all."""
        return self.runs[0].content

    @property
    def seeds(self) -> tuple[int, ...]:
        """Their seeds."""
        return tuple(run.seed for run in self.runs)

    def spread(self, *where: str) -> Spread:
        """Mean and deviation of one figure, such as ``"branched", "top1"``.

        A dense network that several runs started from counts once.
        """
        contents = [run.content for run in self.runs]
        if where[0] == "dense":
            contents = list({str(content["dense"]): content for content in contents}.values())
        values: list[Any] = [_at(content, where) for content in contents]
        return Spread.of(values)

    def departures(self, task: Task) -> dict[str, tuple[Any, Any]]:
        """Setting → (value here, value in ``task``), where they differ."""
        ours, theirs = self.task.to_dict(), task.to_dict()
        return {
            f"{section}.{name}": (ours[section].get(name), theirs[section].get(name))
            for section in SECTIONS
            for name in {**theirs[section], **ours[section]}
            if ours[section].get(name) != theirs[section].get(name)
        }


def read_results(folder: Path | str) -> list[Result]:
    """The result files directly in ``folder``, by name; other JSON files are passed over.

    Raises:
        CheckpointError: no such folder, or a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}: name the one with the files of run --result")
    paths = sorted(path for path in folder.glob("*.json") if path.is_file())
    contents = ((path, files.read_json(path)) for path in paths)
    return [_result(path, content) for path, content in contents if _is_result(content)]


def group_results(results: Iterable[Result]) -> list[Group]:
    """Runs of equal settings and equally large test sets together, in order of appearance.

    Raises:
        CheckpointError: two files hold the same settings and seed.
    """
    groups: dict[Any, list[Result]] = {}
    for result in results:
        # The summary is prose about the task, not a setting.
        key = (replace(result.task, summary=""), result.content["branched"]["samples"])
        groups.setdefault(key, []).append(result)
    return [Group(task=runs[0].task, runs=_by_seed(runs)) for runs in groups.values()]


def _by_seed(runs: list[Result]) -> tuple[Result, ...]:
    seen: dict[int, str] = {}
    for run in runs:
        if run.seed in seen:
            raise CheckpointError(
                f"{seen[run.seed]} and {run.file} hold the same settings and seed {run.seed}: "
                "move one of them away"
            )
        seen[run.seed] = run.file
    return tuple(sorted(runs, key=lambda run: run.seed))


def _is_result(content: Any) -> bool:
    """Whether a file was meant as a result: a task, and at least a part of what was measured."""
    measured = {"cost", "dense", "branched"}
    return isinstance(content, dict) and "task" in content and bool(measured & content.keys())


def _result(path: Path, content: dict[str, Any]) -> Result:
    try:
        task, seed = Task.from_dict(_up_to_date(content["task"])), content["seed"]
        bad = next(_unreadable(content), "")
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no result of this version: {error}") from error
    if not isinstance(seed, int):
        bad = "seed"
    if bad:
        raise CheckpointError(f"{path} is damaged: {bad} is no number; write it again")
    return Result(file=path.name, task=task, seed=seed, content=content)


def _up_to_date(task: Mapping[str, Any]) -> dict[str, Any]:
    """The task's JSON without retired settings, where these had no effect."""

    def kept(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return {name: item for name, item in part.items() if _RETIRED.get(name) != item}

    return {name: kept(part) for name, part in task.items()}


def _unreadable(content: Mapping[str, Any]) -> Iterator[str]:
    """The needed figures that are no finite numbers."""
    for where in _NEEDED:
        try:
            value = _at(content, where)
        except (KeyError, TypeError):
            value = None
        if type(value) not in (int, float) or not math.isfinite(value):
            yield ".".join(where)


def _at(content: Any, where: Sequence[str]) -> Any:
    for name in where:
        content = content[name]
    return content
