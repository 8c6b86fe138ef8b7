"""Several files that appear together, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sigmabranch import files
from sigmabranch.archive import MANIFEST, check_free
from sigmabranch.errors import CheckpointError


@contextmanager
def staged(folder: Path | str) -> Iterator[Path]:
    """Yield an empty folder inside ``folder``; on success its files move up.

    Weights move first and a manifest last. Any exception removes what was written, and ``folder``
    if this made it.

    Raises:
        CheckpointError: the folder cannot be written, the disk is full, or a manifest of something
            else would be replaced.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as name:
            yield Path(name)
            _publish(Path(name), folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"cannot write {folder}: {reason}; free space or choose another folder"
        ) from error
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def listing(folder: Path) -> dict[str, dict[str, Any]]:
    """The files in ``folder`` by name: ``bytes`` and ``sha256``."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in sorted(folder.iterdir())
    }


def _publish(stage: Path, folder: Path) -> None:
    if (stage / MANIFEST).exists():
        check_free(folder, files.read_json(stage / MANIFEST)["format"])
    with ExitStack() as stack:
        # Left in the reverse of this order, each file is flushed and gets its name.
        for path in sorted(stage.iterdir(), key=_last_first):
            temporary = stack.enter_context(files.atomic_write(folder / path.name))
            os.replace(path, temporary)


def _last_first(path: Path) -> tuple[bool, bool, str]:
    return path.name != MANIFEST, path.suffix == ".data", path.name
