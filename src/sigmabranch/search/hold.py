"""One search at a time in a folder.

The system drops the lock when its process ends, however it ends, so none is ever left behind. The
file only says who holds it.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sigmabranch import files
from sigmabranch.errors import CheckpointError
from sigmabranch.seals import json_bytes, sealed

try:
    import fcntl
except ImportError:  # no such locks
    fcntl = None  # type: ignore[assignment]

LOCK = "search.lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes' searches out of ``folder``, which is made if it is missing.

    Raises:
        CheckpointError: another one holds it; the message says which, and since when.
    """
    path = folder.absolute() / LOCK
    with files.writing(path):
        files.check_free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.claim(path)
        file = _locked(path)
    try:
        with files.writing(path):
            file.truncate(0)
            file.write(json_bytes(sealed(_owner())))
            file.flush()
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()


def _locked(path: Path) -> IO[bytes]:
    """The file, open and locked; opened anew if its last holder has removed it meanwhile."""
    while True:
        file = open(path, "ab")  # noqa: SIM115 (locked until it is closed)
        try:
            if fcntl is not None:
                # A process's own lock: children that outlive it do not keep it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise CheckpointError(
                f"{path.parent} is being searched by {_holder(path)}: wait until that has ended, "
                "or choose another --out"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        file.close()


def _owner() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _holder(path: Path) -> str:
    """Who holds the lock, in words."""
    try:
        owner = files.read_json(path)
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (CheckpointError, KeyError, TypeError):  # it is about to say so
        return "another process"
