"""Several files that appear together, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sigmabranch import files
from sigmabranch.archive import MANIFEST, check_free
from sigmabranch.errors import CheckpointError
from sigmabranch.temporaries import temporary_folder


@contextmanager
def staged(folder: Path | str) -> Iterator[Path]:
    """Yield an empty folder inside ``folder``; on success its files, one a manifest, move up.

    Any exception removes what was written, and ``folder`` if this made it.

    Raises:
        CheckpointError: the folder cannot be written, the disk is full, or a manifest of something
            else would be replaced.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as stage:
            yield stage
            described = files.read_json(stage / MANIFEST)
            check_free(folder, format=described["format"], schema=described["schema"])
            files.write_together(folder, {path.name: path for path in stage.iterdir()})
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
