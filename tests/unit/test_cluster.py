"""Spherical k-means: the router it gives, its quality, its repairs, and its refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sigmabranch.conversion import cluster as module
from sigmabranch.conversion import spherical_kmeans
from sigmabranch.errors import ConfigError, ConversionError, NumericError

KINDS = {
    "plain": {},
    "centred": {"centred": True},
    "balanced": {"balanced": True},
    "centred and balanced": {"centred": True, "balanced": True},
}


def latents(samples: int = 200, length: int = 6, seed: int = 0, common: float = 2.0) -> Tensor:
    """Two uneven bunches of directions around a common one, as pooled features have it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, length, generator=generator)
    noise[: samples // 3, 0] += 3
    return noise + common


def objective(latent_ND: Tensor, assignment_N: Tensor, clusters: int) -> float:
    """Mean cosine with the best possible centroids of a partition."""
    unit_ND = torch.nn.functional.normalize(latent_ND.double(), dim=1)
    sums = [unit_ND[assignment_N == k].sum(0).norm() for k in range(clusters)]
    return float(sum(sums) / len(latent_ND))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
@settings(max_examples=25, deadline=None)
@given(st.integers(4, 120), st.integers(2, 9), st.integers(0, 2**16), st.sampled_from([0.0, 4.0]))
def test_the_router_is_the_partition(options, samples, length, seed, common):
    latent_ND = latents(samples, length, seed, common)
    found = spherical_kmeans(latent_ND, restarts=3, seed=seed, **options)
    logit_NK = latent_ND.double() @ found.centroid.T + found.offset
    clear = (logit_NK[:, 0] - logit_NK[:, 1]).abs() > 1e-9
    assert torch.equal(logit_NK.argmax(1)[clear], found.assignment[clear])
    assert int((~clear).sum()) <= 1  # balancing puts the threshold on one sample
    assert torch.allclose(found.centroid.norm(dim=1), torch.ones(2, dtype=torch.float64))
    assert list(found.sizes) == found.assignment.bincount(minlength=2).tolist()
    if not options:
        assert not found.offset.any()


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_the_float32_router_routes_every_sample_to_its_cluster(options):
    latent_ND = latents(501)
    found = spherical_kmeans(latent_ND, **options)
    gate = torch.nn.Linear(6, 2)
    with torch.no_grad():
        gate.weight.copy_(found.centroid)
        gate.bias.copy_(found.offset)
        assert torch.equal(gate(latent_ND).argmax(1), found.assignment)


def test_the_figures_are_what_they_say():
    latent_ND = latents()
    found = spherical_kmeans(latent_ND)
    cosine_NK = torch.nn.functional.normalize(latent_ND.double(), dim=1) @ found.centroid.T
    own = cosine_NK.gather(1, found.assignment[:, None])
    other = cosine_NK.gather(1, 1 - found.assignment[:, None])
    assert found.objective == pytest.approx(float(own.mean()))
    assert found.margin == pytest.approx(float((own - other).mean()))
    assert found.objective == pytest.approx(objective(latent_ND, found.assignment, 2))


@pytest.mark.parametrize("samples", [200, 201])
@pytest.mark.parametrize("centred", [False, True])
def test_balanced_clusters_are_halves(samples, centred):
    found = spherical_kmeans(latents(samples), balanced=True, centred=centred)
    assert abs(found.sizes[0] - found.sizes[1]) <= 1
    assert sum(found.sizes) == samples


def test_centring_finds_the_split_that_a_common_direction_hides():
    latent_ND = latents(300, common=0.0)
    truth = torch.arange(300) < 100
    hidden = latent_ND + 30
    found = spherical_kmeans(hidden, centred=True).assignment.bool()
    agreement = (found == truth).float().mean()
    assert max(float(agreement), 1 - float(agreement)) > 0.85


@pytest.mark.parametrize(("clusters", "slack"), [(2, 1e-9), (5, 5e-3)])
@pytest.mark.parametrize("seed", range(3))
def test_the_objective_is_no_worse_than_scikit_learns(clusters, slack, seed):
    sklearn = pytest.importorskip("sklearn.cluster")
    latent_ND = latents(400, 8, seed, common=0.5)
    ours = spherical_kmeans(latent_ND, clusters, seed=seed).assignment
    unit = torch.nn.functional.normalize(latent_ND, dim=1).numpy()
    theirs = sklearn.KMeans(clusters, n_init=10, random_state=seed).fit(unit).labels_
    theirs = torch.from_numpy(theirs).long()
    best = objective(latent_ND, theirs, clusters)
    assert objective(latent_ND, ours, clusters) >= best - slack


def test_no_single_move_improves_a_converged_partition():
    """Lloyd's fixed point: every sample is with the nearest of the partition's mean directions."""
    latent_ND = latents()
    found = spherical_kmeans(latent_ND)
    unit_ND = torch.nn.functional.normalize(latent_ND.double(), dim=1)
    mean_KD = torch.stack([unit_ND[found.assignment == k].sum(0) for k in (0, 1)])
    mean_KD = torch.nn.functional.normalize(mean_KD, dim=1)
    assert torch.allclose(mean_KD, found.centroid)
    assert torch.equal((unit_ND @ mean_KD.T).argmax(1), found.assignment)


def test_an_empty_cluster_is_refilled_with_the_sample_that_fits_worst(monkeypatch):
    latent_ND = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    east = torch.tensor([1.0, 0.0], dtype=torch.float64)
    nobody_goes_west = torch.stack([east, -east])[None]
    monkeypatch.setattr(module._Rounds, "seeded", lambda *_: nobody_goes_west.clone())
    assert spherical_kmeans(latent_ND, restarts=1).assignment.tolist() == [0, 0, 0, 1]


def test_lone_outliers_get_clusters_of_their_own():
    latent_ND = torch.cat([torch.tensor([[1.0, 0, 0]]).repeat(50, 1), torch.eye(3)[1:]])
    found = spherical_kmeans(latent_ND, 3, restarts=1)
    assert sorted(found.sizes) == [1, 1, 50]


def test_the_result_depends_on_the_seed_alone():
    latent_ND = latents()
    first, again = (spherical_kmeans(latent_ND, 4, restarts=1, seed=3) for _ in range(2))
    assert torch.equal(first.centroid, again.centroid)
    torch.manual_seed(99)
    assert torch.equal(first.centroid, spherical_kmeans(latent_ND, 4, restarts=1, seed=3).centroid)
    others = [spherical_kmeans(latent_ND, 4, restarts=1, seed=seed).centroid for seed in range(4)]
    assert any(not torch.equal(first.centroid, other) for other in others)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    spherical_kmeans(latents())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_many_samples_settle_on_a_part_without_losing_quality(monkeypatch, options):
    latent_ND = latents(600)
    whole = spherical_kmeans(latent_ND, seed=1, **options)
    monkeypatch.setattr(module, "SETTLING_SAMPLES", 100)
    thinned = spherical_kmeans(latent_ND, seed=1, **options)
    assert thinned.objective == pytest.approx(whole.objective, abs=1e-3)
    assert list(thinned.sizes) == thinned.assignment.bincount(minlength=2).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_no_number_is_refused(value):
    latent_ND = latents()
    latent_ND[7, 2] = value
    with pytest.raises(NumericError, match="NaN or infinite"):
        spherical_kmeans(latent_ND)


@pytest.mark.parametrize("samples", [0, 1])
def test_fewer_samples_than_clusters_are_refused(samples):
    with pytest.raises(ConversionError, match=f"{samples} calibration samples.*more data"):
        spherical_kmeans(latents()[:samples])


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("samples", [2, 33])
def test_identical_samples_are_refused(options, samples):
    with pytest.raises(ConversionError, match="distinct directions"):
        spherical_kmeans(latents()[:1].repeat(samples, 1), **options)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_samples_that_only_rounding_tells_apart_are_refused(options):
    """Several threads round equal inputs differently; that is no reason to split them."""
    noise = 1 + 1e-7 * torch.randn(33, 1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConversionError, match="distinct directions"):
        spherical_kmeans(latents()[:1] * noise, **options)


def test_latents_of_one_direction_are_refused():
    ray = torch.arange(1.0, 9.0)[:, None] * torch.tensor([[1.0, 2.0, 2.0]])
    with pytest.raises(ConversionError, match="distinct directions"):
        spherical_kmeans(ray)


def test_balancing_more_than_two_clusters_is_refused():
    with pytest.raises(ConfigError, match="pairs"):
        spherical_kmeans(latents(), 3, balanced=True)
