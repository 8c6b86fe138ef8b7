"""Which trees a search may try: its knobs, and where each may stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from typing import Any, TypeAlias

from sigmabranch.errors import ConfigError
from sigmabranch.fields import from_fields, to_fields
from sigmabranch.tasks.task import parsed

#: Where a knob may stand: any of some values, or of a range of whole numbers.
Knob: TypeAlias = tuple[Any, ...] | range
#: Where every knob stands.
Choice: TypeAlias = Mapping[str, Any]

SHAPES = ("balanced", "data")
# Of more stages there are more combinations than a search can tell apart.
_MOST_STAGES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The knobs of a search; one value closes a knob, and None leaves it as the task has it.

    Attributes:
        depth: levels of the tree, from 1 to 3.
        stages: where levels may begin, in any combination; all stages of the network that can be
            cut if None, or six of them evenly spaced.
        shape: ``"balanced"`` is binary and complete, ``"data"`` what
            :func:`~sigmabranch.conversion.propose_tree` finds at the same cuts.
        active: parameters of one path over those of the dense network, the least and the most; in
            steps of 0.01, which are turned into widths.
        trunk_share: of the trunk's inner channels; 1 keeps them all.
        shared_fraction: of a branch's channels, those that all branches share.
        entry: how levels begin, where the network leaves a choice (``tree.entry``).
        early: whether all routers read the trunk's end (``tree.decide_after``). That makes paths
            known sooner, which no objective of a search rewards.
        projection_dim: length of the latent that routers read.
    """

    depth: tuple[int, ...] = (1, 2)
    stages: tuple[str, ...] | None = None
    shape: tuple[str, ...] = SHAPES
    active: tuple[float, float] = (0.2, 0.6)
    trunk_share: tuple[float, ...] = (1.0, 0.75)
    shared_fraction: tuple[float, ...] = (0.25, 0.5, 0.75)
    entry: tuple[str, ...] | None = None
    early: tuple[bool, ...] | None = None
    projection_dim: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            if values is not None and not values:
                raise ConfigError(f"space {name} has no value: give at least one")
            if values is not None and name != "active" and len(set(values)) < len(values):
                raise ConfigError(f"space {name} names a value twice")
        if not all(1 <= depth <= 3 for depth in self.depth):
            raise ConfigError(f"space depth must be from 1 to 3, got {list(self.depth)}")
        unknown = set(self.shape) - set(SHAPES)
        if unknown:
            raise ConfigError(f"unknown space shape {min(unknown)!r}: choose from {SHAPES}")
        low, high = self.active
        if not 0.01 <= low <= high <= 1:
            raise ConfigError(
                f"space active is the least and the most, from 0.01 to 1, got {low}, {high}"
            )
        if not all(0 < share <= 1 for share in self.trunk_share):
            raise ConfigError(f"space trunk_share must lie in (0, 1], got {list(self.trunk_share)}")
        if not all(0 <= share <= 1 for share in self.shared_fraction):
            raise ConfigError(
                f"space shared_fraction must lie in [0, 1], got {list(self.shared_fraction)}"
            )

    @classmethod
    def with_settings(cls, settings: Iterable[str]) -> Space:
        """The default space with ``knob=value,value`` settings applied, e.g. ``depth=1,2``.

        Raises:
            ConfigError: no such knob, or a value that it cannot have.
        """
        values: dict[str, list[Any]] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals:
                raise ConfigError(f"--space takes knob=value,value, got {setting!r}")
            values[name.strip()] = [parsed(part) for part in text.split(",") if part.strip()]
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {name: to_fields(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Space:
        """Inverse of :meth:`to_dict`; unknown knobs raise :class:`ConfigError`."""
        return from_fields(cls, "space", value)

    def cuts(self, stages: Sequence[str]) -> list[tuple[str, ...]]:
        """Every combination of stages at which levels may begin.

        Args:
            stages: of the network, in its order.

        Raises:
            ConfigError: a stage of the space that the network does not have, or too few of them.
        """
        unknown = set(self.stages or ()) - set(stages)
        if unknown:
            raise ConfigError(
                f"the network cannot be cut at {min(unknown)!r}: choose from {', '.join(stages)}"
            )
        some = [stage for stage in stages if self.stages is None or stage in self.stages]
        if len(some) > _MOST_STAGES:
            last = len(some) - 1
            some = [some[round(last * part / (_MOST_STAGES - 1))] for part in range(_MOST_STAGES)]
        found = [*chain.from_iterable(combinations(some, depth) for depth in sorted(self.depth))]
        if not found:
            raise ConfigError(
                f"a tree of depth {min(self.depth)} needs as many stages to cut at, and there are "
                f"{len(some)} ({', '.join(some)}): use a smaller depth"
            )
        return found

    def knobs(self, cuts: Sequence[tuple[str, ...]]) -> dict[str, Knob]:
        """Where each knob may stand, ``active`` in percent and ``cuts`` joined by commas.

        Args:
            cuts: those that are possible.
        """
        low, high = self.active
        knobs: dict[str, Knob] = {
            "cuts": tuple(map(",".join, cuts)),
            "shape": self.shape,
            "active": range(round(100 * low), round(100 * high) + 1),
            "trunk_share": self.trunk_share,
            "shared_fraction": self.shared_fraction,
        }
        for name in ("entry", "early", "projection_dim"):
            if getattr(self, name) is not None:
                knobs[name] = getattr(self, name)
        return knobs
