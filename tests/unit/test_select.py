"""Channel selection follows the paper's formulas, worked out here a second time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sigmabranch.conversion.select import (
    select_at_random,
    select_by_activation,
    select_evenly,
    top_units,
)


def by_hand(mean, width, fraction):
    """Phase 2 in plain Python: sort by score, first channel wins a tie."""
    channels = range(len(mean[0]))
    count = round(fraction * width)
    shared = sorted(channels, key=lambda c: -min(own[c] for own in mean))[:count]
    rest = [c for c in channels if c not in shared]
    specific = [
        sorted(rest, key=lambda c: -(own[c] - max(other[c] for other in mean if other is not own)))[
            : width - count
        ]
        for own in mean
    ]
    return sorted(shared), [sorted(s) for s in specific]


@given(
    st.integers(2, 4),
    st.integers(1, 40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**16),
    st.booleans(),
)
def test_shared_and_specific_channels_are_those_of_the_formula(
    branches, channels, share, fraction, seed, ties
):
    width = max(1, round(share * channels))
    mean_KC = torch.rand(branches, channels, generator=torch.Generator().manual_seed(seed)).double()
    if ties:
        mean_KC = (mean_KC * 4).round()
    shared, specific = by_hand(mean_KC.tolist(), width, fraction)
    found = select_by_activation(mean_KC, width, fraction)
    for branch, selection in enumerate(found):
        assert list(selection.shared) == shared
        assert list(selection.specific) == specific[branch]
        assert len(selection.kept) == width
        assert not set(selection.shared) & set(selection.specific)
        assert list(selection.kept) == sorted({*shared, *specific[branch]})


def test_the_means_are_not_changed():
    mean_KC = torch.rand(2, 9)
    before = mean_KC.clone()
    select_by_activation(mean_KC, 6, 0.5)
    assert torch.equal(mean_KC, before)


def test_specific_sets_overlap_just_as_much_as_the_width_forces():
    """C = 1024, w = 724, half shared: 62 channels in both specific sets, all 1024 in use."""
    mean_KC = torch.rand(2, 1024, generator=torch.Generator().manual_seed(0))
    left, right = select_by_activation(mean_KC, 724, 0.5)
    assert len(left.shared) == 362
    assert len({*left.specific} & {*right.specific}) == 62
    assert {*left.kept} | {*right.kept} == set(range(1024))


def test_specific_sets_are_disjoint_where_there_is_room():
    mean_KC = torch.rand(2, 2048, generator=torch.Generator().manual_seed(0))
    left, right = select_by_activation(mean_KC, 1024, 0.5)
    assert not {*left.specific} & {*right.specific}
    assert len({*left.kept} | {*right.kept}) == 1536


@pytest.mark.parametrize(("fraction", "shared"), [(0.0, 0), (1.0, 6)])
def test_all_or_nothing_may_be_shared(fraction, shared):
    for selection in select_by_activation(torch.rand(2, 10), 6, fraction):
        assert len(selection.shared) == shared
        assert len(selection.specific) == 6 - shared


def test_keeping_everything_keeps_everything():
    for selection in select_by_activation(torch.rand(2, 7), 7, 0.5):
        assert selection.kept == tuple(range(7))


def test_random_draws_depend_on_the_generator_alone():
    draw = [select_at_random(50, 20, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    left, right = draw[0]
    assert left.shared == right.shared
    assert len(left.kept) == len(right.kept) == 20
    assert {*left.kept} & {*right.kept} == {*left.shared}


def test_three_random_draws_share_what_all_of_them_hold():
    draws = select_at_random(20, 15, torch.Generator().manual_seed(0), branches=3)
    assert len(draws) == 3
    assert {*draws[0].shared} == {*draws[0].kept} & {*draws[1].kept} & {*draws[2].kept}
    assert [len(draw.kept) for draw in draws] == [15, 15, 15]
    assert len({selection.kept for selection in select_evenly(20, 15, branches=3)}) == 1


def test_the_strongest_units_come_in_ascending_order_and_ties_go_to_the_first():
    assert top_units(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2) == (1, 2)
