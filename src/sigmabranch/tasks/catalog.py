"""The named tasks. Constants that the paper does not state are our choice."""

from __future__ import annotations

import difflib
from dataclasses import replace

from sigmabranch.backbones import (
    ConvNeXtSpec,
    PointNet2Spec,
    ResNetSpec,
    ViTSpec,
    WideResNetSpec,
)
from sigmabranch.conversion import ConversionSpec
from sigmabranch.errors import ConfigError
from sigmabranch.tasks.task import DataSpec, Task
from sigmabranch.training import FinetuneRecipe, Recipe
from sigmabranch.tree import TreeSpec

_DIGITS = Task(
    name="digits-resnet",
    summary="scikit-learn's handwritten digits and a small ResNet: minutes on two CPU cores",
    data=DataSpec(name="digits"),
    model=ResNetSpec(
        layers=(1, 1, 2, 2),
        planes=(8, 16, 32, 64),
        strides=(1, 2, 2, 1),
        stem="cifar",
        stem_width=16,
        in_channels=1,
        classes=10,
    ),
    tree=TreeSpec(projection_dim=16),
    conversion=ConversionSpec(centred=True, balanced=True),
    dense=Recipe(epochs=30, batch_size=64, lr=0.1, warmup_epochs=2, label_smoothing=0.0),
    finetune=FinetuneRecipe(
        epochs=15,
        batch_size=64,
        lr=0.05,
        warmup_epochs=1,
        label_smoothing=0.0,
        node_grad_scale=True,
        resp_prior=True,
        balance_weight=0.3,
    ),
)

_CIFAR_SMALL = Task(
    name="cifar100-small",
    summary="CIFAR-100 and a ResNet of 0.57 M parameters: about an hour on two CPU cores",
    data=DataSpec(name="cifar100"),
    model=ResNetSpec(
        layers=(1, 2, 3, 2),
        planes=(12, 24, 48, 96),
        strides=(1, 2, 2, 1),
        stem="small",
        stem_width=16,
        classes=100,
    ),
    tree=TreeSpec(projection_dim=32),
    dense=Recipe(
        epochs=20, batch_size=128, lr=0.1, warmup_epochs=1, label_smoothing=0.0, clip_norm=5.0
    ),
    finetune=FinetuneRecipe(
        epochs=10,
        batch_size=128,
        lr=0.05,
        warmup_epochs=0.5,
        label_smoothing=0.0,
        clip_norm=5.0,
        node_grad_scale=True,
    ),
)

_CIFAR_CONDITIONS = replace(
    _CIFAR_SMALL,
    name="cifar100-conditions",
    summary="CIFAR-100 by day, at night, in fog and in infrared: hours on two CPU cores",
    data=DataSpec(name="cifar100-conditions"),
)

_CIFAR = Task(
    name="cifar100-resnet50",
    summary="the paper's CIFAR-100 row: ResNet-50, 200 + 60 epochs (wants a GPU)",
    data=DataSpec(name="cifar100"),
    model=ResNetSpec(stem="cifar", classes=100),
    dense=Recipe(epochs=200, precision="bf16"),
    finetune=FinetuneRecipe(epochs=60, precision="bf16"),
)

_CIFAR_WIDE = Task(
    name="cifar100-wrn28-10",
    summary="CIFAR-100 and a Wide ResNet-28-10, 200 + 60 epochs (wants a GPU)",
    data=DataSpec(name="cifar100"),
    model=WideResNetSpec(),
    dense=Recipe(epochs=200, batch_size=128, precision="bf16"),
    finetune=FinetuneRecipe(epochs=60, batch_size=128, precision="bf16"),
)

_CIFAR_VIT = Task(
    name="cifar100-vit",
    summary="CIFAR-100 and a ViT of 1.2 M parameters: hours on two CPU cores",
    data=DataSpec(name="cifar100"),
    model=ViTSpec(),
    dense=Recipe(
        epochs=30,
        batch_size=128,
        optimizer="adam",
        lr=1e-3,
        weight_decay=1e-5,
        warmup_epochs=2,
        clip_norm=1.0,
    ),
    finetune=FinetuneRecipe(
        epochs=10,
        batch_size=128,
        optimizer="adam",
        lr=5e-4,
        weight_decay=1e-5,
        warmup_epochs=0.5,
        clip_norm=1.0,
    ),
)

_CIFAR_CONVNEXT = Task(
    name="cifar100-convnext",
    summary="CIFAR-100 and a ConvNeXt of 0.63 M parameters: about an hour on two CPU cores",
    data=DataSpec(name="cifar100"),
    model=ConvNeXtSpec(
        layers=(1, 2, 3, 1),
        widths=(24, 48, 96, 192),
        strides=(1, 2, 2, 1),
        patch=2,
        # Seven would reach beyond maps of 4 x 4, and take half as long again on a CPU.
        kernel=3,
        classes=100,
    ),
    tree=TreeSpec(projection_dim=32),
    dense=Recipe(
        epochs=20,
        batch_size=128,
        optimizer="adam",
        lr=1e-3,
        weight_decay=1e-5,
        warmup_epochs=2,
        clip_norm=1.0,
    ),
    finetune=FinetuneRecipe(
        epochs=10,
        batch_size=128,
        optimizer="adam",
        lr=5e-4,
        weight_decay=1e-5,
        warmup_epochs=0.5,
        clip_norm=1.0,
    ),
)

_IMAGENET = Task(
    name="imagenet-resnet50",
    summary="the paper's ImageNet-1K row: ResNet-50, 90 + 100 epochs (wants GPUs)",
    data=DataSpec(name="imagenet", image_size=224),
    model=ResNetSpec(classes=1000),
    dense=Recipe(epochs=90, weight_decay=1e-4, precision="bf16"),
    finetune=FinetuneRecipe(epochs=100, weight_decay=1e-4, precision="bf16"),
)

_SHAPES = Task(
    name="shapes-pointnet2",
    summary="a dozen procedural solids and a small PointNet++: minutes on two CPU cores",
    data=DataSpec(name="shapes"),
    model=PointNet2Spec(
        centroids=(128, 32),
        neighbours=(16, 16),
        widths=((16, 16, 32), (32, 32, 64), (64, 128, 256)),
        connected=(128, 64),
        classes=12,
    ),
    tree=TreeSpec(widths=(128, 64), projection_dim=32),
    conversion=ConversionSpec(centred=True, balanced=True),
    dense=Recipe(
        epochs=20,
        batch_size=32,
        optimizer="adam",
        lr=2e-3,
        weight_decay=1e-4,
        decay_norm_and_bias=True,
        warmup_epochs=1,
        label_smoothing=0.0,
    ),
    finetune=FinetuneRecipe(
        epochs=10,
        batch_size=32,
        optimizer="adam",
        lr=1e-3,
        weight_decay=1e-4,
        decay_norm_and_bias=True,
        warmup_epochs=1,
        label_smoothing=0.0,
        resp_prior=True,
        balance_weight=0.3,
    ),
)

# The published PointNet++ recipe, which the paper says it follows.
_POINT_RECIPE = {
    "epochs": 200,
    "batch_size": 32,
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "decay_norm_and_bias": True,
    "schedule": "step",
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
}

_MODELNET = Task(
    name="modelnet40-pointnet2",
    summary="the paper's ModelNet40 row: PointNet++, 200 + 200 epochs (wants a GPU)",
    data=DataSpec(name="modelnet40"),
    model=PointNet2Spec(),
    tree=TreeSpec(widths=(512, 256)),
    dense=Recipe.from_dict(_POINT_RECIPE),
    finetune=FinetuneRecipe.from_dict(_POINT_RECIPE),
)

TASKS = {
    task.name: task
    for task in (
        _DIGITS,
        _SHAPES,
        _CIFAR_SMALL,
        _CIFAR_CONDITIONS,
        _CIFAR,
        _CIFAR_WIDE,
        _CIFAR_VIT,
        _CIFAR_CONVNEXT,
        _IMAGENET,
        _MODELNET,
    )
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none; the message lists the known ones.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"unknown task {name!r}: known are {', '.join(TASKS)}{hint}")
