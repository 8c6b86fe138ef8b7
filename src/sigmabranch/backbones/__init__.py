"""Where a network may be cut: one thin adapter per family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sigmabranch.backbones.base import Backbone, Levels
from sigmabranch.backbones.chain import chain_backbone
from sigmabranch.backbones.convnext import (
    ConvNeXt,
    ConvNeXtSpec,
    build_convnext,
    convnext_backbone,
)
from sigmabranch.backbones.pointnet2 import (
    PointNet2,
    PointNet2Spec,
    build_pointnet2,
    pointnet2_backbone,
)
from sigmabranch.backbones.pools import GlobalAveragePool
from sigmabranch.backbones.resnet import ResNet, ResNetSpec, build_resnet, resnet_backbone
from sigmabranch.backbones.timm import build_timm, timm_source
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
    "OWN",
    "Backbone",
    "ConvNeXt",
    "ConvNeXtSpec",
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
    "rebuilt",
    "source_of",
]

#: The shape of a network that this library builds by itself.
ModelSpec: TypeAlias = ResNetSpec | PointNet2Spec | WideResNetSpec | ViTSpec | ConvNeXtSpec
FAMILIES: Mapping[str, type[ModelSpec]] = {
    spec.family: spec for spec in (ResNetSpec, PointNet2Spec, WideResNetSpec, ViTSpec, ConvNeXtSpec)
}

#: The builder of a network that only its owner can build.
OWN = "own"

_ADAPTERS: tuple[Callable[[nn.Module], Backbone | None], ...] = (
    resnet_backbone,
    pointnet2_backbone,
    wide_resnet_backbone,
    vit_backbone,
    convnext_backbone,
)
_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "convnext": build_convnext,
    "pointnet2": build_pointnet2,
    "resnet": build_resnet,
    "timm": build_timm,
    "vit": build_vit,
    "wide-resnet": build_wide_resnet,
}


def as_backbone(
    model: nn.Module | Backbone, example: Tensor | None = None, *, pool: str = "mean"
) -> Backbone:
    """Where a network may be cut: by its family's adapter, or by following its forward.

    Args:
        model: (B, ...) → (B, V) logits.
        example: a legal input, (1, ...) on the model's device; needed for a network that no
            adapter knows.
        pool: what routers see of such a network's features: ``"mean"`` over all positions or
            ``"first"`` of the tokens.

    Raises:
        ConfigError: no adapter knows the network and no example is given.
        ConversionError: the network's forward cannot be followed, or not be cut.
    """
    if isinstance(model, Backbone):
        return model
    for adapter in _ADAPTERS:
        backbone = adapter(model)
        if backbone is not None:
            return backbone
    if example is None:
        raise ConfigError(
            f"no adapter for {type(model).__name__}: pass an example input, so that its forward "
            "can be followed, or a sigmabranch.Backbone that names its chain, stages, pool and head"
        )
    backbone = chain_backbone(model, example, pool)
    how = {"input": list(example.shape[1:]), "pool": pool}
    return replace(backbone, source={**(source_of(model) or {"builder": OWN}), **how})


def source_of(model: nn.Module) -> dict[str, Any] | None:
    """How to rebuild a network's skeleton, or None if only its owner can."""
    return getattr(model, "skeleton_source", None) or timm_source(model)


def rebuilt(
    source: Mapping[str, Any] | None, model: nn.Module | Backbone | None = None
) -> Backbone:
    """The backbone that ``source`` describes, without values (meta device).

    Args:
        source: :attr:`Backbone.source`.
        model: a network of the same shape, for those that only their owner can build; it is read,
            never changed.

    Raises:
        ConfigError: ``source`` says too little and no model is given.
        CheckpointError: its builder is unknown to this version.
    """
    source = source or {"builder": OWN}
    if isinstance(model, Backbone):
        return replace(model, model=copy.deepcopy(model.model).to("meta"))
    if model is None and source.get("builder") == OWN:
        raise ConfigError("only the network's owner can build it")
    if model is None:
        with torch.device("meta"):
            model = build(source)
    if "input" not in source:
        backbone = as_backbone(model)
    else:
        example = torch.zeros(1, *source["input"], device=next(model.parameters()).device)
        backbone = as_backbone(model, example, pool=source["pool"])
    return replace(backbone, model=copy.deepcopy(backbone.model).to("meta"), original=None)


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
