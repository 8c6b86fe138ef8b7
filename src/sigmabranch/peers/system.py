"""What a system is: settings, a network of the right shape, and a way to train it.

A system is a frozen dataclass; its fields are its settings, which ``--set NAME.FIELD=VALUE``
changes. It says what it needs of a task, counts itself without training, and makes its network out
of the same source network and recipe as every other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self, get_args, get_type_hints

from torch import nn

from sigmabranch.errors import ConfigError
from sigmabranch.fields import from_fields, to_fields
from sigmabranch.measure import cost
from sigmabranch.peers.bench import Bench
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example
from sigmabranch.training import Recipe


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network that is ready to be measured.

    Attributes:
        network: (B, ...) → (B, V) logits, a :class:`~sigmabranch.net.SigmaBranchNet`, or a
            :class:`~sigmabranch.measure.load.Dynamic` one.
        recipe: of its last training; None if there was none.
        epochs: passes over the training set behind it, the source network's included.
        mark: how its training departs from the table's recipe, in a few words; empty if it does
            not. A table refuses rows of another recipe without it.
        notes: more figures worth keeping, JSON-able.
        accuracy: split → figures to take instead of evaluating the network.
        counted: network to count instead, where the real one cannot be followed.
        bytes_per_param: of the stored weights; 4 for float32.
    """

    network: nn.Module
    recipe: Recipe | None
    epochs: int
    mark: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, Any]] | None = None
    counted: nn.Module | None = None
    bytes_per_param: float = 4.0


@dataclass(frozen=True, kw_only=True)
class System(ABC):
    """Base of all systems.

    Attributes:
        name: of the system.
        summary: of it, in one line.
        sized_by: the settings that say how large it is.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    sized_by: ClassVar[tuple[str, ...]] = ()

    def check(self, task: Task) -> None:
        """Raise :class:`ConfigError` where ``task`` lacks what the system needs.

        To be called before any work is done.
        """
        del task

    def fitted(self, task: Task, active_params: int) -> Self:
        """The same system, its size set so that about ``active_params`` are active.

        Raises:
            ConfigError: it cannot be made that small.
        """
        del task, active_params
        return self

    @abstractmethod
    def sketch(self, task: Task) -> nn.Module:
        """Its network for ``task`` with meaningless weights, for counting."""

    def count(self, task: Task) -> dict[str, Any]:
        """Cost as :func:`sigmabranch.measure.cost` gives it, beside the task's dense network.

        ``peer`` holds the system's name, its settings and what only it has.
        """
        self.check(task)
        network = self.sketch(task).eval()
        counted = cost(network, example(task), dense=task.model.build().eval())
        return {**counted, "peer": {**self.to_dict(), **self.details(network, task)}}

    def details(self, network: nn.Module, task: Task) -> dict[str, Any]:
        """More counts that only this system has, JSON-able."""
        del network, task
        return {}

    @abstractmethod
    def run(self, bench: Bench) -> Trained:
        """Make the network, train it, hand it over; resumes what the bench's folder holds."""

    def to_dict(self) -> dict[str, Any]:
        """``name`` and all settings, JSON-able."""
        return {"name": self.name, **{key: to_fields(value) for key, value in asdict(self).items()}}

    def made(self, settings: Mapping[str, Any]) -> bool:
        """Whether ``settings``, from :meth:`to_dict` of this or an earlier version, are these.

        Fields that are younger than ``settings`` have their defaults there.
        """
        own = {key: value for key, value in settings.items() if key != "name"}
        try:
            return settings.get("name") == self.name and type(self)().changed(own) == self
        except ConfigError:
            return False

    def changed(self, settings: Mapping[str, Any]) -> Self:
        """The same system with other values of some fields.

        Raises:
            ConfigError: an unknown field, or a value that does not fit it.
        """
        return from_fields(type(self), self.name, {**asdict(self), **settings})


def share(name: str, value: float) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a rate that can be pruned: in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be in [0, 1), got {value}")


def check_choices(system: System, *names: str) -> None:
    """Raise :class:`ConfigError` where a field has none of its choices."""
    hints = get_type_hints(type(system))
    for name in names:
        value, choices = getattr(system, name), get_args(hints[name])
        if value not in choices:
            raise ConfigError(
                f"{system.name} {name} is {value!r}: choose one of {', '.join(choices)}"
            )
