"""What a training run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One moment of a run; emitted by the main process only.

    Attributes:
        kind: ``"start"``, ``"step"`` (about once a second), ``"epoch"`` (after its evaluation),
            ``"checkpoint"``, ``"warning"``, or ``"end"``.
        epoch: epochs finished.
        epochs: epochs of the whole run.
        step: optimizer steps done in the current epoch.
        steps: optimizer steps per epoch.
        metrics: recent means at a step, the epoch's record at its end.
        message: the text of a warning; at the end why the run stopped, empty if it is complete.
    """

    kind: Literal["start", "step", "epoch", "checkpoint", "warning", "end"]
    epoch: int
    epochs: int
    step: int
    steps: int
    metrics: dict[str, Any] = field(default_factory=dict)
    message: str = ""


Progress: TypeAlias = Callable[[Event], None]
