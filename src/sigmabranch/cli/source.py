"""What a saved network remembers about where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sigmabranch.archive import read_manifest
from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.tasks import Task


def read_source(
    folder: Path, kind: str | None, settings: Sequence[str] | None, *, made: bool = False
) -> tuple[Task, int]:
    """The task (with ``settings`` applied) and the seed of the network in ``folder``.

    Args:
        folder: of the network.
        kind: ``"dense"`` or ``"branched"``; None takes either.
        settings: as ``--set`` takes them.
        made: nothing is made anew, so that settings can only be those of the data.

    Raises:
        CheckpointError: no network of that kind, or one that was saved without its task.
        ConfigError: a setting that would change nothing.
    """
    for setting in settings or ():
        if made and not setting.startswith("data."):
            raise ConfigError(
                f"--set {setting} changes nothing of a network that is made: only settings of "
                "data do"
            )
    notes = read_manifest(folder, kind)["notes"]
    if "task" not in notes:
        raise CheckpointError(
            f"{folder} was saved without a task: use the Python API, or save it with one"
        )
    return Task.from_dict(notes["task"]).with_settings(settings or ()), notes["seed"]
