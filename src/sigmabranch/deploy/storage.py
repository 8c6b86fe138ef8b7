"""Reading the files of a package: large direct reads, at a rate of one's choice, or not at all.

Direct reads go around the page cache, so that what a run reads is what the storage delivers and the
weights are in memory once. Where a file system has none, reads are buffered.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from sigmabranch.errors import StorageError

PAGE = 4096
# Requests last about so long, for a read that is cancelled ends with the one under way; but small
# ones cost fast storage its throughput.
REQUEST_SECONDS = 0.005
LEAST_REQUEST, LARGEST_REQUEST = 64 << 10, 1 << 20

_DIRECT = getattr(os, "O_DIRECT", 0)


class NodeFile:
    """One open file of weights.

    Args:
        path: the file; it stays open, so that deleting it does not end a running program.
        direct: go around the page cache where the file system can.

    Attributes:
        direct: whether reads do go around the page cache.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        self.path = path
        self.direct = bool(direct and _DIRECT)
        try:
            self._handle = self._open()
        except OSError as error:
            raise StorageError(
                f"cannot open {path}: {error.strerror}; copy the package again"
            ) from error

    def _open(self) -> int:
        if self.direct:
            with contextlib.suppress(OSError):  # some file systems refuse, such as tmpfs
                return os.open(self.path, os.O_RDONLY | _DIRECT)
            self.direct = False
        return os.open(self.path, os.O_RDONLY)

    def read(self, offset: int, into: memoryview, request: int) -> Iterator[int]:
        """Fill ``into`` from ``offset`` on, yielding the length of each piece as it arrives.

        Args:
            offset: a multiple of :data:`PAGE`.
            into: page-aligned memory, a multiple of :data:`PAGE` long.
            request: bytes to ask for at a time, a multiple of :data:`PAGE`.

        Raises:
            StorageError: an error of the storage, or the file ends too early.
        """
        done = 0
        while done < len(into):
            piece = into[done : done + request]
            try:
                count = os.preadv(self._handle, [piece], offset + done)
            except OSError as error:
                raise StorageError(f"cannot read {self.path}: {error.strerror}") from error
            if count == 0:
                raise StorageError(
                    f"{self.path} ends after {offset + done} bytes: copy the package again"
                )
            done += count
            yield count

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


class Throttle:
    """Storage that delivers so many bytes per second, for measuring as on a slower device.

    Args:
        bytes_per_second: the rate, or None for as fast as the storage is.
    """

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0

    def began(self) -> None:
        """A request is about to be made: bandwidth that lay idle until now is gone."""
        self._free_at = max(self._free_at, time.perf_counter())

    def took(self, count: int) -> None:
        """Wait until ``count`` more bytes could have arrived."""
        if self.bytes_per_second is None:
            return
        self._free_at += count / self.bytes_per_second
        left = self._free_at - time.perf_counter()
        if left > 0:
            time.sleep(left)


def request_bytes(bytes_per_second: float | None) -> int:
    """How much to ask for at a time from storage of that rate, if it is known."""
    if bytes_per_second is None:
        return LEAST_REQUEST
    pages = int(bytes_per_second * REQUEST_SECONDS) // PAGE
    return min(max(pages * PAGE, LEAST_REQUEST), LARGEST_REQUEST)


def checksum(data: memoryview) -> int:
    """CRC-32 of ``data``: detects damage, not intent."""
    return zlib.crc32(data)
