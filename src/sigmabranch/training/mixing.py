"""Views made of two samples, for function matching (Beyer et al., CVPR 2022).

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sigmabranch.errors import ConfigError


def mixup(x: Tensor, alpha: float) -> Tensor:
    """Each sample's weighted mean with another (Zhang et al., 2018); a new tensor like ``x``.

    Args:
        x: (B, ...) float inputs.
        alpha: the weight is drawn from Beta(α, α), once for the batch, by torch's generator.
    """
    return torch.lerp(x[torch.randperm(len(x)).to(x.device)], x, _weight(alpha))


def cutmix(x: Tensor, alpha: float) -> Tensor:
    """Each image with a rectangle of another (Yun et al., 2019); a new tensor like ``x``.

    Args:
        x: (B, C, H, W) images.
        alpha: the area that stays is drawn from Beta(α, α), once for the batch; the rectangle's
            centre is anywhere, so it may reach over the border.

    Raises:
        ConfigError: the inputs are no images.
    """
    if x.ndim != 4:
        raise ConfigError(
            f"recipe mix=cutmix needs images (B, C, H, W), got inputs of shape {tuple(x.shape)}: "
            "use mixup or none"
        )
    side = math.sqrt(1 - _weight(alpha))
    (top, bottom), (left, right) = (_span(size, side) for size in x.shape[2:])
    mixed = x.clone()
    other = torch.randperm(len(x)).to(x.device)
    mixed[:, :, top:bottom, left:right] = x[other, :, top:bottom, left:right]
    return mixed


def _span(size: int, side: float) -> tuple[int, int]:
    """Where a rectangle of ``side`` (a share) begins and ends along an axis, cut at the border."""
    centre, half = int(torch.randint(size, ())), round(side * size / 2)
    return max(0, centre - half), min(size, centre + half)


def _weight(alpha: float) -> float:
    return float(torch.distributions.Beta(alpha, alpha).sample())


MIXES = {"mixup": mixup, "cutmix": cutmix}
