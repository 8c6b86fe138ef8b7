"""Shares and passes of a step: whoever holds which sample, the gradient is that of the batch."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sigmabranch.conversion import Shards
from sigmabranch.data import Share, own_rows
from sigmabranch.errors import DataError
from sigmabranch.training import LoaderBatches
from sigmabranch.training.passes import Pass, pass_size, split_share, weighted_sum

sizes = st.integers(1, 12)


def all_passes(x: Tensor, y: Tensor, batch_size: int, world: int, accumulate: int):
    """Every process's passes of one step."""
    most = pass_size(batch_size, world, accumulate)
    return [
        split_share(
            Share(own_rows(x, rank, world), own_rows(y, rank, world), len(y)), most, rank, world
        )
        for rank in range(world)
    ]


@settings(deadline=None, max_examples=60)
@given(samples=sizes, missing=st.integers(0, 11), world=st.integers(1, 5), accumulate=sizes)
def test_the_averaged_gradient_is_that_of_the_whole_batch(samples, missing, world, accumulate):
    draw = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 4, generator=draw, dtype=torch.float64)
    y = torch.randint(3, (samples,), generator=draw)
    net = nn.Linear(4, 3, dtype=torch.float64)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return torch.autograd.grad(nn.functional.cross_entropy(net(x), y), net.weight)[0]

    ranks = all_passes(x, y, samples + missing, world, accumulate)
    mean = sum(
        weighted_sum([gradient(part.x, part.y) for part in passes], passes) for passes in ranks
    )
    torch.testing.assert_close(mean / world, gradient(x, y))


@settings(deadline=None, max_examples=60)
@given(samples=sizes, missing=st.integers(0, 11), world=st.integers(1, 5), accumulate=sizes)
def test_processes_take_equally_many_passes_that_fit(samples, missing, world, accumulate):
    x = torch.arange(samples).float()[:, None]
    ranks = all_passes(x, x[:, 0].long(), samples + missing, world, accumulate)
    most = math.ceil(math.ceil((samples + missing) / world) / accumulate)
    assert len({len(passes) for passes in ranks}) == 1
    assert len(ranks[0]) <= accumulate
    assert all(1 <= len(part.y) <= most for passes in ranks for part in passes)
    counted = [int(y) for passes in ranks for part in passes if part.weight for y in part.y]
    assert sorted(counted) == list(range(samples))


def test_a_step_of_one_pass_is_left_as_it_is():
    x, y = torch.randn(6, 2), torch.arange(6)
    (part,) = split_share(Share(x, y, 6), 6, 0, 1)
    assert part == Pass(part.x, part.y, 1.0)
    assert torch.equal(part.x, x)
    assert torch.equal(part.y, y)


class Meeting:
    """Processes played by threads: each adds its tensor and all get the sum."""

    def __init__(self, world: int) -> None:
        self.world, self.slots = world, [None] * world
        self.barrier = threading.Barrier(world, timeout=10)

    def shards(self, rank: int) -> Shards:
        def add(tensor: Tensor) -> Tensor:
            self.slots[rank] = tensor
            self.barrier.wait()
            total = torch.stack(list(self.slots)).sum(0)
            self.barrier.wait()
            return total

        return Shards(rank=rank, world=self.world, sum=add)

    def run(self, work) -> list:
        """What ``work(shards)`` gives or raises, by rank."""

        def attempt(rank: int):
            try:
                return work(self.shards(rank))
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(attempt, range(self.world)))


def pairs(order: list[int]) -> list[tuple[Tensor, Tensor]]:
    rows = torch.tensor(order)
    return [(y[:, None].float(), y) for y in rows.split(4)]


def test_a_plain_loader_is_shared_out_batch_by_batch():
    whole = pairs(list(range(10)))
    one, two = Meeting(2).run(lambda shards: list(LoaderBatches(whole, shards=shards).epoch(3)))
    for (x, y), first, second in zip(whole, one, two, strict=True):
        assert first.total == second.total == len(y)
        assert torch.equal(first.x, x[::2])
        assert torch.equal(second.y, y[1::2])


def test_inputs_without_labels_are_shared_out_alike():
    whole = [x for x, _ in pairs(list(range(10)))]
    one, two = Meeting(2).run(lambda shards: list(LoaderBatches(whole, shards=shards).epoch(3)))
    for x, first, second in zip(whole, one, two, strict=True):
        assert first.total == second.total == len(x)
        assert torch.equal(first.x, x[::2])
        assert torch.equal(second.x, x[1::2])
        assert first.y.shape == (len(first.x), 0)
        assert [part.y.shape[1] for part in split_share(first, 1, 0, 2)] == [0] * len(first.x)


def test_inputs_that_differ_between_processes_are_refused_by_all():
    def work(shards: Shards) -> None:
        order = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]][shards.rank]
        next(LoaderBatches([x.bfloat16() for x, _ in pairs(order)], shards=shards).epoch(0))

    for outcome in Meeting(2).run(work):
        assert isinstance(outcome, DataError)
        assert "give every process the same loader" in str(outcome)


def test_loaders_that_differ_between_processes_are_refused_by_all():
    def work(shards: Shards) -> None:
        order = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]][shards.rank]
        next(LoaderBatches(pairs(order), shards=shards).epoch(0))

    for outcome in Meeting(2).run(work):
        assert isinstance(outcome, DataError)
        assert "give every process the same loader" in str(outcome)


@pytest.mark.parametrize("world", [2, 3])
def test_gathered_rows_stand_in_the_order_of_the_batches(world):
    lengths = [3, 0, 2, 4, 1, 1, 5]
    batches = list(torch.arange(32).view(16, 2).split(lengths))

    def work(shards: Shards) -> tuple[Tensor, Tensor]:
        mine = [rows for number, rows in enumerate(batches) if number % world == shards.rank]
        return shards.gather(mine), shards.gather([rows[:, 0] % 3 == 0 for rows in mine])

    for rows, flags in Meeting(world).run(work):
        assert torch.equal(rows, torch.cat(batches))
        assert torch.equal(flags, torch.cat(batches)[:, 0] % 3 == 0)
        assert flags.dtype == torch.bool


def test_labels_that_are_absent_are_absent_from_what_is_gathered():
    batches = [torch.empty(size, 0, dtype=torch.int64) for size in (3, 2, 4)]

    def work(shards: Shards) -> Tensor:
        return shards.gather([y for number, y in enumerate(batches) if number % 2 == shards.rank])

    assert [tuple(y.shape) for y in Meeting(2).run(work)] == [(9, 0)] * 2


def test_fewer_batches_than_processes_are_refused_by_all():
    def work(shards: Shards) -> Tensor:
        return shards.gather([y for _, y in shards.own(pairs([1, 2, 3, 4, 5]))])

    for outcome in Meeting(3).run(work):
        assert isinstance(outcome, DataError)
        assert str(outcome).startswith("2 batches leave some of 3 processes without one")


def test_processes_take_turns_and_stop_after_the_same_sample():
    own = [
        [y.tolist() for _, y in Shards(rank=rank, world=2).own(pairs(list(range(12))), 9)]
        for rank in range(2)
    ]
    assert own == [[[0, 1, 2, 3], [8]], [[4, 5, 6, 7]]]


def test_a_loader_that_is_divided_already_is_refused():
    data = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    with pytest.raises(DataError, match="DistributedSampler"):
        LoaderBatches(DataLoader(data, 4, sampler=sampler), shards=Shards(rank=0, world=2))
