"""What every way of predicting refuses: inputs it cannot take, answers that are none."""

from __future__ import annotations

import torch
from torch import Tensor

from sigmabranch.errors import DataError, NumericError


def checked_input(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One input with its batch axis, contiguous: images in channels-last memory, others as usual.

    Compiled code reads memory in the order that it was made for, whatever the strides say.

    Args:
        x: float32 of ``shape``, with or without a batch axis of one.
        shape: of one input.

    Raises:
        DataError: another shape or dtype, NaN or infinity.
    """
    if x.dtype != torch.float32 or tuple(x.shape) not in (shape, (1, *shape)):
        raise DataError(
            f"the input is {x.dtype} of shape {tuple(x.shape)}, but the package takes one "
            f"float32 input of shape {shape}"
        )
    if not x.isfinite().all():
        raise DataError("the input holds NaN or infinity: check what made it")
    x = x.reshape(1, *shape)
    order = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return x.contiguous(memory_format=order)


def checked_logits(logits: Tensor) -> Tensor:
    """The logits, unless they are none (:class:`NumericError`)."""
    if not logits.isfinite().all():
        raise NumericError("the network gave NaN or infinite logits for this input")
    return logits
