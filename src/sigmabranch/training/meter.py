"""An epoch's metrics, one row per step, kept where they were computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sigmabranch.errors import CheckpointError, NumericError

RECENT_STEPS = 20


class Meter:
    """A table of metrics on the device, so that recording a step does not wait for it.

    Args:
        steps: rows, one for each step of an epoch.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._names: list[str] = []
        self._table_SM = torch.empty(0, 0)
        self.done = 0

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Append a step's scalars; every step of an epoch has the same names."""
        row_M = torch.stack([value.detach().float() for value in metrics.values()])
        if not self.done:
            self._names = list(metrics)
            self._table_SM = row_M.new_zeros(self._steps, len(row_M))
        self._table_SM[self.done] = row_M
        self.done += 1

    def reduce(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Make every row the mean over processes, which then all hold the same."""
        if self.done:
            self._table_SM = mean(self._table_SM)

    def recent(self) -> dict[str, float]:
        """Means over the last steps."""
        rows_SM = self._table_SM[max(0, self.done - RECENT_STEPS) : self.done]
        return dict(zip(self._names, rows_SM.mean(0).tolist(), strict=True))

    def means(self) -> dict[str, Tensor]:
        """Means over the steps so far, on the device."""
        return dict(zip(self._names, self._table_SM[: self.done].mean(0), strict=True))

    def check_finite(self, epoch: int) -> None:
        """Look for a NaN or infinity in any step so far; this waits for the device.

        Raises:
            NumericError: naming the metric, ``epoch`` and the first bad step.
        """
        bad = (~self._table_SM[: self.done].isfinite()).nonzero()
        if len(bad):
            step, column = bad[0].tolist()
            raise NumericError(
                f"{self._names[column]} became NaN or infinite in epoch {epoch}, step {step + 1} "
                f"of {self._steps}: lower lr or set clip_norm; the last checkpoint is kept"
            )

    def state_dict(self) -> dict[str, Any]:
        """The rows so far; :meth:`load_state_dict` is its inverse."""
        return {"names": self._names, "rows": self._table_SM[: self.done].clone()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from ``state``, on ``device``."""
        rows_SM = state["rows"].to(device)
        if len(rows_SM) > self._steps:
            raise CheckpointError(f"the checkpoint has more than {self._steps} steps an epoch")
        self._names, self.done = list(state["names"]), len(rows_SM)
        self._table_SM = rows_SM.new_zeros(self._steps, rows_SM.shape[1])
        self._table_SM[: self.done] = rows_SM
