"""Batches of a user's loader: the same samples in the same order, whenever an epoch is entered."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from sigmabranch.training import LoaderBatches

WIDTH = 6


@pytest.fixture(scope="module")
def samples():
    return torch.randn(56, WIDTH, generator=torch.Generator().manual_seed(0)), torch.arange(56)


def weighted(data, generator):
    return WeightedRandomSampler(torch.ones(len(data)), len(data), generator=generator)


@pytest.mark.parametrize("sampler", [RandomSampler, weighted])
@pytest.mark.parametrize("batched", [False, True])
def test_samplers_with_generators_of_their_own_draw_the_same_again(samples, sampler, batched):
    data = TensorDataset(*samples)
    order = sampler(data, generator=torch.Generator())
    options = {"batch_sampler": BatchSampler(order, 8, False)} if batched else {"sampler": order}
    source = LoaderBatches(DataLoader(data, 1 if batched else 8, **options), seed=2)
    first, again, other = ([y for _, y, _ in source.epoch(number)] for number in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_entered_in_the_middle_yields_the_same_batches(samples, workers):
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(WIDTH), y

    loader = DataLoader(Noisy(*samples), 8, shuffle=True, num_workers=workers)
    source = LoaderBatches(loader, seed=2)
    whole = []
    for pair in source.epoch(3):
        whole.append(pair)
        torch.rand(2)  # as dropout would
    rest = list(source.epoch(3, start=4))
    assert len(rest) == 3
    for (x, y, _), (again_x, again_y, _) in zip(whole[4:], rest, strict=True):
        assert torch.equal(x, again_x)
        assert torch.equal(y, again_y)
    assert not torch.equal(whole[0][1], next(source.epoch(4))[1])
