"""Data sets by name."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from sigmabranch.data.cifar import ARCHIVE, PAGE, open_cifar100
from sigmabranch.data.clouds import POINTS
from sigmabranch.data.conditions import under_conditions
from sigmabranch.data.embedded import open_digits
from sigmabranch.data.modelnet import HDF5_FOLDER, TEXT_FOLDER, open_modelnet40
from sigmabranch.data.shapes import open_shapes
from sigmabranch.data.split import Dataset
from sigmabranch.errors import ConfigError, DataError

# Of one input. Images of folders are scaled to any size, by default to this one.
_SHAPES: dict[str, tuple[int, ...]] = {
    "digits": (1, 8, 8),
    "cifar100": (3, 32, 32),
    "cifar100-conditions": (3, 32, 32),
    "imagenet": (3, 224, 224),
    "modelnet40": (POINTS, 3),
    "shapes": (POINTS, 3),
}
DATA_NAMES = tuple(_SHAPES)
#: Data sets that need no folder.
EMBEDDED = ("digits", "shapes")
_CIFAR = f"one that holds {ARCHIVE} (the binary version) from {PAGE}, packed or unpacked"
_CONTENTS = {
    "cifar100": _CIFAR,
    "cifar100-conditions": _CIFAR,
    "modelnet40": f"one that holds {HDF5_FOLDER} or {TEXT_FOLDER}",
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
        folder: where its files lie; "digits" (they come with scikit-learn) and "shapes" need none.
        device: where batches are handed out; all data sets but "imagenet" stay there as a whole.
        image_size: side in pixels; free for "imagenet" (default 224), fixed for other images.
        channels_last: memory format of batches of images.
        workers: processes that decode images ("imagenet" only); None: one a core, up to 16.

    Raises:
        ConfigError: an unknown name, or an image size that the data set does not have.
        DataError: files that are missing or damaged.
        MissingDependency: the reader's package is not installed.
    """
    shape = input_shape(name, image_size)
    if name == "digits":
        return open_digits(device, channels_last=channels_last)
    if name == "shapes":
        return open_shapes(device)
    if folder is None:
        raise DataError(f"{name} needs a folder (--data): {_CONTENTS[name]}")
    if name in ("cifar100", "cifar100-conditions"):
        plain = open_cifar100(folder, device, channels_last=channels_last)
        return plain if name == "cifar100" else under_conditions(plain, name)
    if name == "modelnet40":
        return open_modelnet40(folder, device)
    from sigmabranch.data.imagenet import open_imagenet  # noqa: PLC0415 (loads Pillow)

    return open_imagenet(
        folder, device, image_size=shape[-1], channels_last=channels_last, workers=workers
    )


def input_shape(name: str, image_size: int | None = None) -> tuple[int, ...]:
    """Shape of one input, known without opening the data: (C, H, W) or (P, 3).

    Raises:
        ConfigError: an unknown name, or an image size that the data set does not have.
    """
    check_data(name, image_size)
    shape = _SHAPES[name]
    return shape if image_size is None else (shape[0], image_size, image_size)


def check_data(name: str, image_size: int | None) -> None:
    """Raise :class:`ConfigError` at a name or size that :func:`open_data` would refuse."""
    if name not in DATA_NAMES:
        near = difflib.get_close_matches(name, DATA_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown data set {name!r}; known: {', '.join(DATA_NAMES)}{hint}")
    if image_size is None:
        return
    *channels, height, width = _SHAPES[name]
    if not channels:
        raise ConfigError(f"{name} holds point clouds, which have no image_size; leave it out")
    if name != "imagenet" and image_size != width:
        raise ConfigError(
            f"{name} images have {height} x {width} pixels, not {image_size}; leave image_size out"
        )
    if image_size < 1:
        raise ConfigError(f"image_size is {image_size}; give 1 or more pixels")
