"""Spherical k-means: the split of the latents that also gives the router its weights.

Shapes: N samples, D latent length, K clusters, R restarts run side by side.

Every partition here is linear in the latent: centring and balancing only move the threshold. So the
argmax of a router with ``weight = centroid`` and ``bias = offset`` *is* the partition (paper,
section III-C, phase 1).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from sigmabranch.errors import ConfigError, ConversionError, NumericError

# With at least twice as many samples as settle, all restarts converge on a regular part of them,
# and only the finalists go on with all: the outcomes of many restarts hardly differ.
SETTLING_SAMPLES = 8192
FINALISTS = 3
# Relative difference below which float32 latents are equal.
SAME = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """A partition of the latents.

    Attributes:
        centroid: (K, D) float64, unit rows: the router's weights.
        offset: (K,) float64: the router's bias; zero unless centred or balanced.
        assignment: (N,) int64, argmax of ``latent @ centroid.T + offset``.
        sizes: samples per cluster.
        objective: mean cosine of a sample with its centroid.
        margin: mean cosine with the own centroid minus that with the best other one.
    """

    centroid: Tensor
    offset: Tensor
    assignment: Tensor
    sizes: tuple[int, ...]
    objective: float
    margin: float


def spherical_kmeans(
    latent_ND: Tensor,
    clusters: int = 2,
    *,
    restarts: int = 10,
    iterations: int = 100,
    centred: bool = False,
    balanced: bool = False,
    seed: int = 0,
) -> Clusters:
    """Partition latents by direction (Dhillon & Modha, 2001), best of several seedings.

    Seeds are drawn as in k-means++ with cosine distance. A cluster that runs empty is re-seeded
    with the sample that fits worst. Many samples (16,384 or more) are first clustered in part, and
    the best three outcomes of that then with all. Arithmetic is float64, so the result depends on
    the seed alone.

    Args:
        latent_ND: (N, D) float, on any device.
        clusters: K.
        restarts: seedings tried side by side; the best objective wins.
        iterations: at most this many rounds on the same samples; a restart ends when no assignment
            changes.
        centred: subtract the mean latent first, so that a common direction cannot hide the split.
        balanced: halve the samples at every round (K = 2 only).
        seed: of the seeding.

    Raises:
        ConversionError: fewer samples, or fewer distinct directions, than clusters.
        NumericError: a latent holds NaN or infinity.
        ConfigError: balanced with K other than 2.
    """
    if balanced and clusters != 2:
        raise ConfigError(f"balanced clusters come in pairs, got {clusters}: turn balancing off")
    if not bool(torch.isfinite(latent_ND).all()):
        raise NumericError("a latent is NaN or infinite: check the dense network and the input")
    rounds = _Rounds(latent_ND, clusters, centred=centred, balanced=balanced)
    if rounds.count < clusters:
        raise ConversionError(
            f"{rounds.count} calibration samples cannot make {clusters} clusters: "
            "calibrate on more data"
        )
    if _alike(latent_ND):
        raise _too_few_directions(rounds.count, clusters)
    generator = torch.Generator().manual_seed(seed)
    stride = rounds.count // SETTLING_SAMPLES
    if stride < 2:
        return rounds.best(rounds.run(rounds.seeded(restarts, generator), iterations))
    part = rounds.thinned(stride)
    settled_RKD = part.run(part.seeded(restarts, generator), iterations)
    return rounds.best(rounds.run(rounds.leading(settled_RKD, FINALISTS), iterations))


def _alike(latent_ND: Tensor) -> bool:
    """Whether all latents are one, but for rounding, which several threads do differently."""
    spread = (latent_ND - latent_ND[:1]).abs().amax()
    return bool(spread <= SAME * latent_ND.abs().amax())


def _too_few_directions(samples: int, clusters: int) -> ConversionError:
    return ConversionError(
        f"the {samples} latents have fewer than {clusters} distinct directions: "
        "calibrate on more varied data"
    )


class _Rounds:
    """Lloyd's iteration for R restarts at once."""

    def __init__(self, latent_ND: Tensor, clusters: int, *, centred: bool, balanced: bool) -> None:
        self.clusters, self.balanced, self.count = clusters, balanced, len(latent_ND)
        latent_ND = latent_ND.double()
        self.mean_D = torch.zeros_like(latent_ND[:1]).sum(0)
        if centred:
            self.mean_D = latent_ND.sum(0) / self.count
        self.latent_ND = latent_ND - self.mean_D
        self.unit_ND = torch.nn.functional.normalize(self.latent_ND, dim=1)

    def thinned(self, stride: int) -> _Rounds:
        """The same for every ``stride``-th sample, with the mean of all."""
        part = copy.copy(self)
        part.latent_ND, part.unit_ND = self.latent_ND[::stride], self.unit_ND[::stride]
        part.count = len(part.latent_ND)
        return part

    def seeded(self, restarts: int, generator: torch.Generator) -> Tensor:
        """k-means++ seeds, (R, K, D): each next one with probability ∝ cosine distance."""
        seeds = []
        for _ in range(restarts):
            chosen = [self._draw(torch.ones_like(self.unit_ND[:, 0]), generator)]
            while len(chosen) < self.clusters:
                cosine_NK = self.unit_ND @ torch.stack(chosen).T
                chosen.append(self._draw((1 - cosine_NK.amax(1)).clamp(min=0), generator))
            seeds.append(torch.stack(chosen))
        return torch.stack(seeds)

    def _draw(self, weight_N: Tensor, generator: torch.Generator) -> Tensor:
        """One sample's direction, drawn by weight."""
        point = torch.rand((), generator=generator, dtype=torch.float64).to(weight_N.device)
        passed_N = weight_N.cumsum(0) <= point * weight_N.sum()
        index = int(passed_N.sum().clamp(max=self.count - 1))
        return self.unit_ND[index].clone()

    def run(self, centroid_RKD: Tensor, iterations: int) -> Tensor:
        """Assign and average in turn; a restart rests once none of its assignments changes.

        The sums are kept and corrected by the samples that moved, which soon are few.
        """
        open_R = torch.arange(len(centroid_RKD))
        sum_RKD, size_RK = torch.zeros_like(centroid_RKD), torch.zeros_like(centroid_RKD[..., 0])
        cluster_RN = torch.full((len(open_R), len(self.unit_ND)), -1, device=sum_RKD.device)
        for _ in range(iterations):
            nearest_RN = self._assign(centroid_RKD[open_R])
            moved_RN = nearest_RN != cluster_RN
            moving_R = moved_RN.any(1).cpu()
            if not bool(moving_R.any()):
                break
            rows_M = moved_RN.any(0).nonzero().flatten()
            change_RKM = self._member(nearest_RN[:, rows_M]) - self._member(cluster_RN[:, rows_M])
            sum_RKD[open_R] += change_RKM @ self.unit_ND[rows_M]
            size_RK[open_R] += change_RKM.sum(-1)
            open_R, cluster_RN = open_R[moving_R], nearest_RN[moving_R]
            centroid_RKD[open_R] = self._average(
                sum_RKD[open_R], size_RK[open_R], centroid_RKD[open_R]
            )
        return centroid_RKD

    def _assign(self, centroid_RKD: Tensor) -> Tensor:
        """Best cluster of every sample under every restart: (R, N) int64."""
        lead_RJN = self._lead(centroid_RKD)
        best_RN, rival_RN = lead_RJN.max(1)
        return (rival_RN + 1) * (best_RN > self._threshold(lead_RJN)[:, None])

    def _lead(self, centroid_RKD: Tensor) -> Tensor:
        """How far each of the J = K − 1 other clusters is ahead of the first: (R, J, N)."""
        rival_RJD = centroid_RKD[:, 1:] - centroid_RKD[:, :1]
        lead_XN = rival_RJD.flatten(0, 1) @ self.latent_ND.T
        return lead_XN.unflatten(0, rival_RJD.shape[:2])

    def _threshold(self, lead_RJN: Tensor) -> Tensor:
        """What a lead must exceed: zero, or the median for halves of equal size; (R,)."""
        if self.balanced:
            return self._median(lead_RJN[:, 0])
        return lead_RJN.new_zeros(len(lead_RJN))

    def _median(self, value_RN: Tensor) -> Tensor:
        """A value with half the samples above it, by bisection: (R,)."""
        high_R = value_RN.abs().amax().expand(len(value_RN))
        low_R, half = -high_R, self.count // 2
        for _ in range(60):
            middle_R = (low_R + high_R) / 2
            above_R = (value_RN > middle_R[:, None]).sum(1)
            low_R = torch.where(above_R >= half, middle_R, low_R)
            high_R = torch.where(above_R <= half, middle_R, high_R)
            if bool((low_R == high_R).all()):
                break
        return high_R

    def _member(self, cluster_RN: Tensor) -> Tensor:
        """One where a sample belongs to a cluster, (R, K, N) float64; cluster −1 is none."""
        number_K1 = torch.arange(self.clusters, device=cluster_RN.device)[:, None]
        return (cluster_RN[:, None] == number_K1).double()

    def _average(self, sum_RKD: Tensor, size_RK: Tensor, old_RKD: Tensor) -> Tensor:
        """Mean directions; an empty cluster takes the sample that fits the old ones worst."""
        centroid_RKD = torch.nn.functional.normalize(sum_RKD, dim=-1)
        for restart, cluster in (size_RK == 0).nonzero().tolist():
            centroid_RKD[restart, cluster] = self._worst_fit(old_RKD[restart])
        return centroid_RKD

    def _worst_fit(self, centroid_KD: Tensor) -> Tensor:
        best_N = (self.unit_ND @ centroid_KD.T).amax(1)
        return self.unit_ND[int(best_N.argmin())].clone()

    def leading(self, centroid_RKD: Tensor, number: int) -> Tensor:
        """The restarts with the largest objectives, best first."""
        _, objective_R = self._fit(centroid_RKD)
        return centroid_RKD[objective_R.argsort(descending=True, stable=True)[:number]]

    def _fit(self, centroid_RKD: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine of every sample with its centroid, (R, N), and the mean over all samples, (R,)."""
        cosine_RKN = centroid_RKD @ self.unit_ND.T
        own_RN = cosine_RKN.gather(1, self._assign(centroid_RKD)[:, None]).squeeze(1)
        return own_RN, own_RN.sum(1) / self.count

    def best(self, centroid_RKD: Tensor) -> Clusters:
        """The restart with the largest objective, as a router."""
        own_RN, objective_R = self._fit(centroid_RKD)
        # Rounding must not choose between equal restarts: devices would disagree.
        winner = int((objective_R > objective_R.max() - 1e-9).nonzero()[0])
        centroid_KD, own_N = centroid_RKD[winner], own_RN[winner]
        bias_K = torch.zeros_like(centroid_KD[:, 0])
        bias_K[0] = self._threshold(self._lead(centroid_KD[None]))
        assignment_N = (self.latent_ND @ centroid_KD.T + bias_K).argmax(1)
        member_KN = self._member(assignment_N[None])[0]
        size_K = member_KN.sum(1).long()
        if int(size_K.min()) == 0:
            raise _too_few_directions(self.count, self.clusters)
        cosine_KN = centroid_KD @ self.unit_ND.T
        other_N = cosine_KN.masked_fill(member_KN.bool(), -torch.inf).amax(0)
        return Clusters(
            centroid=centroid_KD,
            offset=bias_K - centroid_KD @ self.mean_D,
            assignment=assignment_N,
            sizes=tuple(size_K.tolist()),
            objective=float(objective_R[winner]),
            margin=float((own_N - other_N).mean()),
        )
