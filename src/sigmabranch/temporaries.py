"""Temporary files and folders that do not outlive their process for long.

Each is locked while its process lives. What a killed one left in a folder carries our name and no
lock, and goes when the next temporary is made there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks: what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".sigmabranch.tmp"


@contextmanager
def temporary_file(folder: Path, name: str) -> Iterator[Path]:
    """An empty file in ``folder``, called after ``name``; gone at the end unless it was moved."""
    sweep(folder)
    handle, path = _locked(lambda: tempfile.mkstemp(_SUFFIX, f".{name}.", folder))
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """An empty folder in ``folder``, gone at the end with all that is in it."""
    sweep(folder)

    def made() -> tuple[int, str]:
        path = tempfile.mkdtemp(_SUFFIX, ".", folder)
        return os.open(path, os.O_RDONLY), path

    handle, path = _locked(made)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the temporaries of processes that are gone."""
    if fcntl is None:
        return
    for path in folder.glob(f".*{_SUFFIX}"):
        with suppress(OSError):  # gone meanwhile, or in use
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def _locked(make: Callable[[], tuple[int, str]]) -> tuple[int, Path]:
    """Make a temporary and lock it; another one if a sweep was faster than the lock."""
    while True:
        handle, name = make()
        if fcntl is None:
            return handle, Path(name)
        with suppress(OSError):  # a file system without locks: nobody sweeps there either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):
            return handle, Path(name)
        os.close(handle)
