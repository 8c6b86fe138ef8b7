"""What may happen to a network in the middle of its training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import nn

from sigmabranch.conversion import Shards
from sigmabranch.data import Share


class Turn(Protocol):
    """A change of the network in the middle of its training.

    Attributes:
        share: of the training that is done by then, in (0, 1).
    """

    share: float

    def prepare(self, model: nn.Module, *, done: bool) -> None:
        """Put ``model`` into the form it is trained in before the turn, or after it."""

    def make(
        self, model: nn.Module, batches: Iterable[Share], shards: Shards, seed: int
    ) -> dict[nn.Parameter, nn.Parameter]:
        """Do it.

        Args:
            model: in the form it has before; in evaluation mode.
            batches: samples to learn from, this process's share of them.
            shards: the processes that take part.
            seed: of whatever is random in it.

        Returns:
            New parameter → the old one that it is a copy of.
        """

    def release(self, model: nn.Module) -> None:
        """Undo what was for the training alone."""
