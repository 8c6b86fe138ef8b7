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
    "cifar100-conditions": (1.0, cifar.MEAN, cifar.STD),
    "imagenet": (TEST_SCALE, imagenet.MEAN, imagenet.STD),
}
# Its short side is scaled to the network's, and the long one with it.
MOST_RATIO = 100


def picture_input(name: str, path: Path | str, size: int) -> Tensor:
    """Read a picture for a network of the data set ``name``.

    Args:
        name: a data set of colour images.
        path: a picture in any format that Pillow reads.
        size: side of the network's input in pixels.

    Returns:
        (1, 3, size, size) float32, scaled, cropped and normalised as test images are.

    Raises:
        DataError: a data set without pictures, a file that is none, or a strip.
        MissingDependency: Pillow is not installed.
    """
    if name not in _WAYS:
        raise DataError(f"a network for {name} reads no pictures: choose samples of its data set")
    scale, mean, std = _WAYS[name]
    if not Path(path).is_file():
        raise DataError(f"{path} is no file")
    try:
        picture = read_picture(str(path))
        short, long = sorted((picture.width, picture.height))
        if long > MOST_RATIO * short:
            raise DataError(
                f"{path} has {picture.width} x {picture.height} pixels: give a picture whose long "
                f"side is at most {MOST_RATIO} times its short one"
            )
        pixels_3HW = centre_crop(picture, size, scale)
    except UNREADABLE as error:
        raise DataError(f"{path} is no picture that can be read: {error}") from error
    return Normalise(mean, std, device="cpu", channels_last=False)(pixels_3HW[None])
