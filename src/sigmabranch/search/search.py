"""The search: trial by trial, from a choice to what it is worth.

folder/
  settings.json   what all trials share
  source/         the dense network, trained without the held-out samples
  study.log       Optuna's journal
  trials/007/     trial.json; in work/, what is not finished yet
  search.json     all trials and what follows from them
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigmabranch import files
from sigmabranch.conversion import Budget
from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.measure import evaluate
from sigmabranch.search.bench import Bench
from sigmabranch.search.hold import hold
from sigmabranch.search.outcome import RULE, Trial, best_of, command, pareto, settings_of
from sigmabranch.search.space import Choice, Knob, Space
from sigmabranch.search.trees import INFEASIBLE, Trees
from sigmabranch.tasks import count_net, ordered
from sigmabranch.tasks.provenance import provenance
from sigmabranch.tasks.task import first_difference
from sigmabranch.training import launched

if TYPE_CHECKING:
    from sigmabranch.search.study import Study

SCHEMA = 1
# What a trial keeps of its cost and of its evaluation.
_COSTS = ("active_params", "total_params", "macs")
_FIGURES = ("top1", "top5", "routing_gain", "balance", "mean_max_p")


@dataclass(kw_only=True)
class Search:
    """Trials of one task.

    Attributes:
        bench: what they share.
        space: the trees to try.
        budget: bytes of one path's parameters, such as ``"1MB"``, or ``"40%"`` of the dense
            network; the best trial is one within it.
        say: told in one line how each trial went.
    """

    bench: Bench
    space: Space = field(default_factory=Space)
    budget: int | str | None = None
    say: Callable[[str], None] = print

    def run(self, trials: int) -> dict[str, Any]:
        """Make trials until there are so many in all, those of earlier calls included.

        Returns:
            What :meth:`result` gives.

        Raises:
            CheckpointError: the folder holds another search, or is damaged.
            ConfigError: no tree of the space is possible, or none that was tried.
            Stopped: by a signal or the time limit; the next call goes on.
        """
        from sigmabranch.search.study import Study  # noqa: PLC0415 (loads Optuna)

        if launched():
            raise ConfigError("a search runs in one process: start it without torchrun")
        if trials < 1:
            raise ConfigError(f"a search needs at least 1 trial, got {trials}")
        with self.bench.switch:
            # What cannot work is refused before the first file is written.
            _ = self.limit, self.bench.held, self.bench.seen
            knobs = self.space.knobs(self.trees.cuts())
            with hold(self.bench.folder):
                self._check_folder(knobs)
                _ = self.bench.reference
                study = Study(self.bench.folder / "study.log", knobs, self.bench.seed)
                result = self._finished(study, trials)
        if not result["pareto"]:
            raise ConfigError(
                f"none of {len(result['trials'])} trees is possible: "
                f"{result['trials'][-1]['reason']}; widen the --space in another --out"
            )
        return result

    def _finished(self, study: Study, trials: int) -> dict[str, Any]:
        """The result once there are so many trials."""
        self.bench.go_on()
        while (asked := study.next(trials)) is not None:
            number, choice = asked
            trial = self._trial(number, choice, self._known(study.finished()))
            study.tell(number, trial if trial["state"] == "complete" else None)
            shutil.rmtree(self._place(number) / "work", ignore_errors=True)
            self.result(self._known(study.finished()))
            self.bench.go_on()
        return self.result(self._known(study.finished()))

    @cached_property
    def trees(self) -> Trees:
        """The trees of the space."""
        return Trees(task=self.bench.task, space=self.space)

    @cached_property
    def limit(self) -> Budget | None:
        """The budget, in bytes."""
        if self.budget is None:
            return None
        return Budget.parse(self.budget, self.bench.counted["params"])

    def _check_folder(self, knobs: Mapping[str, Knob]) -> None:
        """Refuse a folder of another search; note the settings in a new one."""
        bench, path = self.bench, self.bench.folder / "settings.json"
        settings = {
            "task": bench.task.to_dict(),
            "seed": bench.seed,
            "epochs": bench.recipe.epochs,
            "validation": bench.validation,
            "knobs": {name: list(knob) for name, knob in knobs.items()},
            "source": bench.digest if bench.given else None,
        }
        if not path.exists():
            files.write_json(path, settings)
        difference = first_difference(files.read_json(path), settings)
        if difference:
            raise CheckpointError(
                f"{bench.folder} holds a search with other settings ({difference}): choose "
                "another --out or remove it"
            )

    def _place(self, number: int) -> Path:
        return self.bench.folder / "trials" / f"{number:03d}"

    def _trial(self, number: int, choice: Choice, known: Sequence[Trial]) -> Trial:
        """One trial's record, made unless it is there."""
        path = self._place(number) / "trial.json"
        if not path.exists():
            try:
                made = self._made(number, choice, known)
            except INFEASIBLE as error:
                made = _failed(" ".join(str(error).split()))
            files.write_json(path, {**made, "number": number, "choice": dict(choice)})
            self.say(_told(files.read_json(path)))
        return files.read_json(path)

    def _made(self, number: int, choice: Choice, known: Sequence[Trial]) -> Trial:
        """What a choice is worth."""
        bench = self.bench
        drafted = self.trees.draft(
            choice, bench.network, bench.source.calibration(), bench.seed, bench.calibrating
        )
        settings = settings_of(drafted)
        for other in known:
            if other.get("settings") == settings:
                # All draw alike, so the same tree would be worth the same again.
                same = other.get("same_as", other["number"])
                return {**other, "same_as": same, "seconds": 0.0}
        chain = bench.trial(drafted, self._place(number) / "work", f"trial {number}")
        chain.converted()
        bench.go_on()
        net = chain.branched()
        found = evaluate(net, ordered(bench.held.dataset.test), seed=bench.seed)
        counted = count_net(net.cpu(), drafted)["net"]
        return {
            "state": "complete",
            "settings": settings,
            "tree": drafted.tree.to_dict(),
            **{name: counted[name] for name in _COSTS},
            **{name: found[name] for name in _FIGURES},
            "seconds": sum(epoch["seconds"] for epoch in chain.history("branched")),
        }

    def _known(self, finished: Mapping[int, bool]) -> list[Trial]:
        """The records of the finished trials: number → whether it is complete."""
        paths = {number: self._place(number) / "trial.json" for number in finished}
        return [
            files.read_json(path)
            if path.exists() or finished[number]
            else {"number": number, "choice": {}, **_failed("interrupted while it was asked")}
            for number, path in paths.items()
        ]

    def result(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """Everything worth publishing, JSON-able; also written to the folder."""
        bench, front, best = self.bench, pareto(trials), best_of(trials, self.limit)
        result = {
            "schema": SCHEMA,
            "task": bench.task.to_dict(),
            "seed": bench.seed,
            "epochs": bench.recipe.epochs,
            "space": self.space.to_dict(),
            "provenance": provenance(bench.source.engine.device, accumulate=bench.accumulate),
            "validation": {
                "share": bench.validation,
                "samples": len(bench.held.dataset.test),
                "training_samples": len(bench.held.dataset.train),
            },
            "source": bench.reference,
            "trials": list(trials),
            "pareto": front,
            "rule": RULE,
            "budget_bytes": None if self.limit is None else self.limit.active_bytes,
            "best": best,
            "commands": {
                str(trial["number"]): command(bench.task.name, trial, bench.data, bench.seed)
                for trial in trials
                if trial["number"] in {*front, best}
            },
        }
        files.write_json(bench.folder / "search.json", result)
        return result


def _failed(reason: str) -> dict[str, Any]:
    return {"state": "failed", "reason": reason}


def _told(trial: Trial) -> str:
    if trial["state"] == "failed":
        return f"trial {trial['number']}: not possible: {trial['reason']}"
    same = f", the tree of trial {trial['same_as']}" if "same_as" in trial else ""
    return (
        f"trial {trial['number']}: {trial['top1']:.2f} % top-1 on held-out samples, "
        f"{trial['active_params']:,} active parameters{same}"
    )
