"""Reasons to stop a run early, all of them at a step's end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class StopSwitch:
    """Turns Ctrl-C, SIGTERM, a time limit or a caller's wish into a reason to stop.

    The first signal asks for a stop and gives the signals back to their previous handlers, so
    that a second one ends the process at once. Outside the main thread signals are left alone.

    Args:
        max_minutes: time limit from now; None for none.
        wish: asked at every step; true stops the run.
    """

    def __init__(
        self, max_minutes: float | None = None, wish: Callable[[], bool] | None = None
    ) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._wish = wish
        self._signal = ""
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str:
        """Why to stop now; empty to go on."""
        if self._signal:
            return f"interrupted by {self._signal}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time limit is reached"
        return "asked to stop" if self._wish is not None and self._wish() else ""

    def __enter__(self) -> StopSwitch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
