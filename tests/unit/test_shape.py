"""Into how many parts latents fall: what is built in is found, and nothing else."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sigmabranch.conversion import SplitScores, spherical_kmeans, split_scores
from sigmabranch.conversion.shape import bic, silhouette
from sigmabranch.errors import ConfigError, NumericError

LENGTH = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def around(directions: int, samples: int = 400, noise: float = 0.5, seed: int = 0) -> Tensor:
    """Samples around so many directions at right angles."""
    random = generator(seed)
    axis_DD = torch.linalg.qr(torch.randn(LENGTH, LENGTH, generator=random))[0]
    which = torch.arange(samples) % directions
    scatter = torch.randn(samples, LENGTH, generator=random) / math.sqrt(LENGTH)
    return axis_DD[which] + noise * scatter


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("directions", [1, 2, 3, 4])
def test_as_many_parts_are_chosen_as_there_are_directions(directions, seed):
    scores = split_scores(around(directions, seed=seed), seed=seed)
    assert scores.chosen == directions
    assert scores.reason.startswith("stop" if directions == 1 else f"split in {directions}")
    if directions > 1:
        assert scores.votes[directions - 1] == 3
        assert max(scores.silhouette) == scores.silhouette[directions - 1]


@pytest.mark.parametrize("centred", [False, True])
def test_noise_is_not_split(centred):
    uniform = torch.rand(400, LENGTH, generator=generator()) - 0.5
    normal = torch.randn(400, LENGTH, generator=generator())
    for latent_ND in (uniform, normal):
        assert split_scores(latent_ND, centred=centred).chosen == 1


def test_a_common_direction_that_is_subtracted_hides_no_split():
    latent_ND = around(2, noise=0.2) + 40 * torch.ones(LENGTH)
    assert split_scores(latent_ND, centred=True).chosen == 2


def test_one_long_direction_of_spread_is_no_reason_to_split():
    """A likelihood of round parts likes to cut it; the two others know that noise would be too."""
    stretch = torch.ones(LENGTH)
    stretch[0] = 3
    latent_ND = 3 + stretch * torch.randn(2000, LENGTH, generator=generator())
    scores = split_scores(latent_ND)
    assert scores.bic[1] > scores.bic[0]
    assert scores.chosen == 1


def test_the_scores_depend_on_the_seed_alone_and_survive_json():
    latent_ND = around(3)
    scores = split_scores(latent_ND, seed=4)
    assert split_scores(latent_ND, seed=4) == scores
    assert split_scores(latent_ND, seed=5) != scores
    assert SplitScores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores
    with pytest.raises(ConfigError, match="unknown split's scores key 'part'"):
        SplitScores.from_dict({"samples": 1, "reason": "", "part": 2})


def test_no_more_parts_are_tried_than_allowed():
    scores = split_scores(around(4), most=2)
    assert scores.chosen == 2
    assert len(scores.votes) == len(scores.gap) == 2


def test_few_samples_and_equal_samples_stop():
    few = split_scores(around(2, samples=100), min_samples=101)
    assert (few.chosen, few.samples, few.votes) == (1, 100, ())
    assert few.reason == "stop: fewer than 101 samples"
    alike = split_scores(torch.ones(300, LENGTH))
    assert (alike.chosen, alike.reason) == (1, "stop: all samples are alike")


def test_limits_that_allow_no_split_and_broken_latents_are_refused():
    for limits in ({"most": 1}, {"most": 5, "min_samples": 4}):
        with pytest.raises(ConfigError, match="a split needs at least 2 parts"):
            split_scores(around(2), **limits)
    broken = around(2)
    broken[7, 3] = torch.nan
    with pytest.raises(NumericError, match="NaN"):
        split_scores(broken)


def unit_rows(count: int, length: int, seed: int) -> Tensor:
    rows = torch.randn(count, length, generator=generator(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(6, 40), st.integers(0, 2**16))
def test_the_silhouette_is_that_of_the_definition(parts, samples, seed):
    """Over all pairs, as Rousseeuw wrote it; the first part has a single sample."""
    unit_ND = unit_rows(samples, 3, seed)
    own_N = torch.arange(samples) % (parts - 1) + 1
    own_N[0] = 0
    away_NN = 1 - unit_ND @ unit_ND.T
    scores = []
    for sample in range(samples):
        mine = own_N == own_N[sample]
        if int(mine.sum()) == 1:
            scores.append(0.0)
            continue
        mine[sample] = False
        within = float(away_NN[sample][mine].mean())
        beside = min(
            float(away_NN[sample][own_N == part].mean())
            for part in own_N.unique().tolist()
            if part != int(own_N[sample])
        )
        scores.append((beside - within) / max(beside, within))
    expected = sum(scores) / samples
    assert silhouette(unit_ND, own_N, parts) == pytest.approx(expected, abs=1e-9)


def test_the_silhouette_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    unit_ND = unit_rows(60, 5, 0)
    own_N = spherical_kmeans(unit_ND, 3).assignment
    expected = metrics.silhouette_score(unit_ND.numpy(), own_N.numpy(), metric="cosine")
    assert silhouette(unit_ND, own_N, 3) == pytest.approx(expected, abs=1e-9)


def test_the_bic_is_the_likelihood_of_the_mixture_less_its_price():
    """Worked out a second time, sample by sample, with torch's normal density."""
    unit_ND = unit_rows(30, 4, 0)
    own_N = spherical_kmeans(unit_ND, 2).assignment
    mean_KD = torch.stack([unit_ND[own_N == part].mean(0) for part in (0, 1)])
    off_ND = unit_ND - mean_KD[own_N]
    variance = float(off_ND.square().sum()) / (4 * 28)
    density_N = torch.distributions.Normal(0.0, math.sqrt(variance)).log_prob(off_ND).sum(1)
    share_N = torch.bincount(own_N)[own_N] / 30
    likelihood = float((density_N + share_N.log()).sum())
    expected = likelihood - 0.5 * (1 + 2 * 4 + 1) * math.log(30)
    assert bic(unit_ND, own_N, 2) == pytest.approx(expected / 30)
