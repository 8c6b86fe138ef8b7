"""Training curves on disk: a CSV file always, TensorBoard on request."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sigmabranch.errors import MissingDependency
from sigmabranch.files import atomic_write
from sigmabranch.training.events import Event


def write_csv(path: Path | str, history: Iterable[Mapping[str, Any]]) -> None:
    """Write one row per epoch; lists of numbers become space-separated, nested ones are left out.

    The file is written anew, so it never shows epochs that a resume has taken back.
    """
    rows = [{key: _cell(value) for key, value in record.items()} for record in history]
    columns = list(dict.fromkeys(key for row in rows for key in row if row[key] is not None))
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


class TensorBoardLog:
    """A progress callback that writes each epoch's numbers for TensorBoard.

    Args:
        folder: where the event files go.

    Raises:
        MissingDependency: TensorBoard is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
        except ImportError as error:
            raise MissingDependency("tensorboard", "train", "the TensorBoard log") from error
        self._writer = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        """Write an epoch's numbers; close the file at the end of the run."""
        if event.kind == "epoch":
            for name, value in event.metrics.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, event.epoch)
        elif event.kind == "end":
            self._writer.close()


def _cell(value: Any) -> Any:
    if isinstance(value, list | tuple):
        flat = all(isinstance(item, int | float) for item in value)
        return " ".join(map(str, value)) if flat else None
    return None if isinstance(value, Mapping) else value
