"""Square images for the network out of pictures of any size: at random to train, central to test.

torch scales them, bilinear and anti-aliased like Pillow but in less time.

H height, W width, S side of the crop, in pixels.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sigmabranch.data.decode import Picture

# Shares of the image that a training crop covers, and its width over its height.
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# The short side of a test image is this much longer than the crop from its centre.
TEST_SCALE = 256 / 224
# A crop is decoded with at least so many times its pixels a side, so that it is the anti-aliased
# scaling which decides what it looks like.
SPARE_PIXELS = 2

Box = tuple[int, int, int, int]


def random_crop(picture: Picture, size: int, seed: int) -> Tensor:
    """A training crop, mirrored half of the time; its place follows from the seed alone.

    The picture is decoded at the smallest fraction of its size that leaves the crop
    ``SPARE_PIXELS`` times the pixels asked for; the box is then widened to that grid.

    Returns:
        (3, S, S) uint8.
    """
    rng = random.Random(seed)
    left, top, right, bottom = random_box(rng, picture.width, picture.height)
    spare = min(right - left, bottom - top) / (SPARE_PIXELS * size)
    shrink = max((s for s in picture.shrinks if s <= spare), default=1)
    rows = slice(top // shrink, -(-bottom // shrink))
    columns = slice(left // shrink, -(-right // shrink))
    crop = _scaled(picture.pixels(shrink)[rows, columns], size, size)
    return crop.flip(2) if rng.random() < 0.5 else crop


def centre_crop(pixels_HW3: np.ndarray, size: int, scale: float = TEST_SCALE) -> Tensor:
    """A test crop: the short side scaled to ``size`` * 256/224 pixels, then the central square.

    Args:
        pixels_HW3: uint8, of the picture's full size, as is usual where accuracies are compared.
        size: S.
        scale: another one than 256/224; 1 cuts nothing off the short side.

    Returns:
        (3, S, S) uint8.
    """
    factor = round(size * scale) / min(pixels_HW3.shape[:2])
    height, width = (int(side * factor + 1e-6) for side in pixels_HW3.shape[:2])
    left, top = round((width - size) / 2), round((height - size) / 2)
    scaled_3HW = _scaled(pixels_HW3, height, width)
    return scaled_3HW[:, top : top + size, left : left + size]


def random_box(rng: random.Random, width: int, height: int) -> Box:
    """A training crop: random area, ratio and place ("inception" crop, Szegedy et al., 2015).

    Returns:
        (left, top, right, bottom) in whole pixels inside the image. After ten boxes that do not
        fit, the largest one at the centre whose ratio is allowed.
    """
    low, high = CROP_RATIO
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.random() * (width - w + 1))
            top = int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _scaled(pixels_HW3: np.ndarray, height: int, width: int) -> Tensor:
    image_13HW = torch.from_numpy(pixels_HW3).permute(2, 0, 1)[None]
    return F.interpolate(image_13HW, (height, width), mode="bilinear", antialias=True)[0]
