"""A split yields normalised batches in any order asked for; a data set is two or three splits.

An input is an image or a point cloud.

B batch, N samples, C channels, H height, W width, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sigmabranch.data.seeds import derive_seed, sample_bits
from sigmabranch.errors import ConfigError

#: Splits that a network can be measured on.
SPLITS = ("test", "held-out")
Augment = Callable[[Tensor, Tensor, int], Tensor]


class Split(Protocol):
    """Labelled samples with random access."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64 class of every sample."""

    def __len__(self) -> int: ...

    def batches(
        self, order: Tensor, batch_size: int, *, augment_seed: int | None = None, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the samples ``order`` names, in that order.

        Args:
            order: int64 sample numbers; repeats are allowed.
            batch_size: samples a batch; the last batch may be smaller.
            augment_seed: augment, each sample by this seed and its own number; None: do not.
            start: number of the first batch to yield; the earlier ones cost nothing.

        Yields:
            (B, ...) float32 normalised inputs and (B,) int64 labels, on the split's device.
        """

    def select(self, index: Tensor) -> Split:
        """The split of only these samples, renumbered from 0."""

    def as_measured(self) -> Split:
        """What these samples are measured by: themselves, or several views of each."""


class Normalise:
    """Pixels of 0 to 255 to float32 of zero mean and unit deviation in each channel.

    Args:
        mean: of each channel, for pixels scaled to 0..1.
        std: likewise.
        device: where the images are.
        channels_last: memory format of the result, which convolutions on many devices prefer.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        device: torch.device | str,
        channels_last: bool = False,
    ) -> None:
        mean_C11 = torch.tensor(mean, device=device)[:, None, None]
        std_C11 = torch.tensor(std, device=device)[:, None, None]
        self._scale = 1 / (255 * std_C11)
        self._shift = -mean_C11 / std_C11
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Normalise (B, C, H, W) to float32; float32 pixels are overwritten."""
        values = images_BCHW.to(torch.float32, memory_format=self._format)
        return values.mul_(self._scale).add_(self._shift)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidentSplit:
    """A split that lies on the device as a whole; batches are made there, without a loader.

    Attributes:
        inputs: (N, C, H, W) uint8 images or (N, P, 3) float32 clouds.
        labels: (N,) int64 on the device of ``inputs``.
        augment: maps (inputs, sample numbers, seed) to augmented inputs of the same shape.
        normalise: maps a batch of inputs to float32.
    """

    inputs: Tensor
    labels: Tensor
    augment: Augment
    normalise: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, order: Tensor, batch_size: int, *, augment_seed: int | None = None, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`Split.batches`."""
        order = order.to(self.inputs.device)
        for index in torch.split(order[start * batch_size :], batch_size):
            if not len(index):  # split() of nothing is one empty piece
                return
            inputs = self.inputs[index]
            if augment_seed is not None:
                inputs = self.augment(inputs, index, augment_seed)
            yield self.normalise(inputs), self.labels[index]

    def select(self, index: Tensor) -> ResidentSplit:
        """See :meth:`Split.select`."""
        index = index.to(self.inputs.device)
        return replace(self, inputs=self.inputs[index], labels=self.labels[index])

    def as_measured(self) -> ResidentSplit:
        """See :meth:`Split.as_measured`."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What a task learns from and what it is measured on.

    Attributes:
        name: the registered name.
        train: training samples.
        test: what results are measured on.
        held_out: training samples that training never sees, to choose by; None if there are none.
        class_names: of every class, in label order.
        shape: of one input: (C, H, W) of an image, (P, 3) of a cloud.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    shape: tuple[int, ...]
    held_out: Split | None = None

    @property
    def validation(self) -> Split:
        """What a training is watched on: the held-out samples, or the test split without any."""
        return self.test if self.held_out is None else self.held_out

    @property
    def measurable(self) -> tuple[str, ...]:
        """The names that :meth:`measured` knows here."""
        return SPLITS[:1] if self.held_out is None else SPLITS

    def measured(self, split: str) -> Split:
        """The split of that name.

        Raises:
            ConfigError: an unknown name, or a data set that holds nothing out.
        """
        if split == "test":
            return self.test
        if split != "held-out":
            raise ConfigError(f"no split {split!r} to measure on: choose {' or '.join(SPLITS)}")
        if self.held_out is None:
            raise ConfigError("no samples are held out: set data.held_out, and train without them")
        return self.held_out

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def limit(
        self,
        train: int | None = None,
        test: int | None = None,
        held_out: int | None = None,
        seed: int = 0,
    ) -> Dataset:
        """The same data set with at most so many samples, classes in their old proportions.

        Of N training samples, those held out are the ones that ``train=N - held_out`` leaves out;
        they are the same for any smaller ``train``.

        Raises:
            ConfigError: a limit below 1, or so many held out that none is left to train on.
        """
        samples, train_seed = len(self.train), derive_seed(seed, 0)
        kept = self.held_out
        if held_out is not None:
            left = samples - held_out
            if not 0 < left < samples:
                raise ConfigError(
                    f"{held_out} of {samples} training samples cannot be held out; "
                    f"give 1 to {samples - 1}"
                )
            seen = stratified(self.train.labels, left, train_seed)
            is_seen_N = torch.zeros(samples, dtype=torch.bool).index_fill(0, seen, True)
            kept = self.train.select((~is_seen_N).nonzero()[:, 0]).as_measured()
            train = left if train is None else min(train, left)
        return replace(
            self,
            train=_limited(self.train, train, train_seed),
            test=_limited(self.test, test, derive_seed(seed, 1)),
            held_out=kept,
        )


def stratified(labels_N: Tensor, count: int, seed: int) -> Tensor:
    """Choose ``count`` samples with the classes in proportion, each class's share at random.

    Within a class the samples are ranked at random; those of lowest relative rank are taken, so
    every class gives its share to within one sample. The choice depends on the labels and the seed
    alone and is the same with every version of torch.

    Returns:
        Ascending int64 sample numbers on the CPU, min(count, N) of them.
    """
    labels_N = labels_N.cpu()
    number_N = torch.arange(len(labels_N))
    shuffled_N = sample_bits(seed, number_N, 1)[:, 0].argsort(stable=True)
    by_class_N = shuffled_N[labels_N[shuffled_N].argsort(stable=True)]
    size_V = labels_N.bincount()
    first_V = size_V.cumsum(0) - size_V
    label_N = labels_N[by_class_N]
    relative_rank_N = torch.empty(len(labels_N), dtype=torch.float64)
    relative_rank_N[by_class_N] = (number_N - first_V[label_N] + 0.5).double() / size_V[label_N]
    chosen = shuffled_N[relative_rank_N[shuffled_N].argsort(stable=True)[:count]]
    return chosen.sort().values


def _limited(split: Split, count: int | None, seed: int) -> Split:
    if count is None or count >= len(split):
        return split
    if count < 1:
        raise ConfigError(f"a split cannot be limited to {count} samples; give 1 or more")
    return split.select(stratified(split.labels, count, seed))
