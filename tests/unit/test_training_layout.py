"""The layout of images during training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sigmabranch.training import DenseObjective, FabricEngine
from sigmabranch.training.learner import Learner
from sigmabranch.training.recipe import Recipe


@pytest.mark.parametrize(
    ("inputs", "stride", "layout"),
    [
        (3, 1, torch.channels_last),
        (8, 2, torch.channels_last),
        (3, 2, torch.contiguous_format),
    ],
)
def test_channels_come_last_where_that_is_safe(inputs, stride, layout) -> None:
    net = nn.Sequential(nn.Conv2d(inputs, 6, 1, stride), nn.Conv2d(6, 6, 3))
    recipe = Recipe(epochs=1, warmup_epochs=0)
    Learner(
        net, DenseObjective(recipe), recipe, FabricEngine("cpu"),
        steps_per_epoch=1, pass_size=8, seed=0,
    )  # fmt: skip
    assert net[1].weight.is_contiguous(memory_format=layout)
    other = {torch.channels_last, torch.contiguous_format} - {layout}
    assert not net[1].weight.is_contiguous(memory_format=other.pop())
