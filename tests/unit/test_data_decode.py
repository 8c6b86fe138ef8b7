"""Decoding: simplejpeg and Pillow give the same pixels and the same verdict on every file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("simplejpeg")
from sigmabranch.data import decode  # noqa: E402
from sigmabranch.data.decode import UNREADABLE, read_picture  # noqa: E402

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
    except UNREADABLE:
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
