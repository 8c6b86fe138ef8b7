"""Data sets by name."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from sigmabranch.data.cifar import ARCHIVE, PAGE, open_cifar100
from sigmabranch.data.embedded import open_digits
from sigmabranch.data.split import Dataset
from sigmabranch.errors import ConfigError, DataError

DATA_NAMES = ("digits", "cifar100", "imagenet")
_FIXED_SIZES = {"digits": 8, "cifar100": 32}
_CONTENTS = {
    "cifar100": f"one that holds {ARCHIVE} (the binary version) from {PAGE}, packed or unpacked",
    "imagenet": "one that holds train/<class>/*.JPEG and val/<class>/*.JPEG",
}


def open_data(
    name: str,
    folder: Path | str | None = None,
    *,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    channels_last: bool = False,
    workers: int | None = None,
) -> Dataset:
    """Open a data set.

    Args:
        name: one of :data:`DATA_NAMES`.
        folder: where its files lie; "digits" comes with scikit-learn and needs none.
        device: where batches are handed out; "digits" and "cifar100" stay there as a whole.
        image_size: side in pixels; free for "imagenet" (default 224), fixed for the others.
        channels_last: memory format of the batches.
        workers: processes that decode images ("imagenet" only); None: one a core, up to 16.

    Raises:
        ConfigError: an unknown name, or an image size that the data set does not have.
        DataError: files that are missing or damaged.
        MissingDependency: the reader's package is not installed.
    """
    check_data(name, image_size)
    if name == "digits":
        return open_digits(device, channels_last=channels_last)
    if folder is None:
        raise DataError(f"{name} needs a folder (--data): {_CONTENTS[name]}")
    if name == "cifar100":
        return open_cifar100(folder, device, channels_last=channels_last)
    from sigmabranch.data.imagenet import IMAGE_SIZE, open_imagenet  # noqa: PLC0415 (loads Pillow)

    return open_imagenet(
        folder,
        device,
        image_size=image_size or IMAGE_SIZE,
        channels_last=channels_last,
        workers=workers,
    )


def check_data(name: str, image_size: int | None) -> None:
    """Raise :class:`ConfigError` at a name or size that :func:`open_data` would refuse."""
    if name not in DATA_NAMES:
        near = difflib.get_close_matches(name, DATA_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown data set {name!r}; known: {', '.join(DATA_NAMES)}{hint}")
    fixed = _FIXED_SIZES.get(name)
    if fixed is not None and image_size not in (None, fixed):
        raise ConfigError(
            f"{name} images have {fixed} x {fixed} pixels, not {image_size}; leave image_size out"
        )
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size is {image_size}; give 1 or more pixels")
