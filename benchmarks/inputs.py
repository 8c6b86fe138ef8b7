"""Images to measure with: a task's own, or synthetic ones of the same shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from sigmabranch.data import ResidentSplit, Split
from sigmabranch.data.augment import CropFlip
from sigmabranch.data.split import Normalise
from sigmabranch.tasks import Task, open_task_data
from sigmabranch.tasks.counting import image_size


def task_images(task: Task, samples: int, data: Path | None, device: torch.device) -> Split:
    """``samples`` training images of ``task`` from ``data``, or synthetic ones if it is None."""
    if data is None:
        return synthetic(task, samples, device)
    limited = replace(task, data=replace(task.data, train_limit=samples))
    return open_task_data(limited, data, device).train


def synthetic(task: Task, samples: int, device: torch.device) -> ResidentSplit:
    """Smooth random patterns, one per class, under noise; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    classes, channels, size = task.model.classes, task.model.in_channels, image_size(task)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    coarse = torch.rand(classes, channels, 4, 4, generator=generator) * 255
    patterns = F.interpolate(coarse, size=size, mode="bilinear").to(torch.uint8)
    noise = torch.randint(0, 64, (samples, channels, size, size), generator=generator)
    images = patterns[labels] // 4 * 3 + noise.to(torch.uint8)
    middle = [0.5] * channels
    return ResidentSplit(
        images=images.to(device),
        labels=labels.to(device),
        augment=CropFlip(pad=0, flip=False),
        normalise=Normalise(middle, middle, device=device, channels_last=True),
    )


def batch(task: Task, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of synthetic (images, labels)."""
    split = synthetic(task, size, device)
    return next(split.batches(torch.arange(size), size))
