"""An input as a browser can draw it: pixels of what the network sees, or points.

C channels, H height, W width, P points.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def preview(data: str, x: Tensor) -> dict[str, Any]:
    """JSON-able picture of one input of the data set ``data``.

    Args:
        data: its name.
        x: (C, H, W) normalised image or (P, 3) cloud, float32.

    Returns:
        ``points``, P lists of three; or ``width``, ``height``, ``channels`` and ``pixels``: bytes
        in base64, row by row, the channels of a pixel together.
    """
    if x.ndim == 2:
        return {"points": [[round(value, 3) for value in point] for point in x.tolist()]}
    mean, std = (torch.tensor(values)[:, None, None] for values in _normalisation(data))
    pixels_CHW = (255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8)
    channels, height, width = pixels_CHW.shape
    pixels = pixels_CHW.permute(1, 2, 0).contiguous().numpy().tobytes()
    encoded = base64.b64encode(pixels).decode()
    return {"width": width, "height": height, "channels": channels, "pixels": encoded}


def _normalisation(data: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of each channel, which the data set's images were normalised by."""
    if data == "imagenet":
        from sigmabranch.data import imagenet  # noqa: PLC0415 (loads Pillow)

        return imagenet.MEAN, imagenet.STD
    from sigmabranch.data import cifar, embedded  # noqa: PLC0415

    known = embedded if data == "digits" else cifar
    return known.MEAN, known.STD
