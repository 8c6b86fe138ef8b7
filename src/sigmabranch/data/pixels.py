"""Pillow's part in reading pictures: what a viewer shows, and nothing that Pillow need not do.

Run by its path it is a program that decodes standard input within bounds and may then be killed.
For that it starts fast: it imports Pillow alone, and nothing of this library.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings

from PIL import Image, ImageOps, WebPImagePlugin  # noqa: F401 (else Pillow looks for all formats)

# Pillow knows more, some of which run programs. Files are what they hold, not what they are called.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
NAMES = "JPEG, PNG, WebP, GIF or BMP"
# Encoders write about ten, and each scan of a JPEG goes over the whole picture.
MOST_SCANS = 100
# The program's, for one picture.
MOST_PIXELS = 50_000_000
MOST_SECONDS = 20
MOST_MEMORY = 2 << 30

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_DEEP_MODES = ("I", "I;16")  # grey levels of 16 bits
_ORIENTATION = 0x0112  # of EXIF: 1 is upright, up to 8 ways to turn or mirror
# A marker, after which a JPEG says how long its segment is; the others belong to a scan.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")


def open_image(encoded: bytes) -> Image.Image:
    """The header of a file's content.

    Raises:
        Exception: of any kind, as Pillow does; ``ValueError`` for another format or too many scans.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"it is no {NAMES} file") from error
    if is_jpeg(image) and not _has_few_scans(encoded):
        raise ValueError(f"it has more than {MOST_SCANS} scans")
    return image


def is_jpeg(image: Image.Image) -> bool:
    """Whether it can be decoded at a fraction of its size."""
    return image.format in ("JPEG", "MPO")


def orientation(image: Image.Image) -> int:
    """How it is to be turned, 1 to 8, by EXIF; 1, not at all, where that cannot be read."""
    with contextlib.suppress(Exception):  # a damaged note leaves the picture as it is
        found = image.getexif().get(_ORIENTATION, 1)
        return found if found in range(1, 9) else 1
    return 1


def shown(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: RGB, upright, on white where it is transparent.

    Raises:
        Exception: of any kind, as Pillow does; ``ValueError`` for pixels whose scale is not known.
    """
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    clear = image.info.get("transparency")
    if image.mode in _DEEP_MODES:
        if clear is not None:
            raise ValueError("it has 16 bits and a transparent level: save it with 8 bits")
        # Converting would cut off at 255; of colours Pillow keeps the upper 8 bits, too.
        image = image.point(lambda level: level * (1 / 256)).convert("L")
    if image.mode not in _MODES:
        raise ValueError(f"it has pixels of mode {image.mode}: save it with 8 bits")
    if isinstance(clear, tuple) and max(clear) > 255:
        raise ValueError("it has 16 bits and a transparent colour: save it with 8 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def _has_few_scans(encoded: bytes) -> bool:
    if encoded.count(b"\xff\xda") <= MOST_SCANS:
        return True  # as nearly always, without a look at every byte
    place = scans = 0
    while (marker := _MARKER.search(encoded, place)) and marker[1] != b"\xd9":
        place = marker.end()
        if marker[1] != b"\xd8":
            place += int.from_bytes(encoded[place : place + 2])
        scans += marker[1] == b"\xda"
    return scans <= MOST_SCANS


def _limit() -> None:
    """Bound what this process may take, where the system can."""
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with contextlib.suppress(ImportError):
        import resource  # noqa: PLC0415 (not everywhere)

        for kind, most in (
            (resource.RLIMIT_AS, MOST_MEMORY),
            (resource.RLIMIT_CPU, MOST_SECONDS),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(kind, (most, most))


def _main() -> None:
    """Width and height as text and the pixels, or an exit code of 1 and the reason."""
    _limit()
    try:
        image = shown(open_image(sys.stdin.buffer.read()))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        sys.exit(f"it has more than {MOST_PIXELS // 1_000_000} million pixels")
    except MemoryError:
        sys.exit("it takes too much memory")
    except Exception as error:  # Pillow raises whatever a decoder does
        sys.exit(str(error) or type(error).__name__)
    sys.stdout.buffer.write(b"%d %d\n" % image.size)
    sys.stdout.buffer.write(image.tobytes())


if __name__ == "__main__":
    _main()
