"""What the terminal shows while the library works, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sigmabranch.training import Event, launched_rank

_EPOCH_FIGURES = ("loss", "train_top1", "top1", "routing_gain", "mean_max_p", "balance")


class Screen:
    """Progress on stderr: bars on a terminal, one line an epoch anywhere else.

    Of several processes only the first shows anything.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=launched_rank() > 0)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            transient=True,
            disable=self.console.quiet or not self.console.is_terminal,
        )
        self._known: dict[str, TaskID] = {}

    @contextmanager
    def live(self) -> Iterator[Screen]:
        """Show the bars while the block runs."""
        with self._bars:
            yield self

    def training(self, step: str, event: Event) -> None:
        """Show one moment of a training run."""
        if event.kind in ("start", "step", "epoch"):
            total = event.epochs * event.steps
            figures = _figures(event.metrics, ("loss",))
            self._advance(step, event.epoch * event.steps + event.step, total, figures)
        if event.kind == "epoch":
            figures = _figures(event.metrics, _EPOCH_FIGURES)
            self.say(f"{step} epoch {event.epoch}/{event.epochs}  {figures}")
        elif event.kind == "warning":
            self.say(f"warning: {event.message}")

    def calibrating(self, what: str, done: int, total: int) -> None:
        """Show how far one pass over the calibration data is."""
        self._advance(f"convert: {what}", done, total, "")

    def say(self, line: str) -> None:
        """One line on stderr."""
        self.console.print(line, markup=False, soft_wrap=True)

    def _advance(self, step: str, done: int, total: int, figures: str) -> None:
        if step not in self._known:
            self._known[step] = self._bars.add_task(step, total=total, figures="")
        self._bars.update(self._known[step], completed=done, total=total, figures=figures)


def print_result(result: dict[str, Any], text: str, as_json: bool) -> None:
    """The result on stdout: one JSON object, or the text."""
    print(json.dumps(result, allow_nan=False) if as_json else text)


def _figures(metrics: dict[str, Any], names: tuple[str, ...]) -> str:
    shown = [f"{name} {metrics[name]:.3g}" for name in names if metrics.get(name) is not None]
    return "  ".join(shown)
