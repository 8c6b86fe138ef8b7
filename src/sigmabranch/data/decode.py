"""Image files into pixels: plain JPEGs with simplejpeg where it is installed, the rest with Pillow.

Both run libjpeg-turbo and give the same pixels; simplejpeg takes less time because it decodes
straight into the array. Whatever it declines (CMYK, damage, other formats, turned pictures) is
Pillow's to judge, so that the same files are readable with and without it.

H height, W width in pixels.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sigmabranch.errors import DataError, MissingDependency

try:
    from PIL import Image

    from sigmabranch.data import pixels
except ImportError as missing:
    raise MissingDependency("pillow", "data", "reading image folders") from missing
try:
    import simplejpeg
except ImportError:
    simplejpeg = None  # type: ignore[assignment]

# JPEGs come at 1/2, 1/4 and 1/8 of their size for less than at full size: each block of 8x8 pixels
# is rebuilt from its low frequencies. Eighths between these take longer than the full size.
_SHRINKS = (1, 2, 4, 8)
# Its short side is scaled to the network's, and the long one with it.
MOST_RATIO = 1000


class Unreadable(DataError):
    """A file that is missing, damaged, or no picture of a format that is read; says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image file whose header has been read.

    Attributes:
        encoded: the whole file.
        width: in pixels, of the upright picture.
        height: likewise.
        jpeg: it can be decoded at a fraction of its size.
        plain: simplejpeg decodes it.
        whole: (H, W, 3) uint8 where reading the header has decoded it.
    """

    encoded: bytes
    width: int
    height: int
    jpeg: bool
    plain: bool
    whole: np.ndarray | None = None

    @property
    def shrinks(self) -> tuple[int, ...]:
        """What its sides can be divided by while decoding, ascending."""
        return _SHRINKS if self.jpeg else _SHRINKS[:1]

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """Decode.

        Args:
            shrink: one of ``shrinks``; a pixel then stands for a square of that side.

        Returns:
            (H, W, 3) uint8 RGB, upright, on white where it is transparent; its sides are the
            picture's over ``shrink``, rounded up.

        Raises:
            Unreadable: a damaged file.
        """
        if self.whole is not None:
            return self.whole
        if self.plain:
            # It rejects damage that Pillow reads over.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(
                    self.encoded,
                    min_height=-(-self.height // shrink),
                    min_width=-(-self.width // shrink),
                    min_factor=shrink,
                )
        with _unreadable(), pixels.open_image(self.encoded) as image:
            if shrink > 1:
                image.draft("RGB", (image.width // shrink, image.height // shrink))
            return np.array(pixels.shown(image))


def read_picture(path: str) -> Picture:
    """Read a file and look at its header.

    Raises:
        Unreadable: a file that is missing, no image, or a decompression bomb.
    """
    with _unreadable():
        with open(path, "rb") as file:
            encoded = file.read()
        with pixels.open_image(encoded) as image:
            if max(image.size) > MOST_RATIO * min(image.size):
                raise ValueError(f"it is a strip of {image.width} x {image.height} pixels")
            jpeg = pixels.is_jpeg(image)
            # Other formats may say only at their end how they are to be turned.
            whole = None if jpeg else np.array(pixels.shown(image))
            turned = pixels.orientation(image) if jpeg else 1
            width, height = image.size if turned < 5 else image.size[::-1]
            if whole is not None:
                height, width, _ = whole.shape
    return Picture(
        encoded=encoded,
        width=width,
        height=height,
        jpeg=jpeg,
        plain=jpeg and turned == 1 and _is_plain(encoded, width * height),
        whole=whole,
    )


def decode_apart(encoded: bytes) -> np.ndarray:
    """Decode a picture from anywhere in a process of its own, which is bounded in all it takes.

    Returns:
        (H, W, 3) uint8 RGB, as :meth:`Picture.pixels`.

    Raises:
        Unreadable: damage, another format, or too many pixels, scans, bytes or seconds.
    """
    # By its path, for importing this library would take longer than most pictures.
    program = [sys.executable, "-P", "-B", pixels.__file__]
    try:
        done = subprocess.run(
            program, input=encoded, capture_output=True, timeout=pixels.MOST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unreadable(f"it takes more than {pixels.MOST_SECONDS} seconds to decode") from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise Unreadable(reason if done.returncode == 1 else "decoding it takes too much")
    size, _, content = done.stdout.partition(b"\n")
    width, height = map(int, size.split())
    return np.frombuffer(bytearray(content), np.uint8).reshape(height, width, 3)


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    """Whatever a decoder raises at a foreign file, and there is no end to it, as one error."""
    try:
        yield
    except Exception as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error


def _is_plain(encoded: bytes, count: int) -> bool:
    """Whether simplejpeg reads a JPEG of so many pixels."""
    if simplejpeg is None or (Image.MAX_IMAGE_PIXELS or count) < count:
        return False
    try:
        colours = simplejpeg.decode_jpeg_header(encoded)[2]
    except ValueError:
        return False
    return colours in ("YCbCr", "RGB", "Gray")
