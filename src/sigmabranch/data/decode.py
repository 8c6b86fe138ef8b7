"""Image files into pixels: plain JPEGs with simplejpeg where it is installed, the rest with Pillow.

Both run libjpeg-turbo and give the same pixels; simplejpeg takes less time because it decodes
straight into the array. Whatever it declines (CMYK, damage, other formats, bombs) is
Pillow's to judge, so that the same files are readable with and without it.

H height, W width in pixels.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np

from sigmabranch.errors import MissingDependency

try:
    from PIL import Image
except ImportError as missing:
    raise MissingDependency("pillow", "data", "reading image folders") from missing
try:
    import simplejpeg
except ImportError:
    simplejpeg = None  # type: ignore[assignment]

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# JPEGs come at 1/2, 1/4 and 1/8 of their size for less than at full size: each block of 8x8 pixels
# is rebuilt from its low frequencies. Eighths between these take longer than the full size.
_SHRINKS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image file whose header has been read.

    Attributes:
        encoded: the whole file.
        width: in pixels.
        height: in pixels.
        jpeg: it can be decoded at a fraction of its size.
        plain: simplejpeg decodes it.
    """

    encoded: bytes
    width: int
    height: int
    jpeg: bool
    plain: bool

    @property
    def shrinks(self) -> tuple[int, ...]:
        """What its sides can be divided by while decoding, ascending."""
        return _SHRINKS if self.jpeg else _SHRINKS[:1]

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """Decode.

        Args:
            shrink: one of ``shrinks``; a pixel then stands for a square of that side.

        Returns:
            (H, W, 3) uint8 RGB; its sides are the picture's over ``shrink``, rounded up.

        Raises:
            UNREADABLE: one of these, at a damaged file.
        """
        if self.plain:
            # It rejects damage that Pillow reads over.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(
                    self.encoded,
                    min_height=-(-self.height // shrink),
                    min_width=-(-self.width // shrink),
                    min_factor=shrink,
                )
        with Image.open(io.BytesIO(self.encoded)) as image:
            if shrink > 1:
                image.draft("RGB", (self.width // shrink, self.height // shrink))
            return np.array(image.convert("RGB"))


def read_picture(path: str) -> Picture:
    """Read a file and look at its header.

    Raises:
        UNREADABLE: one of these, at a file that is missing or not an image.
    """
    with open(path, "rb") as file:
        encoded = file.read()
    return _plain_jpeg(encoded) or _any_picture(encoded)


def _plain_jpeg(encoded: bytes) -> Picture | None:
    if simplejpeg is None or not simplejpeg.is_jpeg(encoded):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    bomb = Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS
    if bomb or colours not in ("YCbCr", "RGB", "Gray"):
        return None
    return Picture(encoded=encoded, width=width, height=height, jpeg=True, plain=True)


def _any_picture(encoded: bytes) -> Picture:
    with Image.open(io.BytesIO(encoded)) as image:
        width, height = image.size
        jpeg = image.format in ("JPEG", "MPO")
    return Picture(encoded=encoded, width=width, height=height, jpeg=jpeg, plain=False)
