"""One picture file as the network of a data set sees it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sigmabranch.data import cifar, imagenet
from sigmabranch.data.crops import TEST_SCALE, centre_crop
from sigmabranch.data.decode import Unreadable, decode_apart
from sigmabranch.data.split import Normalise
from sigmabranch.errors import DataError

_WAYS = {
    "cifar100": (1.0, cifar.MEAN, cifar.STD),
    "cifar100-conditions": (1.0, cifar.MEAN, cifar.STD),
    "imagenet": (TEST_SCALE, imagenet.MEAN, imagenet.STD),
}
# Its short side is scaled to the network's, and the long one with it.
MOST_RATIO = 100
MOST_BYTES = 100_000_000  # of a file


def picture_input(name: str, path: Path | str, size: int) -> Tensor:
    """Read a picture file for a network of the data set ``name``.

    Args:
        name: a data set of colour images.
        path: a JPEG, PNG, WebP, GIF or BMP file, whatever it is called.
        size: side of the network's input in pixels.

    Returns:
        (1, 3, size, size) float32, scaled, cropped and normalised as test images are.

    Raises:
        DataError: a data set without pictures, a file that is none or too large, or a strip.
        MissingDependency: Pillow is not installed.
    """
    _check_pictures(name)
    if not Path(path).is_file():
        raise DataError(f"{path} is no file")
    with open(path, "rb") as file:
        encoded = file.read(MOST_BYTES + 1)
    if len(encoded) > MOST_BYTES:
        raise DataError(f"{path} is larger than {MOST_BYTES / 1e6:.0f} MB: give a smaller picture")
    return encoded_input(name, encoded, size, what=str(path))


def encoded_input(name: str, encoded: bytes, size: int, *, what: str) -> Tensor:
    """What :func:`picture_input` gives, of a file's content that errors call ``what``."""
    _check_pictures(name)
    scale, mean, std = _WAYS[name]
    try:
        pixels_HW3 = decode_apart(encoded)
    except Unreadable as error:
        raise DataError(f"{what} is no picture that can be read: {error}") from error
    height, width, _ = pixels_HW3.shape
    if max(width, height) > MOST_RATIO * min(width, height):
        raise DataError(
            f"{what} has {width} x {height} pixels: give a picture whose long side is at most "
            f"{MOST_RATIO} times its short one"
        )
    pixels_3HW = centre_crop(pixels_HW3, size, scale)
    return Normalise(mean, std, device="cpu", channels_last=False)(pixels_3HW[None])


def _check_pictures(name: str) -> None:
    if name not in _WAYS:
        raise DataError(f"a network for {name} reads no pictures: choose samples of its data set")
