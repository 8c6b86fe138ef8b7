"""Decoding: simplejpeg and Pillow give the same pixels and the same verdict on every file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("simplejpeg")
from sigmabranch.data import decode  # noqa: E402
from sigmabranch.data.decode import Unreadable, decode_apart, read_picture  # noqa: E402

PLAIN = {
    "colour": ("RGB", {}),
    "full chroma": ("RGB", {"subsampling": 0}),
    "progressive": ("RGB", {"progressive": True}),
    "RGB inside": ("RGB", {"keep_rgb": True}),
    "grey": ("L", {}),
}


def encoded(mode: str = "RGB", kind: str = "JPEG", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (101, 75, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def outcome(path: Path, shrink: int = 1) -> np.ndarray | str:
    """The pixels, or that there are none."""
    try:
        return read_picture(str(path)).pixels(shrink)
    except Unreadable:
        return "unreadable"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "image.JPEG"


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("form", PLAIN)
def test_both_decoders_give_the_same_pixels_at_every_fraction(
    form: str, shrink: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, options = PLAIN[form]
    file.write_bytes(encoded(mode, **options))
    assert read_picture(str(file)).plain
    ours = outcome(file, shrink)
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert not read_picture(str(file)).plain
    theirs = outcome(file, shrink)
    assert ours.shape == theirs.shape == (-(-101 // shrink), -(-75 // shrink), 3)
    # Equal where both bring the same libjpeg-turbo; another build may round differently.
    assert np.abs(ours.astype(int) - theirs).mean() < 1


@pytest.mark.parametrize(
    ("data", "jpeg"), [(encoded("CMYK"), True), (encoded(kind="PNG"), False)], ids=["CMYK", "PNG"]
)
def test_other_files_are_read_by_pillow_whatever_their_name(
    data: bytes, jpeg: bool, file: Path
) -> None:
    file.write_bytes(data)
    picture = read_picture(str(file))
    assert (picture.plain, picture.shrinks) == (False, (1, 2, 4, 8) if jpeg else (1,))
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(picture.pixels(), expected)


WHOLE = encoded()
DAMAGED = {
    "empty": b"",
    "no image": b"not a picture",
    "header only": WHOLE[:100],
    "half of it": WHOLE[: len(WHOLE) // 2],
    "end missing": WHOLE[:-2],
    "byte changed": WHOLE[:900] + bytes([WHOLE[900] ^ 255]) + WHOLE[901:],
    "text behind": WHOLE + b"more",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_verdict_on_damage_is_the_same_with_and_without_simplejpeg(
    damage: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(DAMAGED[damage])
    ours = outcome(file)
    monkeypatch.setattr(decode, "simplejpeg", None)
    theirs = outcome(file)
    assert isinstance(ours, str) == isinstance(theirs, str)
    assert isinstance(ours, str) == (damage not in ("byte changed", "text behind"))
    if not isinstance(ours, str):
        assert np.abs(ours.astype(int) - theirs).mean() < 1


@pytest.mark.parametrize("installed", [True, False])
def test_a_decompression_bomb_is_unreadable(
    installed: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(WHOLE)
    if not installed:
        monkeypatch.setattr(decode, "simplejpeg", None)
    assert not isinstance(outcome(file), str)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    assert isinstance(outcome(file), str)


# -- what a viewer shows -------------------------------------------------------------------------


def saved(image: object, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def both(data: bytes, file: Path) -> np.ndarray:
    """The pixels, which are the same in this process and in one of their own."""
    file.write_bytes(data)
    here = read_picture(str(file)).pixels()
    assert np.array_equal(here, decode_apart(data))
    return here


def test_grey_of_16_bits_is_scaled(file: Path) -> None:
    levels = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    found = both(saved(Image.fromarray(levels), "PNG"), file)
    assert np.array_equal(found, (levels >> 8).astype(np.uint8)[..., None].repeat(3, 2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str, file: Path) -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode != "P":
        image.putpixel((2, 0), (0, 0, 0, 128))
    found = both(saved(image.convert(mode), "PNG"), file)
    assert found[0, :2, 0].tolist() == [255, 0]
    assert mode == "P" or abs(int(found[0, 2, 0]) - 127) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_upright_at_every_fraction(kind: str, orientation: int, file: Path) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (32, 16))
    image.paste("white", (0, 0, 8, 16))
    data = saved(image, kind, exif=exif)
    found = both(data, file)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(found.astype(int) - expected).mean() < 1
    picture = read_picture(str(file))
    for shrink in picture.shrinks:
        half = picture.pixels(shrink)
        assert half.shape == (-(-picture.height // shrink), -(-picture.width // shrink), 3)


@pytest.mark.parametrize("kind", ["PPM", "TIFF", "ICO"])
def test_formats_that_are_not_named_are_refused_whatever_they_are_called(
    kind: str, tmp_path: Path
) -> None:
    data = saved(Image.new("RGB", (16, 16)), kind)
    (tmp_path / "image.png").write_bytes(data)
    for read in (lambda: read_picture(str(tmp_path / "image.png")), lambda: decode_apart(data)):
        with pytest.raises(Unreadable, match="no JPEG, PNG, WebP, GIF or BMP file"):
            read()


@pytest.mark.parametrize("damage", [name for name in DAMAGED if name != "text behind"])
def test_damage_in_a_process_of_its_own_is_one_line_or_the_same_pixels(
    damage: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "simplejpeg", None)
    file.write_bytes(DAMAGED[damage])
    here = outcome(file)
    try:
        assert np.array_equal(here, decode_apart(DAMAGED[damage]))
    except Unreadable as error:
        assert isinstance(here, str) and "\n" not in str(error) and str(error)


def test_scans_are_counted_where_they_are(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(progressive=True)
    monkeypatch.setattr(decode.pixels, "MOST_SCANS", 10)
    file.write_bytes(data + 20 * b"\xff\xda")  # behind the picture, as in a phone's short films
    assert not isinstance(outcome(file), str)
    monkeypatch.setattr(decode.pixels, "MOST_SCANS", 9)
    file.write_bytes(data)
    with pytest.raises(Unreadable, match="more than 9 scans"):
        read_picture(str(file))


def test_a_strip_is_unreadable(file: Path) -> None:
    """Scaled to a network's size, a small file of one would take gigabytes."""
    file.write_bytes(saved(Image.new("RGB", (1001, 1)), "PNG"))
    with pytest.raises(Unreadable, match="a strip of 1001 x 1"):
        read_picture(str(file))


def test_time_and_pixels_are_bounded_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Unreadable, match="more than 50 million pixels"):
        decode_apart(saved(Image.new("1", (10_000, 5_001)), "PNG"))
    monkeypatch.setattr(decode.pixels, "MOST_SECONDS", 0.001)
    with pytest.raises(Unreadable, match=r"takes more than 0\.001 seconds"):
        decode_apart(WHOLE)


def test_what_a_decoder_raises_is_always_unreadable(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise KeyError("a table\nof a decoder")

    file.write_bytes(WHOLE)
    monkeypatch.setattr(Image, "open", failing)
    with pytest.raises(Unreadable, match="a table"):
        read_picture(str(file))
