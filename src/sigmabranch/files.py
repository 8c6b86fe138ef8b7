"""Files that are either complete or absent, and never written over another's.

Several files that belong together are replaced as one: the manifest that lists them by their hash
comes last, and until then they lie beside the old ones as ``.NAME.HASH.pending``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sigmabranch.errors import CheckpointError
from sigmabranch.marks import MANIFEST, check_free, claim, listed
from sigmabranch.seals import json_bytes, sealed, unsealed
from sigmabranch.temporaries import temporary_file

_PENDING = re.compile(r"\..+\.([0-9a-f]{16})\.pending", re.DOTALL)


@contextmanager
def atomic_write(path: Path | str, *, signed: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step.

    The bytes are flushed to disk before the replacement, so a crash leaves the old file or the new
    one, never a part. Any exception inside the block removes the temporary file.

    Args:
        path: nothing may be there, or a file of ours.
        signed: the content itself shows that it is ours, or a manifest will list it.

    Raises:
        CheckpointError: the folder cannot be written, the disk is full, or a file would be lost
            that we did not write.
    """
    path = Path(path)
    with writing(path):
        check_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path.parent, path.name) as temporary:
            yield temporary
            if not signed:
                claim(path)
            publish(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses while ``path`` is written is one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"cannot write {path}: {reason}; free space or choose another folder"
        ) from error


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, on disk as well."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(0o666 & ~_umask())
    os.replace(temporary, path)
    _sync(path.parent)


def write_together(folder: Path, contents: Mapping[str, bytes | Path]) -> None:
    """Replace a manifest and the files that it lists: a crash leaves all of the old or of the new.

    Args:
        folder: of the files, created if absent.
        contents: name → bytes, or a file to be moved; one is the manifest.

    Raises:
        CheckpointError: as for :func:`atomic_write`.
    """
    with writing(folder):
        for name in contents:
            check_free(folder / name)
        folder.mkdir(parents=True, exist_ok=True)
        for name, digest in listed(folder).items():
            settle(folder / name, digest)
        _drop_pending(folder)
        try:
            for name in [name for name in contents if name != MANIFEST]:
                _pend(folder / name, contents[name])
            with atomic_write(folder / MANIFEST, signed=True) as temporary:
                _fill(temporary, contents[MANIFEST])
        except BaseException:
            with suppress(OSError):
                _drop_pending(folder)
            raise
        for name, digest in listed(folder).items():
            settle(folder / name, digest)


def settle(path: Path, digest: str) -> None:
    """Give a file its name that a crash kept from it, after the manifest had listed its hash."""
    pending = _pending(path, digest)
    if pending.exists():
        with suppress(FileNotFoundError):  # another process has done so
            os.replace(pending, path)
        _sync(path.parent)


def write_json(path: Path | str, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON with its own hash, atomically.

    Raises:
        CheckpointError: as for :func:`atomic_write`.
        ValueError: NaN or infinity.
    """
    content = json_bytes(sealed(value))
    with atomic_write(path, signed=True) as temporary:
        temporary.write_bytes(content)


def read_json(path: Path | str, advice: str = "write it again") -> Any:
    """Read a JSON file, without its mark and its hash, which fits if there is one.

    Args:
        path: of the file.
        advice: what to do if it is damaged.

    Raises:
        CheckpointError: the file is missing, is not JSON, or was altered.
    """
    return unsealed(parse_json(path, advice), path, advice)


def parse_json(path: Path | str, advice: str = "write it again") -> Any:
    """The same with its mark and its hash, which nobody has checked."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: not valid JSON ({error}); {advice}") from error


def sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pend(path: Path, content: bytes | Path) -> None:
    """Write a file that waits for its name."""
    digest = sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    with atomic_write(_pending(path, digest), signed=True) as temporary:
        _fill(temporary, content)


def _fill(temporary: Path, content: bytes | Path) -> None:
    if isinstance(content, Path):
        os.replace(content, temporary)
    else:
        temporary.write_bytes(content)


def _pending(path: Path, digest: str) -> Path:
    return path.with_name(f".{path.name}.{digest[:16]}.pending")


def _drop_pending(folder: Path) -> None:
    """Remove what waits for a manifest that was never written."""
    awaited = {_pending(folder / name, digest) for name, digest in listed(folder).items()}
    for path in {*folder.glob(".*.pending")} - awaited:
        if (match := _PENDING.fullmatch(path.name)) and sha256(path).startswith(match[1]):
            path.unlink()


def _sync(folder: Path) -> None:
    """Flush a folder's names to disk, where that can be asked for."""
    with suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
