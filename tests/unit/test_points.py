"""Farthest points and balls against their definitions, written as loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sigmabranch.points import (
    ball_query,
    farthest_points,
    in_farthest_order,
    squared_distances,
    take_points,
)


def clouds(number: int, points: int, seed: int = 0) -> Tensor:
    return torch.randn(number, points, 3, generator=torch.Generator().manual_seed(seed))


def ordered(number: int, points: int, seed: int = 0) -> Tensor:
    xyz = clouds(number, points, seed)
    return take_points(xyz, farthest_points(xyz, points))


def greedy(xyz_P3: Tensor, count: int) -> list[int]:
    chosen = [0]
    while len(chosen) < count:
        gaps = [min(float(((p - xyz_P3[c]) ** 2).sum()) for c in chosen) for p in xyz_P3]
        chosen.append(max(range(len(gaps)), key=gaps.__getitem__))
    return chosen


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 8))
def test_each_farthest_point_is_the_farthest_from_those_before_it(seed, count, more):
    xyz = clouds(2, count + more, seed)
    found = farthest_points(xyz, count)
    assert found.tolist() == [greedy(cloud, count) for cloud in xyz]


def test_points_that_all_coincide_give_valid_positions():
    assert farthest_points(torch.ones(2, 5, 3), 4).tolist() == [[0] * 4] * 2


def test_the_first_points_of_an_ordered_cloud_are_its_farthest_points():
    xyz = ordered(6, 64)
    expected = torch.arange(32).expand(6, -1)
    assert torch.equal(farthest_points(xyz, 32), expected)
    assert torch.equal(farthest_points(xyz[:, :32], 8), expected[:, :8])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.5, 2), st.floats(-1, 1), st.data())
def test_order_survives_scale_shift_and_the_loss_of_later_points(seed, scale, shift, data):
    xyz = ordered(5, 40, seed)
    lost = data.draw(st.lists(st.integers(16, 39), unique=True, max_size=20))
    kept = [p for p in range(40) if p not in lost]
    assert in_farthest_order(xyz[:, kept] * scale + shift, 16)
    xyz[:, lost] = xyz[:, :1]
    assert in_farthest_order(xyz * scale + shift, 16)


@pytest.mark.parametrize("wrong", [1, 7, 15])
def test_one_point_out_of_order_in_the_last_cloud_is_noticed(wrong):
    xyz = ordered(9, 40)
    xyz[-1, [wrong, 39]] = xyz[-1, [39, wrong]]
    assert not in_farthest_order(xyz, 16)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 3), st.integers(1, 12))
def test_a_ball_holds_the_first_points_within_its_radius(seed, radius, count):
    xyz = clouds(5, 20, seed)
    centre = xyz[:, :4]
    found = ball_query(xyz, centre, radius, count)
    for cloud in range(5):
        for middle in range(4):
            gaps = ((xyz[cloud] - centre[cloud, middle]) ** 2).sum(-1)
            inside = (gaps <= radius**2).nonzero().flatten().tolist()
            expected = (inside + [inside[0]] * count)[:count]
            assert found[cloud, middle].tolist() == expected


def test_distances_are_those_of_the_definition_and_leave_their_arguments_alone():
    a, b = clouds(3, 4, 1), clouds(3, 6, 2)
    before = a.clone(), b.clone()
    assert torch.allclose(squared_distances(a, b), torch.cdist(a, b) ** 2, atol=1e-5)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_points_are_taken_at_any_shape_of_positions():
    values = torch.arange(2 * 5 * 2).view(2, 5, 2)
    index = torch.tensor([[[0, 4], [1, 1]], [[2, 3], [0, 0]]])
    taken = take_points(values, index)
    assert taken.shape == (2, 2, 2, 2)
    assert torch.equal(taken[1, 0, 1], values[1, 3])


def test_both_operators_keep_torchs_contract():
    xyz = clouds(2, 12)
    operators = torch.ops.sigmabranch
    torch.library.opcheck(operators.farthest_points.default, (xyz, 4))
    torch.library.opcheck(operators.ball_query.default, (xyz, xyz[:, :4].contiguous(), 0.5, 3))
