"""Into how many parts one node's latents fall: the scores that give a tree its shape.

Shapes: N samples, D latent length, K parts.

Parts are those of spherical k-means. Three criteria judge them, each with its own question:

- the silhouette with the cosine distance (Rousseeuw, 1987): are samples nearer to their own part
  than to the next? It accepts any K whose mean is more than featureless data reach by chance.
- the gap statistic (Tibshirani, Walther & Hastie, 2001): do K parts explain more than they would
  of featureless data? It accepts the smallest K with gap(K) ≥ gap(K + 1) − s(K + 1).
- the Bayesian information criterion of X-means (Pelleg & Moore, 2000): are K parts worth their
  parameters? It accepts any K that is better than one part.

Featureless data are drawn uniformly from the box along the latents' principal axes. A node splits
where two of the three accept the same K; among such K, the largest silhouette decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sigmabranch.conversion.cluster import spherical_kmeans
from sigmabranch.errors import ConfigError, ConversionError
from sigmabranch.fields import from_fields, to_fields

# More samples sharpen the scores little, and take time.
_SCORED = 2000
_DRAWS, _RESTARTS = 10, 4
_VOTES = 2  # of three


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitScores:
    """What speaks for splitting a node's samples; the tuples are for 1, 2, … parts.

    Attributes:
        samples: that came to the node.
        silhouette: mean over the samples; 0 for one part.
        silhouette_floor: what featureless data reach by chance.
        gap, gap_error: the gap statistic, and s of its standard-error rule.
        bic: per sample; the larger, the better.
        votes: how many of the criteria accept so many parts; 0 for one.
        chosen: parts to split into; 1 makes a leaf.
        reason: in words.
    """

    samples: int
    silhouette: tuple[float, ...] = ()
    silhouette_floor: tuple[float, ...] = ()
    gap: tuple[float, ...] = ()
    gap_error: tuple[float, ...] = ()
    bic: tuple[float, ...] = ()
    votes: tuple[int, ...] = ()
    chosen: int = 1
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {name: to_fields(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SplitScores:
        """Inverse of :meth:`to_dict`; unknown keys raise :class:`ConfigError`."""
        return from_fields(cls, "split's scores", value)


class _Parts(NamedTuple):
    """One clustering, judged."""

    log_dispersion: float
    silhouette: float
    bic: float


def split_scores(
    latent_ND: Tensor,
    *,
    most: int = 4,
    min_samples: int = 256,
    centred: bool = False,
    seed: int = 0,
) -> SplitScores:
    """Judge whether samples fall into parts, and into how many.

    Args:
        latent_ND: (N, D) float, on any device; at most 2000 rows are looked at, drawn by the seed.
        most: parts that are tried at most.
        min_samples: fewer are not split.
        centred: subtract the mean latent first, as the conversion's option of that name does.
        seed: of whatever is drawn.

    Raises:
        ConfigError: less than two parts, or samples than parts, are allowed.
        NumericError: a latent holds NaN or infinity.
    """
    if not 2 <= most <= min_samples:
        raise ConfigError(
            f"a split needs at least 2 parts and as many samples, got at most {most} parts of "
            f"{min_samples} samples: choose more"
        )
    samples = len(latent_ND)
    if samples < min_samples:
        return SplitScores(samples=samples, reason=f"stop: fewer than {min_samples} samples")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(samples, generator=generator)[:_SCORED].to(latent_ND.device)
    latent_ND = latent_ND[rows].double()
    if centred:
        latent_ND = latent_ND - latent_ND.mean(0)
    found = _judged(latent_ND, most, seed)
    if len(found) == 1:
        return SplitScores(samples=samples, reason="stop: all samples are alike")
    box = _Box(latent_ND)
    draws = [_judged(box.draw(len(latent_ND), generator), len(found), seed) for _ in range(_DRAWS)]
    return _voted(samples, found, draws)


def silhouette(unit_ND: Tensor, assignment_N: Tensor, parts: int) -> float:
    """The mean silhouette with the cosine distance, exact and yet in O(N · K · D).

    The mean distance of x from the samples of a part is 1 − x · (their mean), because the cosine
    distance is linear. A sample alone in its part counts 0.

    Args:
        unit_ND: unit rows.
        assignment_N: part of each row.
        parts: at least two, none of them empty.
    """
    mean_KD, size_K = _means(unit_ND, assignment_N, parts)
    away_NK = 1 - unit_ND @ mean_KD.T
    is_own_NK = F.one_hot(assignment_N, parts).bool()
    size_N = size_K[assignment_N]
    # Its distance from itself is 0, and not one of those to be averaged.
    own_N = away_NK[is_own_NK] * size_N / (size_N - 1).clamp(min=1)
    next_N = away_NK.masked_fill(is_own_NK, torch.inf).amin(1)
    score_N = (next_N - own_N) / torch.maximum(own_N, next_N).clamp(min=1e-12)
    return float(score_N.masked_fill(size_N == 1, 0.0).mean())


def bic(unit_ND: Tensor, assignment_N: Tensor, parts: int) -> float:
    """The Bayesian information criterion of X-means, per sample: the larger, the better.

    All parts are spherical Gaussians of one variance σ² = Σ|x − mean|² / (D · (N − K)), here per
    coordinate. The log likelihood is Σ_k n_k · ln(n_k / N) − N · D/2 · ln(2πσ²) − D · (N − K)/2; of
    it, each of the (K − 1) + K · D + 1 parameters costs ln(N)/2.

    Args:
        unit_ND, assignment_N, parts: as for :func:`silhouette`, but one part may do.
    """
    mean_KD, size_K = _means(unit_ND, assignment_N, parts)
    count, length = unit_ND.shape
    squares = float((unit_ND - mean_KD[assignment_N]).square().sum())
    variance = max(squares / (length * max(count - parts, 1)), 1e-12)
    likelihood = float((size_K * (size_K / count).log()).sum())
    likelihood -= 0.5 * length * (count * math.log(2 * math.pi * variance) + count - parts)
    parameters = parts + parts * length
    return (likelihood - 0.5 * parameters * math.log(count)) / count


def _means(unit_ND: Tensor, assignment_N: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Mean (K, D) and size (K,) of each part."""
    member_NK = F.one_hot(assignment_N, parts).to(unit_ND)
    size_K = member_NK.sum(0)
    return member_NK.T @ unit_ND / size_K[:, None], size_K


def _judged(latent_ND: Tensor, most: int, seed: int) -> list[_Parts]:
    """One part, two, …, as long as there are so many directions."""
    unit_ND = F.normalize(latent_ND, dim=1)
    whole_N = torch.zeros(len(unit_ND), dtype=torch.int64, device=unit_ND.device)
    agreeing = float(unit_ND.mean(0).norm())
    judged = [_Parts(_log(1 - agreeing), 0.0, bic(unit_ND, whole_N, 1))]
    for parts in range(2, most + 1):
        try:
            clusters = spherical_kmeans(latent_ND, parts, restarts=_RESTARTS, seed=seed)
        except ConversionError:
            break
        own = (unit_ND, clusters.assignment, parts)
        judged.append(_Parts(_log(1 - clusters.objective), silhouette(*own), bic(*own)))
    return judged


def _log(dispersion: float) -> float:
    return math.log(max(dispersion, 1e-12))


class _Box:
    """The box along the principal axes that holds all samples."""

    def __init__(self, latent_ND: Tensor) -> None:
        self._mean_D = latent_ND.mean(0)
        centred_ND = latent_ND - self._mean_D
        _, self._axes_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)
        along_ND = centred_ND @ self._axes_DD
        self._low_D, self._high_D = along_ND.amin(0), along_ND.amax(0)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """(samples, D) float64, uniform in the box."""
        shape = samples, len(self._mean_D)
        share_ND = torch.rand(shape, generator=generator, dtype=torch.float64).to(self._mean_D)
        along_ND = self._low_D + share_ND * (self._high_D - self._low_D)
        return self._mean_D + along_ND @ self._axes_DD.T


def _voted(samples: int, found: Sequence[_Parts], draws: Sequence[Sequence[_Parts]]) -> SplitScores:
    """The three criteria's votes, and what they come to."""
    by_parts = list(zip(*draws, strict=False))  # as many parts as all of them have
    found = found[: len(by_parts)]
    spread = math.sqrt(1 + 1 / len(draws))
    drawn = [_mean_and_deviation([draw.log_dispersion for draw in one]) for one in by_parts]
    gap = tuple(mean - own.log_dispersion for (mean, _), own in zip(drawn, found, strict=True))
    error = tuple(deviation * spread for _, deviation in drawn)
    drawn = [_mean_and_deviation([draw.silhouette for draw in one]) for one in by_parts]
    floor = tuple(mean + 2 * deviation * spread for mean, deviation in drawn)
    sufficient = _smallest_sufficient(gap, error)
    accepts = [
        (own.silhouette > least, parts == sufficient, own.bic > found[0].bic)
        for parts, (own, least) in enumerate(zip(found, floor, strict=True), start=1)
    ]
    votes = (0, *(sum(said) for said in accepts[1:]))
    elected = [parts for parts, count in enumerate(votes, start=1) if count >= _VOTES]
    chosen = max(elected, key=lambda parts: found[parts - 1].silhouette, default=1)
    return SplitScores(
        samples=samples,
        silhouette=tuple(own.silhouette for own in found),
        silhouette_floor=floor,
        gap=gap,
        gap_error=error,
        bic=tuple(own.bic for own in found),
        votes=votes,
        chosen=chosen,
        reason=_reason(chosen, elected, votes),
    )


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _smallest_sufficient(gap: Sequence[float], error: Sequence[float]) -> int:
    """The smallest K with gap(K) ≥ gap(K + 1) − s(K + 1); the largest if no smaller one has it."""
    for parts in range(1, len(gap)):
        if gap[parts - 1] >= gap[parts] - error[parts]:
            return parts
    return len(gap)


def _reason(chosen: int, elected: Sequence[int], votes: Sequence[int]) -> str:
    if not elected:
        return "stop: no number of parts has two of the three criteria for it"
    others = ", ".join(str(parts) for parts in elected if parts != chosen)
    told = f"split in {chosen}: {votes[chosen - 1]} of 3 criteria"
    return f"{told}, and a larger silhouette than {others}" if others else told
