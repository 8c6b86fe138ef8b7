"""Clouds put in order, and the augmentation that must keep them so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sigmabranch.data.augment import ScaleShiftDrop
from sigmabranch.data.clouds import ORDERED, POINTS, arrange, farthest_first, unit_sphere
from sigmabranch.data.seeds import sample_bits, uniform
from sigmabranch.points import farthest_points, in_farthest_order

SEEDS = st.integers(0, 2**63 - 1)
AUGMENT = ScaleShiftDrop()


def random_clouds(count: int, points: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, points, 3, generator=generator)


def arranged(count: int, points: int = POINTS, seed: int = 0) -> Tensor:
    return arrange(random_clouds(count, points, seed), "cpu")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.sampled_from((32, 33, 100)), st.integers(0, 2**32), SEEDS)
def test_augmented_clouds_are_still_in_farthest_first_order(
    count: int, points: int, seed: int, epoch_seed: int
) -> None:
    clouds = arranged(count, points, seed)
    augmented = AUGMENT(clouds, torch.arange(count), epoch_seed)
    assert in_farthest_order(augmented, points // 2)
    assert not in_farthest_order(augmented.flip(1), points // 2)


def test_whole_clouds_keep_512_centroids_in_place() -> None:
    augmented = AUGMENT(arranged(8), torch.arange(8), 1)
    assert in_farthest_order(augmented, ORDERED)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(4, 9), SEEDS)
def test_every_point_is_scaled_and_shifted_with_its_cloud_or_replaced_by_the_first(
    count: int, points: int, seed: int
) -> None:
    clouds = random_clouds(count, points, 1)
    augmented = AUGMENT(clouds, torch.arange(count), seed)
    edge, old_edge = augmented[:, 1] - augmented[:, 0], clouds[:, 1] - clouds[:, 0]
    scale = edge.norm(dim=1) / old_edge.norm(dim=1)
    assert ((scale > 0.8 - 1e-5) & (scale < 1.25 + 1e-5)).all()
    shift = augmented[:, 0] - scale[:, None] * clouds[:, 0]
    assert (shift.abs() < 0.1 + 1e-5).all()
    moved = scale[:, None, None] * clouds + shift[:, None]
    is_moved = torch.isclose(augmented, moved, atol=1e-5).all(2)
    is_dropped = (augmented == augmented[:, :1]).all(2)
    assert (is_moved | is_dropped).all()
    assert is_moved[:, : points // 2].all()


def test_draws_cover_their_ranges_evenly_and_independently() -> None:
    count = 4000
    corner = torch.eye(4, 3).flip(0)  # 0, then the axes
    clouds = torch.cat([corner, corner])[None].expand(count, -1, -1)
    augmented = AUGMENT(clouds, torch.arange(count), 5)
    shift = augmented[:, 0]
    scale = (augmented[:, 1] - shift).norm(dim=1)
    share = (augmented[:, 5:] == shift[:, None]).all(2).float().mean(1)
    for values, low, high in ((scale, 0.8, 1.25), *((axis, -0.1, 0.1) for axis in shift.T)):
        bins = ((values - low) / (high - low) * 10).long().clamp(0, 9).bincount(minlength=10)
        assert (bins - count / 10).abs().max() < 5 * (count * 0.09) ** 0.5
    assert share.mean().item() == pytest.approx(0.875 / 2, abs=0.02)
    together = torch.corrcoef(torch.stack([scale, *shift.T, share])) - torch.eye(5)
    assert together.abs().max() < 0.08


def test_shares_of_dropped_points_reach_from_none_to_seven_eighths() -> None:
    augmented = AUGMENT(arranged(200, 256), torch.arange(200), 3)
    share = (augmented[:, 128:] == augmented[:, :1]).all(2).float().mean(1)
    assert share.min() < 0.05
    assert 0.8 < share.max() < 0.96
    assert share.std().item() == pytest.approx(0.875 / 12**0.5, rel=0.2)


def test_a_sample_is_altered_alike_in_every_batch_and_the_input_stays() -> None:
    clouds = arranged(6, 64)
    before, index = clouds.clone(), torch.tensor([4, 9, 2, 7, 0, 1])
    together = AUGMENT(clouds, index, 11)
    alone = torch.cat([AUGMENT(clouds[i : i + 1], index[i : i + 1], 11) for i in range(6)])
    assert torch.equal(together, alone)
    assert torch.equal(clouds, before)
    assert not torch.equal(together, AUGMENT(clouds, index, 12))


def test_uniform_numbers_lie_in_0_to_1_and_are_exact() -> None:
    ends = uniform(torch.tensor([0, 2**31, 2**32 - 1]))
    assert ends.tolist() == [0.0, 0.5, 1 - 2**-24]
    assert uniform(sample_bits(1, torch.arange(9000), 1)).mean().item() == pytest.approx(
        0.5, abs=0.02
    )


def test_arranging_centres_scales_and_keeps_every_point_once() -> None:
    raw = 1e20 * random_clouds(70, 40, 2) + 1e20  # more than one chunk; squares exceed float32
    clouds = arrange(raw, "cpu")
    assert clouds.mean(1).abs().max() < 1e-6
    assert (clouds.norm(dim=2).amax(1) - 1).abs().max() < 1e-6
    x, old_x = clouds[..., 0].sort(1).values, unit_sphere(raw)[..., 0].sort(1).values
    assert torch.equal(x, old_x)
    assert (farthest_points(clouds, 40) == torch.arange(40)).all()


def test_only_the_first_512_points_are_ordered_and_the_first_stays_first() -> None:
    clouds = random_clouds(2, POINTS, 3)
    ordered = farthest_first(clouds)
    assert torch.equal(ordered[:, 0], clouds[:, 0])
    for cloud, old in zip(ordered, clouds, strict=True):
        place = [int((old == point).all(1).nonzero()) for point in cloud]
        assert place[ORDERED:] == sorted(place[ORDERED:])
        assert sorted(place) == list(range(POINTS))


def test_a_cloud_of_few_distinct_points_has_them_first() -> None:
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])
    cloud = corners.repeat_interleave(256, 0)[None]
    ordered = farthest_first(cloud)
    assert ordered[0, :4].tolist() == [corners[i].tolist() for i in (0, 3, 2, 1)]
    assert in_farthest_order(ordered, ORDERED)
    assert torch.equal(ordered[0].sum(0), cloud[0].sum(0))
