"""Why a tree has the shape that it has, from the record of a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sigmabranch.conversion import Proposal, SplitScores
from sigmabranch.report.tables import NOTHING, Table, count, minus

_NOTES = (
    "A node splits where two of three criteria accept the same number of parts; among such numbers "
    "the largest silhouette decides. The silhouette must exceed what featureless data reach by "
    "chance, and the likelihood's gain over one part, less the price of its parameters (BIC), must "
    "be positive. The gap says how much more the parts explain than they would of featureless "
    "data, ± its error: it accepts the smallest number that the next does not beat by more.",
    "All scores are those of the dense network's own features, before any cut.",
)


def proposal_table(proposal: Mapping[str, Any]) -> Table:
    """One row per node and number of parts, and above them one per place to cut.

    Args:
        proposal: as a conversion's record holds it.

    Raises:
        ConfigError: it is none.
    """
    parsed = Proposal.from_dict(proposal)
    groups = [
        (f"{_named(key)}, {count(scores.samples)} samples: {scores.reason}", tuple(_rows(scores)))
        for key, scores in parsed.scores.items()
    ]
    if parsed.cuts:
        where = f"Where to cut: all {count(parsed.samples)} samples, split in 2"
        rows = tuple(
            _row(f"before {stage}", scores, 2, taken=stage in (parsed.tree.cuts or ()))
            for stage, scores in parsed.cuts.items()
        )
        groups.insert(0, (where, rows))
    return Table(
        header=("", "silhouette", "by chance", "gap", "BIC gain", "votes", "chosen"),
        groups=tuple(groups),
        notes=_NOTES,
    )


def _named(key: str) -> str:
    return "Trunk" if key == "root" else f"Node {key}"


def _rows(scores: SplitScores) -> Iterator[tuple[str, ...]]:
    for parts in range(2, len(scores.votes) + 1):
        yield _row(f"{parts} parts", scores, parts, taken=parts == scores.chosen)


def _row(name: str, scores: SplitScores, parts: int, *, taken: bool) -> tuple[str, ...]:
    mark = "✓" if taken else ""
    if len(scores.votes) < parts:
        return (name, *[NOTHING] * 5, mark)
    at = parts - 1
    return (
        name,
        _signed(scores.silhouette[at]),
        _signed(scores.silhouette_floor[at]),
        f"{_signed(scores.gap[at])} ± {scores.gap_error[at]:.3f}",
        _signed(scores.bic[at] - scores.bic[0]),
        f"{scores.votes[at]} of 3",
        mark,
    )


def _signed(value: float) -> str:
    return minus(f"{value:.3f}")
