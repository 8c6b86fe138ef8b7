"""Memory for weights: page-aligned slots whose sum never exceeds a budget."""

from __future__ import annotations

import mmap
from collections import defaultdict

from sigmabranch.errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(size: int | str) -> int:
    """Bytes from a number or from text such as ``"42MB"`` (10⁶) or ``"40MiB"`` (2²⁰).

    Raises:
        ConfigError: not a positive size.
    """
    text = str(size).strip().upper()
    number = text.rstrip("KMGIB")
    unit = text[len(number) :].strip() or "B"
    try:
        count = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ConfigError(f"{size!r} is no size: write bytes, or for example 42MB or 40MiB")
    return count


class Slots:
    """A pool of page-aligned buffers; a buffer that is given back is used again.

    Args:
        budget: bytes that all buffers together never exceed, free ones included.

    Attributes:
        used: bytes of the buffers that are out.
        peak: most bytes that ever were allocated.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = self.peak = 0
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
        self._free_bytes = 0

    @property
    def room(self) -> int:
        """Bytes that can still be taken."""
        return self.budget - self.used

    def take(self, size: int) -> mmap.mmap | None:
        """A buffer of ``size`` bytes with any content, or None if there is no room for it."""
        if size > self.room:
            return None
        if self._free[size]:
            self._free_bytes -= size
            memory = self._free[size].pop()
        else:
            self._shrink(self.budget - self.used - size)
            memory = mmap.mmap(-1, size)
        self.used += size
        self.peak = max(self.peak, self.used + self._free_bytes)
        return memory

    def give_back(self, memory: mmap.mmap) -> None:
        """Return a buffer; nobody may read it any more."""
        size = len(memory)
        self.used -= size
        self._free[size].append(memory)
        self._free_bytes += size

    def _shrink(self, limit: int) -> None:
        """Let go of free buffers until they hold at most ``limit`` bytes."""
        for size in sorted(self._free, reverse=True):
            while self._free[size] and self._free_bytes > limit:
                self._free[size].pop()
                self._free_bytes -= size
