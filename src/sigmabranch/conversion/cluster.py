"""Spherical k-means: the split of the latents that also gives the router its weights.

Shapes: N samples (of this process), D latent length, K clusters, R restarts run side by side.

Every partition here is linear in the latent: centring and balancing only move the threshold. So the
argmax of a router with ``weight = centroid`` and ``bias = offset`` *is* the partition (paper,
section III-C, phase 1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sigmabranch.errors import ConfigError, ConversionError, NumericError

# Restarts first settle on about so many samples, evenly spaced: most of them turn out to be the
# same partition, and the others have little left to do on all samples.
SETTLING_SAMPLES = 8192


@dataclass(frozen=True, slots=True)
class Shards:
    """How the samples are spread over processes; the default is one process with all of them.

    Attributes:
        rank: this process.
        world: number of processes.
        sum: adds a tensor over all processes.
    """

    rank: int = 0
    world: int = 1
    sum: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """A partition of the latents.

    Attributes:
        centroid: (K, D) float64, unit rows: the router's weights.
        offset: (K,) float64: the router's bias; zero unless centred or balanced.
        assignment: (N,) int64, argmax of ``latent @ centroid.T + offset``.
        sizes: samples per cluster, over all processes.
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
    shards: Shards = Shards(),
) -> Clusters:
    """Partition latents by direction (Dhillon & Modha, 2001), best of several seedings.

    Seeds are drawn as in k-means++ with cosine distance. A cluster that runs empty is re-seeded
    with the sample that fits worst. From 16,384 samples on, the restarts first settle on a part of
    them, and each distinct outcome goes on with all. Arithmetic is float64, so the result depends
    on the samples and the seed alone.

    Args:
        latent_ND: (N, D) float, on any device; this process's samples.
        clusters: K.
        restarts: seedings tried side by side; the best objective wins.
        iterations: at most this many rounds over all samples; it stops when no assignment changes.
        centred: subtract the mean latent first, so that a common direction cannot hide the split.
        balanced: halve the samples at every round (K = 2 only).
        seed: of the seeding.
        shards: where the other samples are.

    Raises:
        ConversionError: fewer samples, or fewer distinct directions, than clusters.
        NumericError: a latent holds NaN or infinity.
        ConfigError: balanced with K other than 2.
    """
    if balanced and clusters != 2:
        raise ConfigError(f"balanced clusters come in pairs, got {clusters}: turn balancing off")
    count = int(shards.sum(torch.tensor(len(latent_ND), device=latent_ND.device)))
    if count < clusters:
        raise ConversionError(
            f"{count} calibration samples cannot make {clusters} clusters: calibrate on more data"
        )
    if not bool(torch.isfinite(latent_ND).all()):
        raise NumericError("a latent is NaN or infinite: check the dense network and the input")
    rounds = _Rounds(latent_ND, clusters, centred=centred, balanced=balanced, shards=shards)
    generator = torch.Generator().manual_seed(seed)
    stride = count // SETTLING_SAMPLES
    if stride < 2:
        centroid_RKD = rounds.seeded(restarts, generator)
    else:
        part = rounds.thinned(stride)
        centroid_RKD = part.distinct(part.run(part.seeded(restarts, generator), iterations))
    return rounds.best(rounds.run(centroid_RKD, iterations))


class _Rounds:
    """Lloyd's iteration for R restarts at once."""

    def __init__(
        self, latent_ND: Tensor, clusters: int, *, centred: bool, balanced: bool, shards: Shards
    ) -> None:
        self.clusters, self.balanced, self.shards = clusters, balanced, shards
        latent_ND = latent_ND.double()
        self.mean_D = torch.zeros_like(latent_ND[:1]).sum(0)
        if centred:
            total = shards.sum(torch.tensor(len(latent_ND), device=latent_ND.device))
            self.mean_D = shards.sum(latent_ND.sum(0)) / total
        self.latent_ND = latent_ND - self.mean_D
        self.unit_ND = torch.nn.functional.normalize(self.latent_ND, dim=1)

    @property
    def count(self) -> int:
        """Samples of all processes."""
        return int(self.shards.sum(torch.tensor(len(self.unit_ND), device=self.unit_ND.device)))

    def thinned(self, stride: int) -> _Rounds:
        """The same for every ``stride``-th sample, about the same mean."""
        part = copy.copy(self)
        part.latent_ND, part.unit_ND = self.latent_ND[::stride], self.unit_ND[::stride]
        return part

    def run(self, centroid_RKD: Tensor, iterations: int) -> Tensor:
        """Assign and update in turn; a restart rests once none of its assignments changes."""
        centroid_RKD = centroid_RKD.clone()
        open_R = torch.arange(len(centroid_RKD))
        previous_NR = torch.full_like(self.unit_ND[:, :1], -1, dtype=torch.int64)
        for _ in range(iterations):
            assignment_NR = self.assign(centroid_RKD[open_R])
            changed_R = self.shards.sum((assignment_NR != previous_NR).sum(0)).cpu() > 0
            open_R, previous_NR = open_R[changed_R], assignment_NR[:, changed_R]
            if not len(open_R):
                break
            centroid_RKD[open_R] = self.update(previous_NR, centroid_RKD[open_R])
        return centroid_RKD

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
        """One sample's direction, drawn by weight over the samples of all processes."""
        total_W = self._by_rank(weight_N.sum())
        point = torch.rand((), generator=generator, dtype=torch.float64).to(total_W.device)
        point = point * total_W.sum()
        edges_W = total_W.cumsum(0)
        owner = int((edges_W <= point).sum().clamp(max=self.shards.world - 1))
        local = point - edges_W[owner] + total_W[owner]
        index = int((weight_N.cumsum(0) <= local).sum().clamp(max=max(len(weight_N) - 1, 0)))
        return self._from_owner(owner, index)

    def _by_rank(self, value: Tensor) -> Tensor:
        """A scalar of each process, side by side: (W,)."""
        slots_W = value.new_zeros(self.shards.world)
        slots_W[self.shards.rank] = value
        return self.shards.sum(slots_W)

    def _from_owner(self, owner: int, index: int) -> Tensor:
        if owner == self.shards.rank:
            return self.shards.sum(self.unit_ND[index].clone())
        return self.shards.sum(torch.zeros_like(self.mean_D))

    def assign(self, centroid_RKD: Tensor) -> Tensor:
        """Best cluster of every sample under every restart: (N, R) int64."""
        logit_NRK = torch.einsum("nd,rkd->nrk", self.latent_ND, centroid_RKD)
        return (logit_NRK + self._threshold(logit_NRK)).argmax(-1)

    def _threshold(self, logit_NRK: Tensor) -> Tensor:
        """(R, K) added to the logits: what makes both halves equally large, or zero."""
        offset_RK = logit_NRK.new_zeros(logit_NRK.shape[1:])
        if self.balanced:
            offset_RK[:, 0] = self._median(logit_NRK[..., 1] - logit_NRK[..., 0])
        return offset_RK

    def _median(self, value_NR: Tensor) -> Tensor:
        """Median over the samples of all processes, by bisection on counts: (R,)."""
        count = self.shards.sum(torch.tensor(len(value_NR), device=value_NR.device))
        bound = self._by_rank(value_NR.abs().amax() if len(value_NR) else self.mean_D.sum()).amax()
        low_R = value_NR.new_zeros(value_NR.shape[1]) - bound
        high_R = -low_R
        for _ in range(60):
            middle_R = (low_R + high_R) / 2
            above_R = self.shards.sum((value_NR > middle_R).sum(0))
            low_R = torch.where(2 * above_R > count, middle_R, low_R)
            high_R = torch.where(2 * above_R > count, high_R, middle_R)
        return high_R

    def update(self, assignment_NR: Tensor, centroid_RKD: Tensor) -> Tensor:
        """Mean directions of the assigned samples; empty clusters take the worst-fit sample."""
        one_hot_NRK = torch.nn.functional.one_hot(assignment_NR, self.clusters).double()
        sums_RKD = self.shards.sum(torch.einsum("nrk,nd->rkd", one_hot_NRK, self.unit_ND))
        sizes_RK = self.shards.sum(one_hot_NRK.sum(0))
        updated_RKD = torch.nn.functional.normalize(sums_RKD, dim=-1)
        for restart, cluster in (sizes_RK == 0).nonzero().tolist():
            updated_RKD[restart, cluster] = self._worst_fit(centroid_RKD[restart])
        return updated_RKD

    def _worst_fit(self, centroid_KD: Tensor) -> Tensor:
        best_N = (self.unit_ND @ centroid_KD.T).amax(1)
        worst = best_N.min() if len(best_N) else best_N.new_tensor(torch.inf)
        owner = int(self._by_rank(worst).argmin())
        return self._from_owner(owner, int(best_N.argmin()) if len(best_N) else 0)

    def distinct(self, centroid_RKD: Tensor) -> Tensor:
        """One restart of each outcome; the same objective to nine digits is the same partition."""
        objective_R = self._objective(self._own_cosine(centroid_RKD))
        restart_of = {value: r for r, value in enumerate(objective_R.round(decimals=9).tolist())}
        return centroid_RKD[list(restart_of.values())]

    def _own_cosine(self, centroid_RKD: Tensor) -> Tensor:
        """Cosine of every sample with its centroid under every restart: (N, R)."""
        cosine_NRK = torch.einsum("nd,rkd->nrk", self.unit_ND, centroid_RKD)
        return cosine_NRK.gather(2, self.assign(centroid_RKD)[..., None]).squeeze(-1)

    def _objective(self, own_NR: Tensor) -> Tensor:
        return self.shards.sum(own_NR.sum(0)) / self.count

    def best(self, centroid_RKD: Tensor) -> Clusters:
        """The restart with the largest objective, as a router."""
        own_NR = self._own_cosine(centroid_RKD)
        objective_R = self._objective(own_NR)
        winner = int(objective_R.argmax())
        centroid_KD = centroid_RKD[winner]
        logit_N1K = torch.einsum("nd,rkd->nrk", self.latent_ND, centroid_KD[None])
        threshold_1K = self._threshold(logit_N1K)
        assignment_N = (logit_N1K + threshold_1K).argmax(-1).squeeze(1)
        one_hot_NK = torch.nn.functional.one_hot(assignment_N, self.clusters)
        sizes_K = self.shards.sum(one_hot_NK.sum(0))
        if int(sizes_K.min()) == 0:
            raise ConversionError(
                f"the {self.count} latents have fewer than {self.clusters} distinct directions: "
                "calibrate on more varied data"
            )
        cosine_NK = self.unit_ND @ centroid_KD.T
        other_N = cosine_NK.masked_fill(one_hot_NK.bool(), -torch.inf).amax(1)
        margin = self.shards.sum((own_NR[:, winner] - other_N).sum()) / self.count
        return Clusters(
            centroid=centroid_KD,
            offset=threshold_1K[0] - centroid_KD @ self.mean_D,
            assignment=assignment_N,
            sizes=tuple(sizes_K.tolist()),
            objective=float(objective_R[winner]),
            margin=float(margin),
        )
