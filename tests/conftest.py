"""A small dense network and small data that several rooms' tests convert."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shell import Shell
from sigmabranch.backbones import ResNet, ResNetSpec
from sigmabranch.backbones.timm import load_timm
from sigmabranch.errors import MissingDependency
from sigmabranch.tasks import Task, find_task

CLASSES = 5
REGISTRATION = "torch.onnx._internal.exporter._registration"
# Settings of a task that trains in a second.
TINY = (
    "model.layers=[1,1,1]",
    "model.planes=[2,3,4]",
    "model.strides=[1,2,1]",
    "model.stem_width=4",
    "tree.projection_dim=4",
    "data.train_limit=64",
    "data.test_limit=40",
    "dense.epochs=1",
    "dense.batch_size=32",
    "finetune.epochs=1",
    "finetune.batch_size=32",
    "conversion.restarts=2",
)

# Some tests ask for ONNX Runtime before the library does.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Tensors here are small, and other tests run on the other core.
torch.set_num_threads(1)


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and affines in place, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=generator)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = tensor[0].numel()
            tensor.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return net.eval()


@pytest.fixture(scope="session")
def timm() -> None:
    """For tests that need timm, which is an extra."""
    try:
        load_timm()
    except MissingDependency:
        pytest.skip("timm is not installed")


@pytest.fixture(scope="session")
def dense() -> ResNet:
    """A bottleneck ResNet with stages of 16, 16, 32 and 48 channels, on 1x8x8 images."""
    spec = ResNetSpec(
        layers=(1, 1, 2, 1),
        planes=(4, 4, 8, 12),
        strides=(1, 2, 1, 2),
        stem="cifar",
        stem_width=8,
        in_channels=1,
        classes=CLASSES,
    )
    net = ResNet(spec)
    randomise(net)
    return net


@pytest.fixture(scope="session")
def batches() -> list[tuple[Tensor, Tensor]]:
    """96 images of five classes, each class around an image of its own, in three batches."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % CLASSES
    centre = torch.randn(CLASSES, 1, 8, 8, generator=generator)
    x = centre[y] + 0.5 * torch.randn(96, 1, 8, 8, generator=generator)
    return list(zip(x.split(32), y.split(32), strict=True))


@pytest.fixture(scope="session")
def modelnet(tmp_path_factory) -> Path:
    """A folder with noisy ellipsoids in the form of ModelNet40's public HDF5 archive."""
    h5py = pytest.importorskip("h5py")
    folder = tmp_path_factory.mktemp("data") / "modelnet40_ply_hdf5_2048"
    folder.mkdir()
    (folder / "shape_names.txt").write_text("ball\nrod\nplate\n")
    rng = np.random.default_rng(0)
    axes = np.array([[1, 1, 1], [0.1, 0.1, 1], [1, 1, 0.1]])
    for split, count in (("train", 31), ("test", 12)):
        label = np.arange(count) % 3
        points = rng.standard_normal((count, 1030, 3)) * axes[label][:, None]
        with h5py.File(folder / f"ply_data_{split}0.h5", "w") as file:
            file["data"] = points.astype(np.float32)
            file["label"] = label.astype(np.uint8)[:, None]
        (folder / f"{split}_files.txt").write_text(f"data/{folder.name}/ply_data_{split}0.h5\n")
    return folder.parent


@pytest.fixture(scope="session")
def shell() -> Iterator[Shell]:
    """Runs command lines one after the other, for the price of one import."""
    shell = Shell()
    yield shell
    shell.close()


@pytest.fixture(scope="module")
def one_registry() -> Iterator[None]:
    """torch.onnx builds its table of operators anew for each export, which takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError, AttributeError):  # not a public part of torch
            registry = importlib.import_module(REGISTRATION).ONNXRegistry
            patch.setattr(registry, "from_torchlib", staticmethod(cache(registry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def task() -> Task:
    """Handwritten digits and a network of a few thousand weights."""
    return find_task("digits-resnet").with_settings(TINY)
