"""The layout of images during training."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from shell import ENVIRONMENT
from sigmabranch.training import DenseObjective, FabricEngine
from sigmabranch.training.learner import Learner
from sigmabranch.training.recipe import Recipe

# Runs as a process of its own, because what it guards against ends the process.
PROGRAM = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from sigmabranch.training import DenseObjective, FabricEngine, LoaderBatches, Recipe, fit
torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(4, 16, 1, stride=2), nn.Flatten(), nn.Linear(16 * 4 * 4, 4))
samples = TensorDataset(torch.randn(64, 4, 8, 8), torch.arange(64) % 4)
batches = LoaderBatches(DataLoader(samples, 8), seed=0)
recipe = Recipe(epochs=25, warmup_epochs=1)
fit(net, DenseObjective(recipe), batches, recipe, folder=sys.argv[1], engine=FabricEngine("cpu"))
print("trained")
"""


def test_a_narrow_strided_convolution_trains(tmp_path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path],
        env={**ENVIRONMENT, "MALLOC_CHECK_": "3"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("trained")


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
