"""Images by day, at night, in fog and in infrared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sigmabranch.backbones import ResNetSpec
from sigmabranch.data import ConditionSplit, Dataset, EpochBatches, ResidentSplit
from sigmabranch.data.augment import CropFlip
from sigmabranch.data.conditions import CONDITIONS, blur, noise_like, under_conditions
from sigmabranch.data.split import Normalise
from sigmabranch.tasks import Chain, find_task, ordered

IMAGES, TESTS, SIDE, CLASSES = 48, 20, 12, 4
DAY, NIGHT, FOG, INFRARED = range(4)


def plain_split(images: int, seed: int) -> ResidentSplit:
    generator = torch.Generator().manual_seed(seed)
    return ResidentSplit(
        inputs=torch.randint(0, 256, (images, 3, SIDE, SIDE), generator=generator).byte(),
        labels=torch.arange(images) % CLASSES,
        augment=CropFlip(pad=2, flip=True),
        normalise=Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), device="cpu", channels_last=True),
    )


@pytest.fixture
def plain() -> Dataset:
    return Dataset(
        name="plain",
        train=plain_split(IMAGES, 0),
        test=plain_split(TESTS, 1),
        class_names=tuple("abcd"),
        shape=(3, SIDE, SIDE),
    )


@pytest.fixture
def seen(plain: Dataset) -> Dataset:
    return under_conditions(plain, "seen")


def inputs(split: object, order: Tensor, **options: object) -> Tensor:
    assert isinstance(split, ConditionSplit | ResidentSplit)
    return next(split.batches(order, len(order), **options))[0]  # type: ignore[arg-type]


def pixels(split: object, order: Tensor) -> Tensor:
    """Of 0 to 1, not normalised."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    )
    return inputs(split, order) * std + mean


def views(condition: int) -> Tensor:
    """Numbers of the test samples under one condition."""
    return torch.arange(TESTS) * len(CONDITIONS) + condition


def test_every_test_image_is_there_under_all_conditions(plain: Dataset, seen: Dataset) -> None:
    assert isinstance(seen.test, ConditionSplit)
    assert seen.test.conditions == ("day", "night", "fog", "infrared")
    assert (len(seen.train), len(seen.test)) == (IMAGES, 4 * TESTS)
    assert seen.test.labels.tolist() == plain.test.labels.repeat_interleave(4).tolist()
    for condition in range(4):
        assert seen.test.condition[views(condition)].eq(condition).all()


def test_by_day_an_image_is_as_it_is(plain: Dataset, seen: Dataset) -> None:
    assert torch.equal(inputs(seen.test, views(DAY)), inputs(plain.test, torch.arange(TESTS)))


def test_night_is_dark_and_noisy_fog_bright_and_flat_infrared_grey_and_inverted(
    seen: Dataset,
) -> None:
    day, night, fog, infrared = (pixels(seen.test, views(each)) for each in range(4))
    noise = night - 0.2 * day
    lit = 0.2 * day > 0.1  # darker pixels meet the bottom of the scale
    assert abs(noise[lit].mean()) < 0.005
    assert noise[lit].std().item() == pytest.approx(0.03, rel=0.1)
    assert torch.allclose(fog, 0.35 * blur(day) + 0.6, atol=1e-5)
    grey = (day * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert torch.allclose(infrared, (1 - blur(grey)).expand(-1, 3, -1, -1), atol=1e-5)
    for condition in (night, fog, infrared):
        assert condition.min() >= -1e-5
        assert condition.max() <= 1 + 1e-5


def test_blur_is_the_binomial_filter_with_edges_that_go_on() -> None:
    images = torch.rand(2, 3, 7, 9)
    taps = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    padded = F.pad(images, (2,) * 4, mode="replicate").flatten(0, 1)[:, None]
    expected = F.conv2d(padded, (taps[:, None] * taps)[None, None]).view(images.shape)
    assert torch.allclose(blur(images), expected, atol=1e-6)


def test_noise_is_of_mean_0_and_deviation_1_and_each_samples_own() -> None:
    like = torch.empty(200, 3, 8, 8)
    noise = noise_like(like, torch.arange(200), 5)
    assert abs(noise.mean()) < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert abs((noise[:-1] * noise[1:]).mean()) < 0.02
    assert torch.equal(noise_like(like[:2], torch.tensor([7, 3]), 5), noise[[7, 3]])
    assert not torch.equal(noise_like(like, torch.arange(200), 6), noise)


def test_a_view_is_always_the_same_whatever_its_batch_and_selection(seen: Dataset) -> None:
    for split in (seen.train, seen.test):
        whole = inputs(split, torch.arange(len(split)))
        some = torch.tensor([9, 2, 17])
        assert torch.equal(inputs(split, some), whole[some])
        assert torch.equal(inputs(split.select(some), torch.arange(3)), whole[some])


def test_train_and_test_images_of_one_number_have_noise_of_their_own(plain: Dataset) -> None:
    seen = under_conditions(replace(plain, train=plain.test), "")
    train, test = (inputs(split, views(NIGHT)) for split in (seen.train.as_measured(), seen.test))
    assert not torch.equal(train, test)


def test_calibration_meets_all_conditions(plain: Dataset) -> None:
    many = under_conditions(replace(plain, train=plain_split(800, 2)), "").train
    assert isinstance(many, ConditionSplit)
    assert (many.condition.bincount(minlength=4) - 200).abs().max() < 50


def test_training_draws_a_condition_for_each_sample_and_epoch(seen: Dataset) -> None:
    order = torch.arange(IMAGES)
    epochs = [inputs(seen.train, order, augment_seed=seed) for seed in range(40)]
    again = inputs(seen.train, order[5:9], augment_seed=3)
    assert torch.equal(again, epochs[3][5:9])
    # Infrared is told by equal channels; each image must have been and not been it.
    mean, std = torch.tensor((0.5, 0.4, 0.3)), torch.tensor((0.2, 0.3, 0.4))
    raw = torch.stack(epochs) * std[:, None, None] + mean[:, None, None]
    is_infrared = (raw[:, :, 0] - raw[:, :, 1]).abs().amax((2, 3)) < 1e-4
    assert is_infrared.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert is_infrared.any(0).all()
    assert not is_infrared.all(0).any()


def test_an_epoch_can_be_entered_at_any_batch(seen: Dataset) -> None:
    batches = EpochBatches(seen.train, 10, seed=4)
    whole, rest = list(batches.epoch(1)), list(batches.epoch(1, 3))
    assert len(rest) == 2
    for share, expected in zip(rest, whole[3:], strict=True):
        assert torch.equal(share.x, expected.x)
        assert torch.equal(share.y, expected.y)


def test_held_out_images_are_there_under_all_conditions_and_training_has_none(
    plain: Dataset, seen: Dataset
) -> None:
    held, without = (data.limit(held_out=8) for data in (seen, plain))
    assert isinstance(held.held_out, ConditionSplit)
    assert isinstance(held.train, ConditionSplit)
    assert len(held.held_out) == 32
    assert set(held.held_out.image.tolist()).isdisjoint(held.train.image.tolist())
    by_day = inputs(held.held_out, torch.arange(0, 32, 4))
    assert without.held_out is not None
    assert torch.equal(by_day, inputs(without.held_out, torch.arange(8)))
    assert held.train.labels.equal(without.train.labels)
    rest = inputs(held.train, torch.arange(40))
    assert torch.equal(rest, inputs(seen.train, held.train.image))


def test_a_chain_reports_its_accuracy_by_condition(seen: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    task = find_task("cifar100-conditions").with_settings(
        ["tree.projection_dim=4", "dense.epochs=1", "finetune.epochs=1", "dense.batch_size=16",
         "finetune.batch_size=16", "dense.warmup_epochs=0", "conversion.restarts=2"]
    )  # fmt: skip
    model = ResNetSpec(layers=(1, 1, 1), planes=(2, 3, 4), strides=(1, 2, 1), stem="cifar",
                       stem_width=4, classes=CLASSES)  # fmt: skip
    chain = Chain(
        replace(task, model=model), tmp_path, device="cpu", dataset=seen.limit(held_out=8)
    )
    for split, samples in (("test", 80), ("held-out", 32)):
        for figures in (chain.dense_accuracy(split), chain.accuracy(chain.branched(), split)):
            by_condition = figures["accuracy_by_condition"]
            assert list(by_condition) == ["day", "night", "fog", "infrared"]
            assert figures["samples"] == samples
            assert sum(by_condition.values()) / 4 == pytest.approx(figures["top1"])
    assert chain.history("dense")[0]["samples"] == 32


def test_processes_divide_the_conditions_as_they_do_the_batches(seen: Dataset) -> None:
    assert isinstance(seen.test, ConditionSplit)
    whole = list(ordered(seen.test))
    assert torch.equal(torch.cat([batch[2] for batch in whole]), seen.test.condition)
    by_input = dict(zip((x.numpy().tobytes() for batch in whole for x in batch[0]),
                        (int(c) for batch in whole for c in batch[2]), strict=True))  # fmt: skip
    for rank in range(3):
        for x, _, condition in ordered(seen.test).part(rank, 3):
            assert [by_input[each.numpy().tobytes()] for each in x] == condition.tolist()
