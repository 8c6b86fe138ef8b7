"""How long an input takes on a device that is not at hand: a small analytic model.

Segments are loaded one after the other and computed one after the other. A segment is computed when
it is loaded and the one before it is done; what is loaded next is the first, in the order in which
they run, of which it is known by then that it will:

    loaded(i)   = max(loaded(whatever came before), known(i)) + bytes(i) / bandwidth + overhead
                  + checking(i)
    computed(i) = max(computed(i - 1), loaded(i)) + seconds(i)

So where a tree decides early, the rest of the trunk is loaded while routers are not decided yet.
No schedule is faster than ``max(Σ bytes / bandwidth, Σ seconds)``. Checking is the checksum of what
has come, which the thread that reads computes before it reads on: nothing beside slow storage, a
fifth of the time beside storage of 400 MB/s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sigmabranch.deploy.package import Package, ancestry, parent
from sigmabranch.deploy.planner import Planner
from sigmabranch.deploy.prior import LeafPrior
from sigmabranch.deploy.program import Program
from sigmabranch.deploy.residency import Residency
from sigmabranch.deploy.segment import Segment
from sigmabranch.deploy.storage import checksum
from sigmabranch.tree import is_shared

_CHECKED = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One segment of a path.

    Attributes:
        bytes: to load; 0 if it is in memory.
        seconds: to compute.
        decides: whether it is a router.
        after: so many routers must have been computed before it is known that it will run; no
            more than there are before it.
    """

    bytes: int
    seconds: float
    decides: bool = False
    after: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """What weights are read from.

    Attributes:
        bytes_per_second: sustained.
        request_seconds: of overhead for each segment.
        checked_per_second: bytes whose checksum the device computes.
        source: where the figures come from.
    """

    bytes_per_second: float
    request_seconds: float = 0.0
    checked_per_second: float = math.inf
    source: str = ""

    def seconds(self, size: int) -> float:
        """From the request for a segment of ``size`` bytes until it may be used."""
        return size / self.bytes_per_second + self.request_seconds + size / self.checked_per_second


#: The most that an interface can carry; devices deliver less.
INTERFACES = {
    "qspi-nor": Storage(bytes_per_second=66e6, source="quad SPI at 133 MHz, Winbond W25Q128JV"),
    "sd-uhs1": Storage(bytes_per_second=104e6, source="SDR104, SD Physical Layer 3.01"),
    "emmc-hs400": Storage(bytes_per_second=400e6, source="HS400, JEDEC JESD84-B51"),
    "lpddr4": Storage(bytes_per_second=12.8e9, source="3200 MT/s on 32 bits, JEDEC JESD209-4"),
}


def latency(steps: Sequence[Step], storage: Storage) -> float:
    """Seconds from the input to the logits, with loading and computing overlapped."""
    loaded = {number: 0.0 for number, step in enumerate(steps) if not step.bytes}
    decided = [0.0]  # when so many routers have been computed
    idle = computed = 0.0  # since when nothing is loaded, and computed
    for number, step in enumerate(steps):
        while number not in loaded:
            known = {
                other: decided[late.after]
                for other, late in enumerate(steps)
                if other not in loaded and late.after < len(decided)
            }
            begin = max(idle, min(known.values()))
            chosen = min(other for other, since in known.items() if since <= begin)
            idle = loaded[chosen] = begin + storage.seconds(steps[chosen].bytes)
        computed = max(computed, loaded[number]) + step.seconds
        if step.decides:
            decided.append(computed)
    return computed


def checking_rate() -> float:
    """Bytes per second whose checksum this machine computes."""
    data = memoryview(bytes(_CHECKED))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        checksum(data)
        seconds.append(time.perf_counter() - began)
    return _CHECKED / min(seconds)


def floor(steps: Sequence[Step], storage: Storage) -> float:
    """Seconds below which no schedule can be."""
    loading = sum(step.bytes for step in steps) / storage.bytes_per_second
    return max(loading, sum(step.seconds for step in steps))


def path_steps(
    package: Package,
    leaf: str,
    seconds: Callable[[Segment], float],
    *,
    resident_bytes: int = 0,
    foreseen: bool = False,
) -> list[Step]:
    """The steps of one path.

    Args:
        package: what is run.
        leaf: where the path ends.
        seconds: how long a segment takes to compute.
        resident_bytes: so many of the first bytes are in memory.
        foreseen: the path is guessed rightly before it is decided.
    """
    program = Program(package)
    steps, held = [], 0
    for segment in program.reads(ancestry(leaf)):
        held += segment.bytes
        # What siblings share is known to be needed with their parent.
        node = parent(segment.node) if is_shared(segment.node) else segment.node
        steps.append(
            Step(
                bytes=0 if held <= resident_bytes else segment.bytes,
                seconds=seconds(segment),
                decides=program.is_router(segment),
                after=0 if foreseen else len(ancestry(node)) - 1,
            )
        )
    return steps


def streamed_bytes(package: Package, budget: int, leaves: Iterable[str]) -> list[int]:
    """Bytes read for each input of a stream that takes these leaves, nothing guessed.

    It runs the very policy of the :class:`~sigmabranch.deploy.runtime.Runtime` without its storage.

    Raises:
        ConfigError: a budget too small to run at all.
    """
    program = Program(package)
    residency = Residency(program.segments, budget, program.needs)
    planner = Planner(program, LeafPrior(package.leaves, package.usage), residency, prefetch=False)
    counts = []
    for leaf in leaves:
        path, route = ancestry(leaf), ["root"]
        planner.known(route)
        for segment in program.steps(route):
            parts = (*program.needs.get(segment, ()), segment)
            for part in parts:
                _load_due(residency)
                residency.acquire(part)
            for part in parts:
                residency.release(part)
            planner.ran(segment, 0.0)
            if program.is_router(segment):
                route.append(path[len(route)])
                planner.known(route)
        planner.ended(leaf)
        counts.append(sum(residency.read().values()))
    return counts


def _load_due(residency: Residency) -> None:
    while (job := residency.due()) is not None:
        residency.arrived(job[0], job[0].bytes)
        residency.ready(job[0], {})
