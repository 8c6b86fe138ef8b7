"""Optuna's journal of a search, in which nothing can be altered, lost or moved unnoticed.

Each line is an entry of Optuna's with its own hash, and the hash of the line before it. Entries
that belong together are one write, and say how many are to follow: a crash leaves all or none.
Optuna's other tools read the file as one of theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sigmabranch import files
from sigmabranch.errors import CheckpointError
from sigmabranch.seals import has_seal, sealed, unsealed
from sigmabranch.temporaries import temporary_file

_BEGINNINGS = b'{"written_by":"sigmabranch",', b'{"op_code":'  # earlier ones had no hashes
_BEFORE, _TO_FOLLOW = "after", "to_follow"
_ADVICE = "restore it or choose another --out"


class Journal:
    """The entries of one file, which this process alone writes.

    Args:
        path: of the file; its folder is made if it is missing. A last line that a crash cut short
            is dropped, and a journal of an earlier version is written anew with hashes.

    Raises:
        CheckpointError: it is damaged, or none of ours.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, ""
        self._entries: list[dict[str, Any]] = []
        self._held: list[dict[str, Any]] | None = None  # until all that belong together are there
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole, _, cut = content.rpartition(b"\n")
        if cut and not any(cut.startswith(begin[: len(cut)]) for begin in _BEGINNINGS):
            raise self._damage("its last line is none of ours")
        lines = [self._parsed(number, line) for number, line in _numbered(whole)]
        with_hashes = any(map(has_seal, lines))
        if with_hashes:
            lines = [self._checked(number, line) for number, line in enumerate(lines, start=1)]
        ends = [n for n, line in enumerate(lines, start=1) if not line.pop(_TO_FOLLOW, 0)]
        self._entries = lines[: max(ends, default=0)]
        if cut or lines[len(self._entries) :] or (lines and not with_hashes):
            self._write_anew()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The entries from this number on, for Optuna."""
        return iter(self._entries[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add entries, on disk as well, for Optuna.

        Raises:
            CheckpointError: the file cannot be written.
        """
        entries = json.loads(json.dumps(logs))
        if self._held is None:
            self._append(entries)
        else:
            self._held += entries
        self._entries += entries

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what is appended inside at the end, at once.

        Raises:
            CheckpointError: the file cannot be written.
        """
        held: list[dict[str, Any]] = []
        self._held = held
        try:
            yield
        finally:
            self._held = None
        self._append(held)

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        with files.writing(self._path), open(self._path, "ab") as file:
            file.write(self._lines(entries))
            file.flush()
            os.fsync(file.fileno())

    def _lines(self, entries: Sequence[Mapping[str, Any]]) -> bytes:
        content = b""
        for follow, entry in zip(reversed(range(len(entries))), entries, strict=True):
            line = sealed(
                {**entry, _BEFORE: self._last, **({_TO_FOLLOW: follow} if follow else {})}
            )
            self._last = line["sha256"]
            content += json.dumps(line, separators=(",", ":")).encode() + b"\n"
        return content

    def _write_anew(self) -> None:
        self._last = ""
        with files.writing(self._path), temporary_file(self._path.parent, self._path.name) as new:
            new.write_bytes(b"".join(self._lines([entry]) for entry in self._entries))
            files.publish(new, self._path)

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise self._damage(f"line {number} is no JSON") from None
        if not isinstance(entry, dict) or type(entry.get("op_code")) is not int:
            raise self._damage(f"line {number} is no entry of a journal")
        return entry

    def _checked(self, number: int, line: dict[str, Any]) -> dict[str, Any]:
        if not has_seal(line):
            raise self._damage(f"line {number} has no hash")
        entry = unsealed(line, f"line {number} of {self._path}", _ADVICE)
        if entry.pop(_BEFORE, None) != self._last or type(entry.get(_TO_FOLLOW, 0)) is not int:
            raise self._damage(f"line {number} does not follow the one before it")
        self._last = line["sha256"]
        return entry

    def _damage(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged: {reason}; {_ADVICE}")


def _numbered(content: bytes) -> Iterator[tuple[int, bytes]]:
    return enumerate(content.split(b"\n") if content else [], start=1)
