"""Inputs to measure with: a task's own, or synthetic ones of the same shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sigmabranch.data import ResidentSplit, Split, input_shape
from sigmabranch.data.augment import CropFlip, ScaleShiftDrop
from sigmabranch.data.clouds import arrange, unchanged
from sigmabranch.data.split import Normalise
from sigmabranch.tasks import Task, open_task_data


def task_inputs(task: Task, samples: int, data: Path | None, device: torch.device) -> Split:
    """``samples`` training inputs of ``task`` from ``data``, or synthetic ones if it is None."""
    if data is None:
        return synthetic(task, samples, device)
    limited = replace(task, data=replace(task.data, train_limit=samples))
    return open_task_data(limited, data, device).train


def synthetic(task: Task, samples: int, device: torch.device) -> ResidentSplit:
    """A pattern per class under noise; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, task.model.classes, (samples,), generator=generator)
    shape = input_shape(task.data.name, task.data.image_size)
    make = _images if len(shape) == 3 else _clouds
    return make(shape, labels, device, generator)


def _images(
    shape: tuple[int, ...], labels: Tensor, device: torch.device, generator: torch.Generator
) -> ResidentSplit:
    """Smooth random patterns."""
    channels, height, width = shape
    classes = int(labels.max()) + 1
    coarse = torch.rand(classes, channels, 4, 4, generator=generator) * 255
    patterns = F.interpolate(coarse, size=(height, width), mode="bilinear").to(torch.uint8)
    noise = torch.randint(0, 64, (len(labels), *shape), generator=generator)
    images = patterns[labels] // 4 * 3 + noise.to(torch.uint8)
    middle = [0.5] * channels
    return ResidentSplit(
        inputs=images.to(device),
        labels=labels.to(device),
        augment=CropFlip(pad=0, flip=False),
        normalise=Normalise(middle, middle, device=device, channels_last=True),
    )


def _clouds(
    shape: tuple[int, ...], labels: Tensor, device: torch.device, generator: torch.Generator
) -> ResidentSplit:
    """Spheres, squeezed in a direction of their class."""
    axes = 0.3 + torch.rand(int(labels.max()) + 1, 1, 3, generator=generator)
    points = F.normalize(torch.randn(len(labels), *shape, generator=generator), dim=-1)
    return ResidentSplit(
        inputs=arrange(points * axes[labels], device),
        labels=labels.to(device),
        augment=ScaleShiftDrop(),
        normalise=unchanged,
    )


def batch(task: Task, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One batch of synthetic (inputs, labels)."""
    split = synthetic(task, size, device)
    return next(split.batches(torch.arange(size), size))
