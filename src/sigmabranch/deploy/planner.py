"""What to load while an input is on its way: first what is certain, then what is likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sigmabranch.deploy.prior import Prior
from sigmabranch.deploy.program import Program
from sigmabranch.deploy.residency import Residency
from sigmabranch.deploy.segment import Segment
from sigmabranch.deploy.speculation import likely_nodes


class Planner:
    """Tells a :class:`Residency` what each input needs, and learns where inputs go.

    Args:
        program: the order of the segments.
        prior: where inputs went so far.
        residency: is told.
        prefetch: guess branches before their routers have decided.

    Attributes:
        bytes_per_second: of the storage, as last measured; None until it was.
    """

    def __init__(
        self, program: Program, prior: Prior, residency: Residency, *, prefetch: bool
    ) -> None:
        self.bytes_per_second: float | None = None
        self._program, self._prior, self._residency = program, prior, residency
        self._prefetch = prefetch
        self._seconds: dict[Segment, float] = {}
        self._done: set[Segment] = set()

    def known(self, route: Sequence[str]) -> None:
        """The current input passes the nodes of ``route``, root first, and maybe others below."""
        certain = [s for s in self._program.reads(tuple(route)) if s not in self._done]
        now = self._program.likely(self._prior.nodes(given=route[-1]))
        likely = self._likely(route[-1], certain, now) if self._prefetch else []
        self._residency.want(
            certain,
            likely,
            likely_probability=now,
            next_probability=self._program.likely(self._prior.following(route[-1])),
        )

    def ran(self, segment: Segment, seconds: float) -> None:
        """A segment was computed in so many seconds."""
        self._done.update((segment, *self._program.needs.get(segment, ())))
        self._seconds[segment] = seconds

    def ended(self, leaf: str | None) -> None:
        """The input has left by ``leaf``, or failed (None): nothing is wanted until the next."""
        self._done.clear()
        if leaf is not None:
            self._prior.saw(leaf)
        nodes = self._program.likely(self._prior.nodes())
        self._residency.want((), (), likely_probability={}, next_probability=nodes)

    def _likely(
        self, node: str, certain: Sequence[Segment], probability: Mapping[str, float]
    ) -> list[Segment]:
        computing = sum(self._seconds.get(segment, 0.0) for segment in certain)
        nodes = likely_nodes(
            self._program.below(node),
            probability,
            computing - self._load_seconds(certain),
            lambda node: self._load_seconds(self._program.of(node)),
        )
        return [
            part
            for node in nodes
            for segment in self._program.of(node)
            for part in (*self._program.needs.get(segment, ()), segment)
        ]

    def _load_seconds(self, segments: Sequence[Segment]) -> float:
        rate = self.bytes_per_second
        return self._residency.missing(segments) / rate if rate else 0.0
