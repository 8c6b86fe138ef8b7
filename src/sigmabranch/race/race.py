"""The race: all candidates trained part by part, losers stopped in between, the winner kept.

folder/
  settings.json   what the race is run for
  race.json       after each part, which held-out samples every candidate gets right
  narrow-dense/ single-path/ tree/    checkpoints and metrics.csv
  best/           the winner
  result.json     all candidates with their intervals
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch import files
from sigmabranch.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DataError,
    NumericError,
    UnsupportedOperation,
)
from sigmabranch.measure import correctness
from sigmabranch.net import SigmaBranchNet
from sigmabranch.race.candidates import Candidate, Plan, sizes
from sigmabranch.race.choice import METHOD, RULE, accuracy, choose, lead, leader, losers
from sigmabranch.race.ground import Ground
from sigmabranch.saving import save_dense
from sigmabranch.tasks.task import first_difference

#: Shares of the fine-tuning after which candidates are compared.
SHARES = (0.25, 0.5, 0.75, 1.0)
SCHEMA = 1
# What one candidate may trip over without telling anything about others.
_OWN_FAULT = (ConfigError, ConversionError, DataError, NumericError, UnsupportedOperation)


@dataclass(kw_only=True)
class Race:
    """Candidates of one budget, on one ground.

    Attributes:
        plan: the candidates.
        ground: what they share.
        test: batches on which those that finish are reported, and nothing is chosen; or None.
        notes: kept with the winner, JSON-able.
        say: told in one line how each part went.
    """

    plan: Plan
    ground: Ground
    test: Iterable[Sequence[Tensor]] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self._networks: dict[str, nn.Module] = {}
        self._pace: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Train, stop, choose and save; what an earlier call has done is not done again.

        Returns:
            JSON-able, also written to ``result.json``: ``winner``, ``folder`` of it, ``method`` and
            ``rule`` in words, ``budget`` in bytes, ``held_out`` samples, ``reference`` (the dense
            network's accuracy on them), and ``candidates``: each with its ``state`` (complete,
            stopped, failed, left out) and ``reason``, ``held_out`` accuracy and its interval,
            ``behind`` (points behind the most accurate one, paired), sizes, and ``test``.

        Raises:
            CheckpointError: the folder holds another race, or is damaged.
            ConfigError: no candidate was possible.
            Stopped: by a signal or the time limit; the next call goes on.
        """
        check_settings(self.ground.folder, self.ground.settings)
        for number in range(len(self._parts), len(SHARES)):
            self._run_part(number)
        return self._finish()

    @cached_property
    def candidates(self) -> dict[str, Candidate]:
        """By name, the cheapest to store first."""
        return {candidate.name: candidate for candidate in self.plan.candidates()}

    @cached_property
    def _parts(self) -> list[dict[str, Any]]:
        """What is known after each part that is over."""
        path = self.ground.folder / "race.json"
        return list(files.read_json(path)["parts"]) if path.exists() else []

    @property
    def _out(self) -> dict[str, str]:
        """Candidates that have left the race → how."""
        return {
            name: state
            for part in self._parts
            for state in ("stopped", "failed")
            for name in part[state]
        }

    def network(self, name: str) -> nn.Module:
        """The finished network of a candidate that has not left the race."""
        self._advance(self.candidates[name], SHARES[-1])
        return self._networks[name]

    def _run_part(self, number: int) -> None:
        correct, failed, counted = {}, {}, {}
        for name, candidate in self.candidates.items():
            if name in self._out:
                continue
            try:
                correct[name] = self._advance(candidate, SHARES[number])
                counted[name] = sizes(self._networks[name])
            except _OWN_FAULT as error:
                failed[name] = " ".join(str(error).split())
                self._networks.pop(name, None)
                self.say(f"{name} failed: {failed[name]}")
        if not correct:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise ConfigError(f"no candidate is left ({reasons}): change the settings or the data")
        last = SHARES[number] == 1
        part: dict[str, Any] = {
            "share": SHARES[number],
            "correct": {name: _text(right_N) for name, right_N in correct.items()},
            "epochs": {name: self._goal(self.candidates[name], SHARES[number]) for name in correct},
            "sizes": counted,
            "stopped": {} if last else losers(correct, self._correct(number - 1)),
            "failed": failed,
        }
        self._parts.append(part)
        files.write_json(self.ground.folder / "race.json", {"parts": self._parts})
        for name in part["stopped"]:
            self._networks.pop(name)
        self.say(self._described(part, correct))

    def _advance(self, candidate: Candidate, share: float) -> Tensor:
        """Train a candidate up to a share of the race; what it then gets right, (N,) bool."""
        name, ground = candidate.name, self.ground
        if name not in self._networks:
            self._networks[name] = candidate.make(ground)
        network = self._networks[name]
        objective = candidate.objective(network, ground)
        goal = self._goal(candidate, share)
        result = ground.train(name, network, objective, candidate.recipe, goal)
        self._pace[name] = sum(epoch["seconds"] for epoch in result.history) / result.epoch
        return ground.judge(network)

    def _goal(self, candidate: Candidate, share: float) -> int:
        """The epoch at which a part ends: all candidates then have as many before them."""
        left = round((1 - share) * self.plan.finetune.epochs)
        return max(1, candidate.recipe.epochs - left)

    def _described(self, part: Mapping[str, Any], correct: Mapping[str, Tensor]) -> str:
        figures = ", ".join(
            f"{name} {accuracy(right_N).mean:.2f} %" for name, right_N in correct.items()
        )
        lines = [f"after {part['share']:.0%} of the fine-tuning, on held-out samples: {figures}"]
        lines += [f"{name} is stopped: {reason}" for name, reason in part["stopped"].items()]
        left = sum(
            self._pace[name] * (self.candidates[name].recipe.epochs - part["epochs"][name])
            for name in correct
            if name not in part["stopped"]
        )
        return "; ".join([*lines, *([f"about {left / 60:.0f} min left"] if left else [])])

    def _finish(self) -> dict[str, Any]:
        path = self.ground.folder / "result.json"
        if path.exists():
            return files.read_json(path)
        correct = self._correct(len(SHARES) - 1)
        stored = {name: self._parts[-1]["sizes"][name]["stored_params"] for name in correct}
        winner = choose(correct, stored)
        result = {
            "schema": SCHEMA,
            "winner": winner,
            "folder": str(self.ground.folder / "best"),
            "rule": RULE,
            "method": METHOD,
            "budget": self.plan.budget,
            "held_out": len(correct[winner]),
            "reference": accuracy(self.ground.judge(self.ground.dense)).to_dict(),
            "candidates": [self._row(name, correct) for name in self.candidates]
            + [
                {"name": name, "state": "left out", "reason": reason}
                for name, reason in self.plan.left_out().items()
            ],
            **self.notes,
        }
        save(self.network(winner), self.ground.folder / "best", self.notes)
        files.write_json(path, result)
        return result

    def _correct(self, number: int) -> dict[str, Tensor]:
        """What every candidate got right after a part; nothing before the first."""
        texts = self._parts[number]["correct"] if number >= 0 else {}
        return {name: _tensor(text) for name, text in texts.items()}

    def _row(self, name: str, finished: Mapping[str, Tensor]) -> dict[str, Any]:
        """What is known of one candidate."""
        state = self._out.get(name, "complete")
        reasons = [part[state][name] for part in self._parts if name in part.get(state, {})]
        row: dict[str, Any] = {"name": name, "state": state, "reason": "".join(reasons)}
        known = [n for n, part in enumerate(self._parts) if name in part["correct"]]
        if not known:
            return row
        last, candidate = self._parts[known[-1]], self.candidates[name]
        correct = self._correct(known[-1])
        own_N, first_N = correct[name], correct[leader(correct)]
        row |= {
            "held_out": accuracy(own_N).to_dict(),
            "behind": lead(first_N, own_N).to_dict(),
            "epochs": last["epochs"][name],
            "recipe": candidate.recipe.to_dict(),
            **last["sizes"][name],
        }
        if name in finished and self.test is not None:
            row["test"] = accuracy(correctness(self.network(name), self.test)).to_dict()
        return row


def save(network: nn.Module, folder: Path, notes: Mapping[str, Any]) -> None:
    """Write a network as what it is."""
    if isinstance(network, SigmaBranchNet):
        network.save(folder, notes)
    else:
        save_dense(network, folder, notes)


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another race; mark a new one."""
    path = folder / "settings.json"
    if path.exists():
        difference = first_difference(files.read_json(path), dict(settings))
        if difference:
            raise CheckpointError(
                f"{folder} was made with other settings ({difference}): choose another folder or "
                "remove it"
            )
        return
    files.write_json(path, settings)


def _text(correct_N: Tensor) -> str:
    return "".join("1" if right else "0" for right in correct_N.tolist())


def _tensor(text: str) -> Tensor:
    return torch.tensor([right == "1" for right in text])
