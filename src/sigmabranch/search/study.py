"""Optuna's side of a search: what to try next, by what was found so far.

A journal in the search's folder holds every trial's choice, state and objectives. What is asked
depends on the seed, the trial's number and the trials before it, not on how often a search was
interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sigmabranch.data import derive_seed
from sigmabranch.errors import CheckpointError, MissingDependency
from sigmabranch.search.journal import Journal
from sigmabranch.search.space import Choice, Knob

try:
    import optuna
    from optuna.distributions import CategoricalDistribution, IntDistribution
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend
    from optuna.trial import TrialState
except ImportError as _error:
    raise MissingDependency("optuna", "search", "Searching trees") from _error

#: Validation accuracy, which is to rise, and what is to fall.
OBJECTIVES = ("top1", "active_params", "macs")


class Study:
    """Asks for choices and is told how they went; every trial is asked and told once.

    Args:
        path: the journal, made if it is missing.
        knobs: knob → where it may stand.
        seed: of the sampler, a tree-structured Parzen estimator.

    Raises:
        CheckpointError: the journal is damaged, or is of another search.
    """

    def __init__(self, path: Path, knobs: Mapping[str, Knob], seed: int) -> None:
        self._seed = seed
        self._distributions = {name: _distribution(knob) for name, knob in knobs.items()}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._journal = journal = _Backend(path)
        try:
            self._study = optuna.create_study(
                study_name="search",
                storage=JournalStorage(journal),
                directions=["maximize", "minimize", "minimize"],
                load_if_exists=True,
            )
            trials = self._study.trials
        except OSError:
            raise
        except Exception as error:  # whatever lines that do not belong together lead to
            raise _damaged(path, str(error) or type(error).__name__) from error
        for trial in trials:
            if trial.state is TrialState.RUNNING and trial.params.keys() != knobs.keys():
                self.tell(trial.number, None)  # a crash in the middle of asking

    def next(self, trials: int) -> tuple[int, Choice] | None:
        """Number and choice of the trial that is not finished yet, else of a new one.

        Args:
            trials: in all; None is returned when there are so many.
        """
        known = self._study.trials
        for trial in known[:trials]:
            if trial.state is TrialState.RUNNING:
                return trial.number, trial.params
        if len(known) >= trials:
            return None
        seed = derive_seed(self._seed, len(known)) % 2**32
        self._study.sampler = optuna.samplers.TPESampler(seed=seed)
        with self._journal.together():
            asked = self._study.ask(self._distributions)
        return asked.number, asked.params

    def tell(self, number: int, found: Mapping[str, Any] | None) -> None:
        """How a trial went: its objectives by name, or None if its tree is not possible."""
        if found is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, [found[name] for name in OBJECTIVES])

    def finished(self) -> dict[int, bool]:
        """Number of each trial that was told, and whether it is complete, in their order."""
        return {
            trial.number: trial.state is TrialState.COMPLETE
            for trial in self._study.trials
            if trial.state.is_finished()
        }


def _distribution(knob: Knob) -> Any:
    if isinstance(knob, range):
        return IntDistribution(knob[0], knob[-1])
    return CategoricalDistribution(knob)


class _Backend(Journal, BaseJournalBackend):  # type: ignore[misc]
    """A journal of ours, as Optuna wants one."""


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}; restore it or choose another --out")
