"""Handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

import torch

from sigmabranch.data.augment import CropFlip
from sigmabranch.data.split import Dataset, Normalise, ResidentSplit, stratified
from sigmabranch.errors import MissingDependency

TEST_SAMPLES = 500
SPLIT_SEED = 0
# Of the training images, scaled to 0..1; their pixels 0, 1, ..., 16 are stored as 0, 15, ..., 240.
MEAN, STD = (0.2868257,), (0.3536260,)


def open_digits(device: torch.device | str, *, channels_last: bool = False) -> Dataset:
    """The 1,797 digits, 1 x 8 x 8: 1,297 to train, a fixed stratified 500 to test.

    Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), as bundled
    with scikit-learn. Augmentation shifts by up to one pixel; digits are not mirrored.

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise MissingDependency("scikit-learn", "data", "the digits data set") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images * 15).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    everything = ResidentSplit(
        inputs=images.to(device),
        labels=labels.to(device),
        augment=CropFlip(pad=1, flip=False),
        normalise=Normalise(MEAN, STD, device=device, channels_last=channels_last),
    )
    test = stratified(labels, TEST_SAMPLES, SPLIT_SEED)
    is_train = torch.ones(len(labels), dtype=torch.bool).index_fill(0, test, False)
    return Dataset(
        name="digits",
        train=everything.select(is_train.nonzero()[:, 0]),
        test=everything.select(test),
        class_names=tuple("0123456789"),
        shape=(1, 8, 8),
    )
