"""Crops: where they lie, how they are scaled, and what decoding at a fraction changes."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
from sigmabranch.data import crops  # noqa: E402
from sigmabranch.data.decode import Picture  # noqa: E402
from sigmabranch.data.single import picture_input  # noqa: E402
from sigmabranch.errors import DataError  # noqa: E402


def picture(pixels: np.ndarray, kind: str = "PNG") -> Picture:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=95)
    height, width = pixels.shape[:2]
    return Picture(
        encoded=file.getvalue(), width=width, height=height, jpeg=kind == "JPEG", plain=False
    )


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(height: int, width: int) -> np.ndarray:
    """Smooth colours with some texture, as in photographs."""
    coarse = Image.fromarray(noise(height // 16, width // 16))
    fine = Image.fromarray(noise(height // 2, width // 2))
    large = (part.resize((width, height), Image.Resampling.BICUBIC) for part in (coarse, fine))
    smooth, texture = (np.array(part, dtype=float) for part in large)
    return (0.8 * smooth + 0.2 * texture).astype(np.uint8)


def difference(a: torch.Tensor, b: np.ndarray | torch.Tensor) -> np.ndarray:
    """Of every value; arrays are (H, W, 3), crops (3, H, W)."""
    a_HW3, b_HW3 = (x if isinstance(x, np.ndarray) else x.permute(1, 2, 0).numpy() for x in (a, b))
    return np.abs(a_HW3.astype(int) - b_HW3)


def test_test_images_are_scaled_by_the_short_side_then_cut_at_the_centre() -> None:
    pixels = noise(36, 48)
    # 28 * 256/224 = 32 for the short side, 42 for the other; (42 - 28) / 2 = 7, (32 - 28) / 2 = 2.
    scaled = Image.fromarray(pixels).resize((42, 32), Image.Resampling.BILINEAR)
    usual = np.array(scaled.crop((7, 2, 35, 30)))
    assert difference(crops.centre_crop(pixels, 28), usual).max() <= 1
    turned = crops.centre_crop(np.rot90(pixels).copy(), 28)
    assert difference(turned, np.rot90(usual)).max() <= 1


@pytest.mark.parametrize("seed", range(6))
def test_training_images_are_the_box_of_their_seed_scaled_and_some_mirrored(seed: int) -> None:
    pixels = noise(90, 120)
    rng = random.Random(seed)
    left, top, right, bottom = crops.random_box(rng, 120, 90)
    box = Image.fromarray(pixels[top:bottom, left:right])
    usual = np.array(box.resize((16, 16), Image.Resampling.BILINEAR))
    if rng.random() < 0.5:
        usual = usual[:, ::-1]
    assert difference(crops.random_crop(picture(pixels), 16, seed), usual).max() <= 1


def test_scaling_down_is_anti_aliased() -> None:
    stripes = np.zeros((120, 120, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    crop = crops.centre_crop(stripes, 16)
    assert crop.min() >= 120 and crop.max() <= 135


@pytest.mark.parametrize("seed", range(6))
def test_a_shrunk_jpeg_gives_the_same_crop_to_within_a_few_levels(seed: int) -> None:
    shrunk = picture(photo(384, 512), "JPEG")
    whole = Picture(
        encoded=shrunk.encoded, width=shrunk.width, height=shrunk.height, jpeg=False, plain=False
    )
    a, b = (crops.random_crop(each, 32, seed) for each in (shrunk, whole))
    assert difference(a, b).mean() < 6
    # Another place in the picture is much farther away, so that a crop out of place would show.
    assert difference(a, crops.random_crop(whole, 32, seed + 100)).mean() > 16


def test_a_crop_is_decoded_with_at_least_twice_its_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded = []
    original = Picture.pixels
    monkeypatch.setattr(
        Picture, "pixels", lambda self, shrink=1: decoded.append(shrink) or original(self, shrink)
    )
    source = picture(noise(192, 256), "JPEG")
    for seed in range(20):
        left, top, right, bottom = crops.random_box(random.Random(seed), 256, 192)
        crops.random_crop(source, 12, seed)
        pixels = min(right - left, bottom - top) / decoded[-1]
        assert 24 <= pixels < 48 or (decoded[-1] == 8 and pixels >= 48)
    assert {2, 4} <= set(decoded)
    crops.random_crop(source, 128, 0)
    assert decoded[-1] == 1


def test_training_boxes_lie_inside_with_the_areas_and_ratios_allowed() -> None:
    rng = random.Random(0)
    boxes = np.array([crops.random_box(rng, 300, 200) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() == 0 and top.min() == 0
    assert right.max() == 300 and bottom.max() == 200
    width, height = right - left, bottom - top
    area, ratio = width * height / 60_000, width / height
    assert 0.075 < area.min() < 0.1 and area.max() > 0.8
    assert 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.36


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (1, 1), (3, 2)])
def test_extreme_images_have_a_box_and_crops(size: tuple[int, int]) -> None:
    width, height = size
    for seed in range(50):
        left, top, right, bottom = crops.random_box(random.Random(seed), width, height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    for kind in ("PNG", "JPEG"):
        thin = picture(noise(height, width), kind)
        for side in (1, 16):
            assert crops.random_crop(thin, side, 0).shape == (3, side, side)
        assert crops.centre_crop(thin.pixels(), 16).shape == (3, 16, 16)


@pytest.mark.parametrize("size", [(101, 1), (2, 201)])
def test_a_strip_is_no_input_of_a_network(size, tmp_path) -> None:
    """Scaled to the network's size, a small file of one would take gigabytes."""
    width, height = size
    Image.new("RGB", size).save(tmp_path / "strip.png")
    with pytest.raises(DataError, match=f"has {width} x {height} pixels: give a picture whose"):
        picture_input("imagenet", tmp_path / "strip.png", 16)
    Image.new("RGB", (100, 1)).save(tmp_path / "thin.png")
    assert picture_input("imagenet", tmp_path / "thin.png", 16).shape == (1, 3, 16, 16)
