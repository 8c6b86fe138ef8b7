"""What every way of predicting refuses: inputs it cannot take, answers that are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sigmabranch.errors import DataError, NumericError


def checked_input(x: Tensor, shape: tuple[int, ...], devices: Sequence[str] = ("cpu",)) -> Tensor:
    """One input with its batch axis, contiguous: images in channels-last memory, others as usual.

    Compiled code reads memory in the order that it was made for, whatever the strides say.

    Args:
        x: float32 of ``shape``, with or without a batch axis of one.
        shape: of one input.
        devices: where it may be.

    Raises:
        DataError: no plain tensor, one elsewhere, another shape or dtype, NaN or infinity.
    """
    if not isinstance(x, Tensor):
        raise DataError(
            f"the input is of type {type(x).__name__}, but the package takes one float32 tensor of "
            f"shape {shape}"
        )
    if x.layout != torch.strided or x.is_nested or x.device.type not in devices:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise DataError(
            f"the input is a {kind} tensor on {x.device}, but the package takes a plain (strided) "
            f"one on {' or '.join(devices)}"
        )
    if x.dtype != torch.float32 or tuple(x.shape) not in (shape, (1, *shape)):
        raise DataError(
            f"the input is {x.dtype} of shape {tuple(x.shape)}, but the package takes one "
            f"float32 input of shape {shape}"
        )
    if not x.isfinite().all():
        raise DataError("the input holds NaN or infinity: check what made it")
    x = x.detach().reshape(1, *shape)
    order = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return x.contiguous(memory_format=order)


def checked_branch(log_prob: Any) -> int:
    """The likeliest branch of a router's answer, a tensor or an array of any shape.

    Raises:
        NumericError: NaN, which would count as the largest.
    """
    branch = int(log_prob.argmax())
    if not math.isfinite(log_prob.reshape(-1)[branch]):
        raise NumericError("a router gave NaN or infinity for this input")
    return branch


def checked_logits(logits: Tensor) -> Tensor:
    """The logits, unless they are none (:class:`NumericError`)."""
    if not logits.isfinite().all():
        raise NumericError("the network gave NaN or infinite logits for this input")
    return logits
