"""Memory for weights: page-aligned slots whose sum never exceeds a budget."""

from __future__ import annotations

import mmap
from collections import defaultdict


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

    def release(self) -> None:
        """Hand the memory of free buffers back to the system."""
        self._shrink(0)

    def _shrink(self, limit: int) -> None:
        """Let go of free buffers until they hold at most ``limit`` bytes."""
        for size in sorted(self._free, reverse=True):
            while self._free[size] and self._free_bytes > limit:
                self._free[size].pop()
                self._free_bytes -= size
