"""A disk that fails, or loses its power, at one operation of one's choice.

Operations are counted in this process: opening, reading, writing, flushing, renaming, removing and
making folders, below one folder. At a loss of power, what was not flushed is half written, and
names that their folder was not flushed for are the old ones.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch

CRASHED = 86
READS = ("read", "open to read")


class Disk:
    """Counts operations below ``folder``, and lets the one numbered ``at`` go wrong.

    Args:
        folder: what lies elsewhere is left alone.
        at: from 0; None only counts.
        how: ``"error"``, ``"full"`` (a part is written, then an error), or, to end the process,
            ``"killed"`` (memory is lost, the disk is not), ``"power"`` (whatever was not flushed is
            lost) or ``"torn"`` (the same, but the latest new name is kept).
    """

    def __init__(self, folder: Path, at: int | None, how: str) -> None:
        self.folder, self.at, self.how = str(folder), at, how
        self.kinds: list[str] = []
        self._unflushed: dict[int, str] = {}  # inode → path
        self._renames: list[tuple[str, str, str | None]] = []
        self._backups = folder.parent / f"{folder.name}-backups"
        self._real = {name: getattr(os, name) for name in _OS} | {"open file": io.open}

    @contextmanager
    def mounted(self) -> Iterator[Disk]:
        """Let all operations of a block go through this disk."""
        self._backups.mkdir(exist_ok=True)
        with ExitStack() as stack:
            for name in _OS:
                stack.enter_context(mock.patch.object(os, name, getattr(self, f"_{name}")))
            for module in (io, builtins):
                stack.enter_context(mock.patch.object(module, "open", self._open_file))
            load = safetensors.torch.load_file
            stack.enter_context(
                mock.patch.object(
                    safetensors.torch,
                    "load_file",
                    lambda path, *rest: self._do("read", str(path), lambda: load(path, *rest)),
                )
            )
            yield self

    def _do(self, kind: str, path: Any, act: Callable[[], Any]) -> Any:
        """One operation."""
        if not str(path).startswith(self.folder):
            return act()
        self.kinds.append(kind)
        if len(self.kinds) - 1 != self.at:
            return act()
        if self.how not in ("error", "full"):
            self._crash()
        code = errno.ENOSPC if self.how == "full" else errno.EIO
        raise OSError(code, os.strerror(code), str(path))

    def _crash(self) -> None:
        if self.how in ("power", "torn"):
            kept = 1 if self.how == "torn" else 0
            for source, target, backup in reversed(self._renames[: len(self._renames) - kept]):
                self._undo(source, target, backup)
            for path in self._unflushed.values():
                with suppress(OSError):
                    os.truncate(path, os.path.getsize(path) // 2)
        os._exit(CRASHED)

    def _undo(self, source: str, target: str, backup: str | None) -> None:
        replace = self._real["replace"]
        with suppress(FileNotFoundError):  # it has another name by now
            replace(target, source)
            if backup is not None:
                replace(backup, target)

    # -- what is patched -------------------------------------------------------------------------

    def _open(self, path: Any, flags: int, *rest: Any, **more: Any) -> int:
        kind = "open" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "open to read"
        return self._do(kind, path, lambda: self._real["open"](path, flags, *rest, **more))

    def _open_file(self, path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        def act() -> Any:
            return self._real["open file"](path, mode, *rest, **more)

        if isinstance(path, int) or not str(path).startswith(self.folder):
            return act()
        return _File(self._do("open to read" if mode in ("r", "rb") else "open", path, act), self)

    def _fsync(self, handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")

        def act() -> None:
            self._real["fsync"](handle)
            self._unflushed.pop(os.fstat(handle).st_ino, None)
            if os.path.isdir(path):
                self._renames = [move for move in self._renames if os.path.dirname(move[1]) != path]

        self._do("fsync", path, act)

    def _replace(self, source: Any, target: Any, **more: Any) -> None:
        def act() -> None:
            backup = None
            if os.path.exists(target):
                backup = str(self._backups / str(len(self.kinds)))
                os.link(target, backup)
            self._real["replace"](source, target, **more)
            self._renames.append((str(source), str(target), backup))

        self._do("rename", target, act)

    _rename = _replace

    def _unlink(self, path: Any, **more: Any) -> None:
        self._do("unlink", path, lambda: self._real["unlink"](path, **more))

    def _mkdir(self, path: Any, *rest: Any, **more: Any) -> None:
        self._do("mkdir", path, lambda: self._real["mkdir"](path, *rest, **more))

    def _preadv(self, handle: int, *rest: Any) -> int:
        path = os.readlink(f"/proc/self/fd/{handle}")
        return self._do("read", path, lambda: self._real["preadv"](handle, *rest))


_OS = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "preadv")


class _File:
    """An open file whose reads and writes count."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._disk._do("read", self._file.name, self._file.readlines))

    def read(self, *size: int) -> Any:
        return self._disk._do("read", self._file.name, lambda: self._file.read(*size))

    def readinto(self, into: Any) -> int:
        return self._disk._do("read", self._file.name, lambda: self._file.readinto(into))

    def write(self, content: Any) -> int:
        def act() -> int:
            handle = self._file.fileno()
            path = os.readlink(f"/proc/self/fd/{handle}")
            self._disk._unflushed[os.fstat(handle).st_ino] = path
            return self._file.write(content)

        try:
            return self._disk._do("write", self._file.name, act)
        except OSError:
            if self._disk.how == "full":
                self._file.write(content[: len(content) // 2])
                self._file.flush()
            raise
