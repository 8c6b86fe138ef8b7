"""Which weights are in memory, which are on their way, and what must go to make room.

One lock guards it. The thread that computes says what it wants and waits for it; the loader takes
one segment at a time. Every decision compares what the segments are worth:

1. what the current input is certain to need, the sooner the more;
2. what the next input may need, by its probability given the last one; among equals what runs
   earlier in an input, because it is needed again sooner.

With one leaf, a dense network, what goes is what runs again last, so that little more is read for
each input than what does not fit; with inputs that do not depend on each other what is used most
often stays (LFU); on a stream the current path does.
"""

from __future__ import annotations

import mmap
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from torch import Tensor

from sigmabranch.deploy.segment import Segment
from sigmabranch.deploy.slots import Slots
from sigmabranch.errors import ConfigError, SigmaBranchError, StorageError

Worth: TypeAlias = tuple[int, float, int]
# Loading may always run ahead of computing by this part of the budget.
_WINDOW = 8


class _Status(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"


@dataclass
class _Held:
    """What memory holds of a segment."""

    rank: int  # position among all segments in order of execution
    status: _Status = _Status.ABSENT
    memory: mmap.mmap | None = None
    tensors: dict[str, Tensor] | None = None
    running: bool = False
    error: SigmaBranchError | None = None


class Residency:
    """The segments of a package under a byte budget.

    Args:
        segments: all of them, parents before children.
        budget: bytes; those of segments on their way count.
        needs: segment → others that must be in memory while it runs, and run with none else.

    Raises:
        ConfigError: the budget is too small to run at all.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        budget: int,
        needs: Mapping[Segment, Sequence[Segment]] | None = None,
    ) -> None:
        self._needs = needs or {}
        least = max(
            sum(part.bytes for part in (segment, *self._needs.get(segment, ())))
            for segment in segments
        )
        if budget < least:
            raise ConfigError(
                f"a budget of {budget:,} bytes is too small: this package needs at least {least:,}"
            )
        self.slots = Slots(budget)
        self._window = budget // _WINDOW
        self._read: Counter[Segment] = Counter()
        self._changed = threading.Condition()
        self._held = {segment: _Held(rank) for rank, segment in enumerate(segments)}
        self._certain: list[Segment] = []
        self._likely: list[Segment] = []
        self._next_probability: dict[str, float] = {}
        self._likely_probability: dict[str, float] = {}
        self._closed = False
        self._failure = ""

    # The side that computes.

    def want(
        self,
        certain: Iterable[Segment],
        likely: Iterable[Segment],
        *,
        likely_probability: dict[str, float],
        next_probability: dict[str, float],
    ) -> None:
        """Say what the current input needs, in order, and what it may need.

        Args:
            certain: not yet run segments that the current input needs.
            likely: segments that it may need, the likeliest first.
            likely_probability: node → probability that the current input passes it.
            next_probability: node → probability that the next input passes it.
        """
        with self._changed:
            before, self._certain, self._likely = self._certain, list(certain), list(likely)
            for segment in set(self._certain) - set(before):
                self._held[segment].error = None  # of an attempt that nobody waited for
            self._likely_probability = likely_probability
            self._next_probability = next_probability
            self._changed.notify_all()

    def acquire(self, segment: Segment) -> dict[str, Tensor]:
        """Wait for a wanted segment; it stays until :meth:`release`.

        Raises:
            SigmaBranchError: it could not be read, and the next attempt starts anew; or the loader
                has failed, and there will be no other.
        """
        held = self._held[segment]
        with self._changed:
            while held.status is not _Status.READY:
                if held.error is not None:
                    error, held.error = held.error, None
                    raise error
                if self._closed:
                    raise ConfigError("the runtime is closed: open it again")
                if self._failure:
                    raise StorageError(self._failure)
                self._changed.wait()
            held.running = True
            assert held.tensors is not None
            return held.tensors

    def release(self, segment: Segment) -> None:
        """The segment has been run: it may go if its room is needed."""
        with self._changed:
            self._held[segment].running = False
            if segment in self._certain:
                self._certain.remove(segment)
            self._changed.notify_all()

    def read(self) -> Counter[Segment]:
        """Bytes of each segment that arrived since this was last asked."""
        with self._changed:
            read, self._read = self._read, Counter()
            return read

    def missing(self, segments: Iterable[Segment]) -> int:
        """Bytes of these that are not in memory."""
        with self._changed:
            absent = (s for s in segments if self._held[s].status is not _Status.READY)
            return sum(segment.bytes for segment in absent)

    def forget(self, keep: int = 0) -> None:
        """Drop everything but the first segments in order of execution, up to ``keep`` bytes.

        The system gets the memory back.
        """
        with self._changed:
            for segment, held in self._held.items():
                keep -= segment.bytes
                if keep < 0 and held.status is _Status.READY and not held.running:
                    self._evict(segment)
            self.slots.release()

    def close(self) -> None:
        """End all waiting, here and in the loader."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # The side that loads.

    def next(self) -> tuple[Segment, mmap.mmap] | None:
        """Wait for something to load and make room for it; None when there will be nothing more."""
        with self._changed:
            while not self._closed:
                job = self.due()
                if job is not None:
                    return job
                self._changed.wait()
            return None

    def due(self) -> tuple[Segment, mmap.mmap] | None:
        """What :meth:`next` would give without waiting, or None."""
        with self._changed:
            for segment in self._candidates():
                held = self._held[segment]
                try:
                    memory = self._room_for(segment)
                except OSError as error:  # the system has less than the budget
                    held.error = StorageError(
                        f"no memory for {segment.bytes:,} bytes of weights: {error.strerror}; "
                        "lower the budget"
                    )
                    self._changed.notify_all()
                    continue
                if memory is not None:
                    held.status, held.memory = _Status.LOADING, memory
                    return segment, memory
            return None

    def arrived(self, segment: Segment, count: int) -> bool:
        """``count`` more bytes of a segment are there; False if nobody wants the rest."""
        with self._changed:
            self._read[segment] += count
            if self._closed:
                return False
            return segment in self._certain or (
                segment in self._likely and not any(map(self._is_absent, self._certain))
            )

    def ready(self, segment: Segment, tensors: dict[str, Tensor]) -> None:
        """The segment is in memory."""
        with self._changed:
            held = self._held[segment]
            held.status, held.tensors = _Status.READY, tensors
            self._changed.notify_all()

    def dropped(self, segment: Segment, error: SigmaBranchError | None = None) -> None:
        """Loading a segment ended early; ``error`` is raised where somebody waits for it."""
        with self._changed:
            self._evict(segment)
            self._held[segment].error = error
            self._changed.notify_all()

    def failed(self, reason: str) -> None:
        """Nothing will be loaded any more: whoever waits, now or later, is told why."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    def _candidates(self) -> Iterable[Segment]:
        for segment in (*self._certain, *self._likely):
            if self._is_absent(segment) and self._held[segment].error is None:
                yield segment
                if segment in self._certain:
                    return  # in order: nothing overtakes what is needed next

    def _is_absent(self, segment: Segment) -> bool:
        return self._held[segment].status is _Status.ABSENT

    def _room_for(self, segment: Segment) -> mmap.mmap | None:
        """Memory for a segment, at the cost of what is worth less; None if there is none."""
        short = segment.bytes - self.slots.room
        if short > 0 and self._better_later(segment):
            return None
        victims: list[Segment] = []
        for victim in sorted(self._evictable(), key=self._worth):
            if short <= 0:
                break
            if not self._is_worth_less(victim, segment):
                return None
            victims.append(victim)
            short -= victim.bytes
        if short > 0:
            return None
        for victim in reversed(victims):  # a small one may stay where a large one suffices
            if short + victim.bytes <= 0:
                short += victim.bytes
            else:
                self._evict(victim)
        return self.slots.take(segment.bytes)

    def _better_later(self, segment: Segment) -> bool:
        """Whether what runs before ``segment`` is the first to go, once it has run.

        Without this, a network that does not fit would be read anew for every input: what has just
        run would always make room for what is needed next, and be gone when it is needed again.
        """
        if segment not in self._certain:
            return False
        together = self._needs.get(segment, ())
        before = self._certain[: self._certain.index(segment)]
        before = [other for other in before if other not in together]
        ahead = {s for s in before if self._held[s].status is _Status.READY}
        if sum(s.bytes for s in ahead) < self._window:
            return False
        done = set(self._evictable()).difference(self._certain)
        return min(ahead | done, key=self._next_worth) in ahead

    def _evictable(self) -> list[Segment]:
        return [
            segment
            for segment, held in self._held.items()
            if held.status is _Status.READY and not held.running
        ]

    def _worth(self, segment: Segment) -> Worth:
        """Of keeping a segment that is in memory."""
        if segment in self._certain:
            return 1, 0.0, -self._certain.index(segment)
        return 0, *self._next_worth(segment)

    def _next_worth(self, segment: Segment) -> tuple[float, int]:
        """Of keeping a segment for the next input."""
        return self._next_probability.get(segment.node, 0.0), -self._held[segment].rank

    def _is_worth_less(self, kept: Segment, wanted: Segment) -> bool:
        """Whether one segment may go for another; for a guess only if that is strictly likelier."""
        if wanted in self._certain:
            return self._worth(kept) < (1, 0.0, -self._certain.index(wanted))
        return self._worth(kept)[:2] < (0, self._likely_probability.get(wanted.node, 0.0))

    def _evict(self, segment: Segment) -> None:
        held = self._held[segment]
        assert held.memory is not None
        memory, held.memory, held.tensors = held.memory, None, None
        held.status = _Status.ABSENT
        self.slots.give_back(memory)
