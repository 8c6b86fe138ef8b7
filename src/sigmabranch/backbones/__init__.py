"""Where a network may be cut: one thin adapter per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from sigmabranch.backbones.base import Backbone, GlobalAveragePool, Levels
from sigmabranch.backbones.pointnet2 import (
    PointNet2,
    PointNet2Spec,
    build_pointnet2,
    pointnet2_backbone,
)
from sigmabranch.backbones.resnet import ResNet, ResNetSpec, build_resnet, resnet_backbone
from sigmabranch.backbones.timm import build_timm
from sigmabranch.backbones.vit import ViT, ViTSpec, build_vit, vit_backbone
from sigmabranch.backbones.wide_resnet import (
    WideResNet,
    WideResNetSpec,
    build_wide_resnet,
    wide_resnet_backbone,
)
from sigmabranch.errors import CheckpointError, ConfigError

__all__ = [
    "FAMILIES",
    "Backbone",
    "GlobalAveragePool",
    "Levels",
    "ModelSpec",
    "PointNet2",
    "PointNet2Spec",
    "ResNet",
    "ResNetSpec",
    "ViT",
    "ViTSpec",
    "WideResNet",
    "WideResNetSpec",
    "as_backbone",
    "build",
]

#: The shape of a network that this library builds by itself.
ModelSpec: TypeAlias = ResNetSpec | PointNet2Spec | WideResNetSpec | ViTSpec
FAMILIES: Mapping[str, type[ModelSpec]] = {
    spec.family: spec for spec in (ResNetSpec, PointNet2Spec, WideResNetSpec, ViTSpec)
}

_ADAPTERS: tuple[Callable[[nn.Module], Backbone | None], ...] = (
    resnet_backbone,
    pointnet2_backbone,
    wide_resnet_backbone,
    vit_backbone,
)
_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "pointnet2": build_pointnet2,
    "resnet": build_resnet,
    "timm": build_timm,
    "vit": build_vit,
    "wide-resnet": build_wide_resnet,
}


def as_backbone(model: nn.Module | Backbone) -> Backbone:
    """Find the adapter that knows ``model``'s family.

    Raises:
        ConfigError: no adapter does; the message names what to pass instead.
    """
    if isinstance(model, Backbone):
        return model
    for adapter in _ADAPTERS:
        backbone = adapter(model)
        if backbone is not None:
            return backbone
    raise ConfigError(
        f"no adapter for {type(model).__name__}: pass a sigmabranch.Backbone that names its chain, "
        "stages, pool and head"
    )


def build(source: Mapping[str, Any]) -> nn.Module:
    """Rebuild a network's skeleton from :attr:`Backbone.source`; only known builders are run.

    Raises:
        CheckpointError: the builder is unknown to this version.
    """
    builder = _BUILDERS.get(str(source.get("builder")))
    if builder is None:
        raise CheckpointError(
            f"unknown network builder {source.get('builder')!r}: known are {sorted(_BUILDERS)}"
        )
    return builder(source.get("config", {}))
