"""A comparison as the report sees it: one :class:`Entry` per row, averaged over the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sigmabranch.tasks import Spread

BRANCHED = "sigma-branch"
FULL_BITS = 32.0


class Range(NamedTuple):
    """Mean and largest value over the inputs; over seeds, the mean of means and the largest."""

    mean: float
    max: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One row: a system over its seeds.

    Attributes:
        name: of the row.
        group: that it belongs to, "" if there are none.
        system: name and settings; empty for the source network.
        epochs: passes over the training set behind it.
        footnotes: how it departs from the others, one text each.
        stored: parameters.
        active, macs, read: parameters, multiply-adds and bytes of weights per input.
        bits: per stored weight.
        top1_by_seed: seed → percent.
        held_out: top-1 on samples held out of training, in percent, if there are any.
        gain, balance: of the routing, where there is any.
        latency: time of one input over the source network's, if measured.
        ceiling: whether it needs the true label.
        recipe: of its last training; None without one.
        routing: first seed's ``class_leaf_share`` and what goes with it, if any.
    """

    name: str
    group: str = ""
    system: Mapping[str, Any]
    epochs: int
    footnotes: tuple[str, ...] = ()
    stored: float
    active: Range
    macs: Range
    read: Range
    bits: float = FULL_BITS
    top1_by_seed: Mapping[int, float]
    held_out: Spread | None = None
    gain: Spread | None = None
    balance: Spread | None = None
    latency: float | None = None
    ceiling: bool = False
    recipe: Mapping[str, Any] | None = None
    routing: Mapping[str, Any] | None = None

    @property
    def top1(self) -> Spread:
        """Over the seeds, in percent."""
        return Spread.of(list(self.top1_by_seed.values()))

    def change_from(self, other: Entry) -> Spread | None:
        """Change of top-1 in points over the seeds that both have; None if there is none."""
        both = sorted(self.top1_by_seed.keys() & other.top1_by_seed.keys())
        if not both:
            return None
        return Spread.of([self.top1_by_seed[seed] - other.top1_by_seed[seed] for seed in both])

    @property
    def quantized(self) -> bool:
        """Whether a stored weight takes less than a float32."""
        return self.bits < FULL_BITS

    @property
    def changes(self) -> tuple[str, ...] | None:
        """Settings of the branched network that it changes; None for any other system."""
        if self.system.get("name") != BRANCHED:
            return None
        own = {name: value for name, value in self.system.items() if name != "name"}
        texts = own.pop("settings")
        unset = [name for name, value in own.items() if value is None or value is False]
        return (*texts, *(f"{name}={own[name]}" for name in own if name not in unset))


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """All rows of a comparison that are there.

    Attributes:
        task: its name.
        reference: the source network.
        entries: group by group, the most accurate first.
        evaluation: of the source network.
        convention: of all counts.
        missing: rows that nothing is known of, because they were not made yet.
        failed: row, seed and reason, one line each.
        skipped: row and why the task cannot have it, one line each.
        provenance: of the call that wrote it.
    """

    task: str
    reference: Entry
    entries: tuple[Entry, ...]
    evaluation: Mapping[str, Any]
    convention: str
    missing: tuple[str, ...]
    failed: tuple[str, ...]
    skipped: tuple[str, ...]
    provenance: Mapping[str, Any]

    @property
    def groups(self) -> dict[str, list[Entry]]:
        """Group → its rows."""
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault(entry.group, []).append(entry)
        return groups

    @property
    def seeds(self) -> list[int]:
        """Every seed that any row has."""
        return sorted({seed for entry in self.entries for seed in entry.top1_by_seed})

    @property
    def branched(self) -> Entry | None:
        """The branched network with no setting changed."""
        return next((entry for entry in self.entries if entry.changes == ()), None)

    @property
    def ablations(self) -> list[Entry]:
        """The branched network with settings changed."""
        return [entry for entry in self.entries if entry.changes]
