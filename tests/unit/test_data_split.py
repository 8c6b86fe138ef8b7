"""Seeds, splits, limits and epoch orders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sigmabranch.data import (
    Dataset,
    EpochBatches,
    ResidentSplit,
    Split,
    derive_seed,
    own_samples,
)
from sigmabranch.data.augment import CropFlip
from sigmabranch.data.seeds import below, sample_bits
from sigmabranch.data.split import Normalise, stratified
from sigmabranch.errors import ConfigError


def numbered_split(samples: int = 53, *, channels_last: bool = False) -> ResidentSplit:
    """Images of random pixels; the label is the sample's number."""
    images = torch.randint(0, 256, (samples, 3, 8, 8), dtype=torch.uint8)
    return ResidentSplit(
        inputs=images,
        labels=torch.arange(samples),
        augment=CropFlip(pad=2, flip=True),
        normalise=Normalise(
            (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), device="cpu", channels_last=channels_last
        ),
    )


def labels_seen(batches: EpochBatches, epoch: int, start: int = 0) -> list[int]:
    return [int(label) for _, y, _ in batches.epoch(epoch, start) for label in y]


def test_derived_seeds_depend_on_every_part_and_on_order() -> None:
    seeds = {derive_seed(*parts) for parts in ((1, 2), (2, 1), (1,), (1, 2, 0), (1, -2))}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_and_sample_bits_never_change() -> None:
    # A change here would alter the digits' held-out split and every resumed run.
    seed = 4_450_782_424_123_420_391
    assert derive_seed(0, 1, 2) == seed
    assert sample_bits(seed, torch.tensor([0, 49_999]), 2).tolist() == [
        [3127228807, 2111735273],
        [3500606239, 3880795159],
    ]


def test_sample_bits_are_uniform_over_samples_draws_and_seeds() -> None:
    index = torch.arange(20_000)
    for seed in (0, 1, derive_seed(7)):
        counts = torch.stack([below(d, 9).bincount() for d in sample_bits(seed, index, 3).T])
        chi_square = ((counts - 20_000 / 9) ** 2 / (20_000 / 9)).sum(1)
        assert chi_square.max() < 30  # 8 degrees of freedom: 1 in 5,000 exceeds it


def test_draws_of_a_sample_are_uncorrelated() -> None:
    draws = torch.cat([sample_bits(s, torch.arange(20_000), 3) for s in (3, 4)], dim=1)
    correlation = torch.corrcoef(draws.T.double()) - torch.eye(6)
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize("channels_last", [False, True])
def test_plain_batches_are_the_normalised_images_in_the_order_asked(channels_last: bool) -> None:
    split = numbered_split(channels_last=channels_last)
    order = torch.tensor([5, 0, 5, 17, 3])
    (x0, y0), (x1, y1), (x2, y2) = split.batches(order, 2)
    images = split.inputs[order].double() / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    expected = (images - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(torch.cat([x0, x1, x2]).double(), expected, atol=1e-6)
    assert torch.equal(torch.cat([y0, y1, y2]), order)
    assert x0.dtype == torch.float32
    assert x0.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_augmentation_of_a_sample_does_not_depend_on_its_batch() -> None:
    split = numbered_split()
    order = torch.randperm(53)
    by_8 = torch.cat([x for x, _ in split.batches(order, 8, augment_seed=3)])
    by_53 = torch.cat([x for x, _ in split.batches(torch.arange(53), 53, augment_seed=3)])
    assert torch.equal(by_8, by_53[order])
    other_seed = torch.cat([x for x, _ in split.batches(order, 8, augment_seed=4)])
    assert (other_seed != by_8).flatten(1).any(1).float().mean() > 0.8


def test_batches_leave_the_images_and_the_global_generator_alone() -> None:
    split = numbered_split()
    before, state = split.inputs.clone(), torch.get_rng_state()
    for x, *_ in EpochBatches(split, 8, seed=0).epoch(0):
        x.zero_()
    assert torch.equal(split.inputs, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own() -> None:
    batches = EpochBatches(numbered_split(), 8, seed=1)
    first, second = labels_seen(batches, 0), labels_seen(batches, 1)
    assert sorted(first) == sorted(second) == list(range(53))
    assert first != second
    assert labels_seen(EpochBatches(numbered_split(), 8, seed=1), 0) == first
    assert labels_seen(EpochBatches(numbered_split(), 8, seed=2), 0) != first


def test_a_sample_is_augmented_anew_in_each_epoch_or_not_at_all() -> None:
    split = numbered_split()

    def by_label(epoch: int, augment: bool) -> torch.Tensor:
        ((x, y, _),) = EpochBatches(split, 53, seed=1, augment=augment).epoch(epoch)
        return x[y.argsort()]

    changed = (by_label(0, True) != by_label(1, True)).flatten(1).any(1)
    assert changed.float().mean() > 0.8
    ((plain, _),) = split.batches(torch.arange(53), 53)
    assert torch.equal(by_label(0, False), plain)


def test_an_epoch_entered_at_any_step_continues_bit_for_bit() -> None:
    batches = EpochBatches(numbered_split(), 8, seed=1)
    whole = list(batches.epoch(4))
    assert len(whole) == len(batches) == 7
    for start in range(8):
        rest = list(batches.epoch(4, start))
        assert len(rest) == 7 - start
        for (x, y, _), (expected_x, expected_y, _) in zip(rest, whole[start:], strict=True):
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 2), (5, 2), (7, 3), (10, 4)])
def test_the_shares_of_a_step_are_its_samples_whatever_the_number_of_processes(
    batch_size: int, world_size: int
) -> None:
    split = numbered_split(51)
    whole = list(EpochBatches(split, batch_size, 0).epoch(2))
    ranks = [
        list(EpochBatches(split, batch_size, 0, rank, world_size).epoch(2))
        for rank in range(world_size)
    ]
    for joint, *shares in zip(whole, *ranks, strict=True):
        assert {share.total for share in shares} == {len(joint.y)}
        # The last step may have fewer samples than processes; some then hold its first one.
        mine = [
            share.y[: own_samples(share.total, rank, world_size)]
            for rank, share in enumerate(shares)
        ]
        assert sorted(torch.cat(mine).tolist()) == sorted(joint.y.tolist())
        for share in shares:
            assert len(share.y) >= 1
            rows = [joint.y.tolist().index(label) for label in share.y.tolist()]
            assert torch.equal(share.x, joint.x[rows])


def test_data_are_known_by_number_and_labels() -> None:
    one, again = (EpochBatches(numbered_split(), 8, seed=seed) for seed in (0, 1))
    assert one.identity == again.identity
    fewer = EpochBatches(numbered_split(52), 8, seed=0)
    swapped = numbered_split()
    swapped.labels[:2] = swapped.labels[:2].flip(0)
    assert fewer.identity != one.identity != EpochBatches(swapped, 8, seed=0).identity


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank 2"),
        ({"batch_size": 4, "rank": 2, "world_size": 5}, "without a sample"),
    ],
)
def test_impossible_batches_are_refused(fields: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EpochBatches(numbered_split(), seed=0, **fields)  # type: ignore[arg-type]


def test_stratified_keeps_the_proportions_of_the_classes() -> None:
    labels = torch.tensor([0] * 600 + [1] * 300 + [3] * 100)[torch.randperm(1000)]
    index = stratified(labels, 100, seed=0)
    assert (labels[index].bincount() - torch.tensor([60, 30, 0, 10])).abs().max() <= 1
    assert torch.equal(index, index.unique())
    assert torch.equal(index, stratified(labels, 100, seed=0))
    assert not torch.equal(index, stratified(labels, 100, seed=1))


def labelled_split(samples: int = 60, classes: int = 6) -> ResidentSplit:
    """As :func:`numbered_split`, with as many samples of every class."""
    return replace(numbered_split(samples), labels=torch.arange(samples) % classes)


def data_of(train: ResidentSplit, test: ResidentSplit) -> Dataset:
    names = tuple(map(str, range(6)))
    return Dataset(name="numbers", train=train, test=test, class_names=names, shape=(3, 8, 8))


def inputs_of(split: Split | None) -> torch.Tensor:
    assert split is not None
    return next(split.batches(torch.arange(len(split)), len(split)))[0]


def test_training_keeps_what_a_limit_of_the_rest_would_take_and_its_complement_is_held_out() -> (
    None
):
    data = data_of(labelled_split(), labelled_split(12))
    parted, limited = data.limit(held_out=12), data.limit(train=48)
    assert torch.equal(inputs_of(parted.train), inputs_of(limited.train))
    assert torch.equal(parted.train.labels, limited.train.labels)
    whole = {tuple(x) for x in inputs_of(data.train).flatten(1).tolist()}
    seen, kept = (
        {tuple(x) for x in inputs_of(split).flatten(1).tolist()}
        for split in (parted.train, parted.held_out)
    )
    assert (len(seen), len(kept)) == (48, 12)
    assert seen | kept == whole
    assert parted.held_out is not None
    assert parted.held_out.labels.bincount().tolist() == [2] * 6
    assert parted.test is data.test


def test_a_lower_limit_leaves_the_held_out_samples_as_they_are() -> None:
    data = data_of(labelled_split(), labelled_split(12))
    parted, few = data.limit(held_out=12), data.limit(train=10, held_out=12)
    assert torch.equal(inputs_of(few.held_out), inputs_of(parted.held_out))
    assert torch.equal(inputs_of(few.train), inputs_of(data.limit(train=10).train))
    assert len(data.limit(train=55, held_out=12).train) == 48


def test_a_split_is_measured_by_its_name() -> None:
    data = data_of(labelled_split(), labelled_split(12))
    parted = data.limit(held_out=12)
    assert data.measured("test") is data.validation is data.test
    assert parted.measured("test") is parted.test
    assert parted.measured("held-out") is parted.validation is parted.held_out
    with pytest.raises(ConfigError, match=r"set data\.held_out"):
        data.measured("held-out")
    with pytest.raises(ConfigError, match=r"no split 'train'.*test or held-out"):
        parted.measured("train")


@pytest.mark.parametrize("held_out", [0, 60, 70])
def test_as_many_held_out_as_there_are_is_refused(held_out: int) -> None:
    with pytest.raises(ConfigError, match=f"{held_out} of 60 .* give 1 to 59"):
        data_of(labelled_split(), labelled_split(12)).limit(held_out=held_out)


def test_limit_takes_fewer_samples_and_never_more_than_there_are() -> None:
    split = numbered_split(40).select(torch.arange(0, 40, 2))
    data = Dataset(
        name="numbers",
        train=split,
        test=split,
        class_names=tuple(map(str, range(40))),
        shape=(3, 8, 8),
    )
    limited = data.limit(train=5, test=100)
    assert (len(limited.train), len(limited.test), limited.classes) == (5, 20, 40)
    assert set(limited.train.labels.tolist()) <= set(range(0, 40, 2))
    (x, y) = next(limited.train.batches(torch.arange(5), 5))
    (expected, _) = next(split.batches(y // 2, 5))
    assert torch.equal(x, expected)
    with pytest.raises(ConfigError, match="0 samples"):
        data.limit(train=0)
