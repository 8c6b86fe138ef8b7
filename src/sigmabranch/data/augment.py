"""Augmentation of a whole batch on its device, without a loop over samples.

B batch, C channels, H height, W width, P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sigmabranch.data.seeds import below, sample_bits, uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class CropFlip:
    """Pad with zeros, cut a window of the old size at a random place, mirror half of the images.

    Attributes:
        pad: border in pixels on each side; windows start at 0 ... 2 * pad.
        flip: mirror left-right with probability one half.
    """

    pad: int
    flip: bool

    def __call__(self, images_BCHW: Tensor, index_B: Tensor, seed: int) -> Tensor:
        """Augment a batch; sample ``index_B[b]`` always gets the same crop under one seed.

        Args:
            images_BCHW: any dtype.
            index_B: int64 sample numbers, on the device of the images.
            seed: this epoch's augmentation seed.

        Returns:
            A new tensor of the shape and dtype of ``images_BCHW``.
        """
        height, width = images_BCHW.shape[-2:]
        top_B, left_B, mirror_B = sample_bits(seed, index_B, 3).unbind(1)
        row_BH = self._window(top_B, height)
        col_BW = self._window(left_B, width)
        if self.flip:
            col_BW = torch.where(below(mirror_B, 2)[:, None] == 1, col_BW.flip(1), col_BW)
        padded = F.pad(images_BCHW, (self.pad,) * 4)
        return gather_windows(padded, row_BH, col_BW)

    def _window(self, bits_B: Tensor, size: int) -> Tensor:
        start_B = below(bits_B, 2 * self.pad + 1)
        return start_B[:, None] + torch.arange(size, device=bits_B.device)


def gather_windows(images_BCHW: Tensor, row_Bh: Tensor, col_Bw: Tensor) -> Tensor:
    """Take each image's own rows and columns: (B, C, H, W) -> (B, C, h, w)."""
    channels, width = images_BCHW.shape[1], images_BCHW.shape[3]
    pixel_Bhw = row_Bh[:, :, None] * width + col_Bw[:, None, :]
    pixel_BCp = pixel_Bhw.flatten(1)[:, None].expand(-1, channels, -1)
    windows_BCp = images_BCHW.flatten(2).gather(2, pixel_BCp)
    return windows_BCp.view(-1, channels, *pixel_Bhw.shape[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleShiftDrop:
    """Scale a point cloud, shift it, and replace some of its later points by its first one.

    The public recipe drops any of the points. Here the first half stays: a data set puts the
    farthest points first, and their order survives everything that is done here
    (:func:`sigmabranch.points.in_farthest_order`).

    Attributes:
        scale: least and greatest factor, one for all axes of a cloud.
        shift: greatest move along each axis, either way.
        drop: greatest share of the second half that is dropped; each cloud draws its own.
    """

    scale: tuple[float, float] = (0.8, 1.25)
    shift: float = 0.1
    drop: float = 0.875

    def __call__(self, clouds_BP3: Tensor, index_B: Tensor, seed: int) -> Tensor:
        """Augment a batch; sample ``index_B[b]`` is always altered alike under one seed.

        Args:
            clouds_BP3: float32.
            index_B: int64 sample numbers, on the device of the clouds.
            seed: this epoch's augmentation seed.

        Returns:
            A new tensor of the shape of ``clouds_BP3``.
        """
        kept = clouds_BP3.shape[1] // 2
        draws_BD = uniform(sample_bits(seed, index_B, 5 + clouds_BP3.shape[1] - kept))
        low, high = self.scale
        scale_B = low + (high - low) * draws_BD[:, 0]
        shift_B3 = self.shift * (2 * draws_BD[:, 1:4] - 1)
        is_dropped_BD = draws_BD[:, 5:] < self.drop * draws_BD[:, 4:5]
        moved_BP3 = clouds_BP3 * scale_B[:, None, None] + shift_B3[:, None]
        moved_BP3[:, kept:] = torch.where(
            is_dropped_BD[..., None], moved_BP3[:, :1], moved_BP3[:, kept:]
        )
        return moved_BP3
