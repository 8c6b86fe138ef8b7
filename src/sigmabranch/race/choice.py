"""Which candidate is taken, and which need not go on: from what each gets right, sample by sample.

Shapes: N held-out samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt

from torch import Tensor

# Of a normal variable, 95 % lie within so many standard deviations.
Z = 1.959964

#: How the intervals are made.
METHOD = (
    "95 % intervals over the held-out samples: Wilson's of an accuracy, and of a difference the "
    "normal one of paired samples with half a sample added to each cell (Agresti and Min, 2005)"
)
#: How the winner is chosen.
RULE = (
    "of the candidates that the most accurate one leads by an interval that reaches zero, itself "
    "included, the one that is smallest to store"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate in percent, or in points, and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """JSON-able form."""
        return asdict(self)


def accuracy(correct_N: Tensor) -> Interval:
    """The accuracy in percent, with Wilson's interval."""
    samples = len(correct_N)
    share = correct_N.double().mean().item()
    scale = 1 + Z**2 / samples
    centre = (share + Z**2 / (2 * samples)) / scale
    half = Z * sqrt(share * (1 - share) / samples + (Z / (2 * samples)) ** 2) / scale
    return Interval(mean=100 * share, low=100 * (centre - half), high=100 * (centre + half))


def lead(ahead_N: Tensor, behind_N: Tensor) -> Interval:
    """How many points the first is ahead of the second on the same samples.

    Only samples that one of the two gets right count towards the interval, so that it is far
    narrower than that of two accuracies. The half samples keep it open where the two are alike.
    """
    gained = int((ahead_N & ~behind_N).sum())
    lost = int((behind_N & ~ahead_N).sum())
    wins, losses, samples = gained + 0.5, lost + 0.5, len(ahead_N) + 2
    centre = (wins - losses) / samples
    half = Z * sqrt(max(0.0, wins + losses - (wins - losses) ** 2 / samples)) / samples
    return Interval(
        mean=100 * (gained - lost) / len(ahead_N),
        low=100 * (centre - half),
        high=100 * (centre + half),
    )


def leader(correct: Mapping[str, Tensor]) -> str:
    """The candidate that gets the most samples right; of equals the first."""
    return max(correct, key=lambda name: int(correct[name].sum()))


def losers(correct: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, str]:
    """The candidates that are stopped, with the reason.

    They are those that would stay behind even if they gained as much again as in the part that is
    over: the upper end of the accuracy's interval, and that gain, do not reach the lower end of the
    leader's. What has just been cut, or has just begun, gains fast and is therefore left alone.

    Args:
        correct: candidate → (N,) bool after this part.
        before: the same after the part before; who is not in it goes on.
    """
    if not correct:
        return {}
    first = leader(correct)
    least = accuracy(correct[first]).low
    found = {}
    for name in (name for name in correct if name in before):
        now = accuracy(correct[name])
        most = now.high + max(0.0, now.mean - accuracy(before[name]).mean)
        if most < least:
            found[name] = f"{most:.2f} % at most, when {first} already had at least {least:.2f} %"
    return found


def choose(correct: Mapping[str, Tensor], stored: Mapping[str, int]) -> str:
    """The winner by :data:`RULE`.

    Args:
        correct: candidate → (N,) bool, of those whose training is complete; at least one.
        stored: candidate → parameters to store.
    """
    first = leader(correct)
    tied = [
        name for name in correct if name == first or lead(correct[first], correct[name]).low <= 0
    ]
    return min(tied, key=lambda name: (stored[name], -int(correct[name].sum())))
