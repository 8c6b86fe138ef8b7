"""One picture file as the network of a data set sees it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sigmabranch.data import cifar, imagenet
from sigmabranch.data.crops import TEST_SCALE, centre_crop
from sigmabranch.data.decode import UNREADABLE, read_picture
from sigmabranch.data.split import Normalise
from sigmabranch.errors import DataError

_WAYS = {
    "cifar100": (1.0, cifar.MEAN, cifar.STD),
    "imagenet": (TEST_SCALE, imagenet.MEAN, imagenet.STD),
}


def picture_input(name: str, path: Path | str, size: int) -> Tensor:
    """Read a picture for a network of the data set ``name``.

    Args:
        name: a data set of colour images.
        path: a picture in any format that Pillow reads.
        size: side of the network's input in pixels.

    Returns:
        (1, 3, size, size) float32, scaled, cropped and normalised as test images are.

    Raises:
        DataError: a data set without pictures, or a file that is none.
        MissingDependency: Pillow is not installed.
    """
    if name not in _WAYS:
        raise DataError(f"a network for {name} reads no pictures: choose samples of its data set")
    scale, mean, std = _WAYS[name]
    if not Path(path).is_file():
        raise DataError(f"{path} is no file")
    try:
        pixels_3HW = centre_crop(read_picture(str(path)), size, scale)
    except UNREADABLE as error:
        raise DataError(f"{path} is no picture that can be read: {error}") from error
    return Normalise(mean, std, device="cpu", channels_last=False)(pixels_3HW[None])
