"""The only file that imports timm."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sigmabranch.errors import ConfigError, MissingDependency

# A library's operators vanish with the object that declared them.
_declared: list[torch.library.Library] = []


def create_timm(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model(name, **kwargs)``.

    Raises:
        MissingDependency: timm is not installed.
        ConfigError: timm knows no model of that name.
    """
    timm = load_timm()
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}: see timm.list_models()")
    return timm.create_model(name, **kwargs)


def create_regnet(factor: float, *, classes: int, channels: int, small: bool) -> nn.Module:
    """timm's RegNetY-200MF with all widths times ``factor``, untrained.

    Args:
        factor: of the width of the first stage and of their growth.
        classes: length of the output.
        channels: of the images.
        small: keep the last stages at an eighth of the image's side, not a 32nd.

    Raises:
        MissingDependency: timm is not installed.
        ConfigError: the rule that gives its widths does not make four stages of them.
    """
    load_timm()
    from timm.models.regnet import RegNet, RegNetCfg  # noqa: PLC0415

    step = 8  # of widths, in timm's generator
    config = RegNetCfg(
        w0=max(step, step * round(24 * factor / step)),
        wa=36.44 * factor,
        wm=2.49,
        group_size=step,
        depth=13,
        se_ratio=0.25,
    )
    stride = 8 if small else 32
    try:
        return RegNet(config, in_chans=channels, num_classes=classes, output_stride=stride)
    except AssertionError as error:
        raise ConfigError(f"no RegNetY of four stages has {factor:.2f} times the widths") from error


def timm_source(model: nn.Module) -> dict[str, Any] | None:
    """How to rebuild a timm model's skeleton, or None if its name alone does not say it all.

    A model built with unusual arguments has other shapes than its name gives; then its owner must
    supply the skeleton.
    """
    if not type(model).__module__.startswith("timm."):
        return None
    config = {
        "name": getattr(model, "pretrained_cfg", {}).get("architecture"),
        "num_classes": getattr(model, "num_classes", None),
        "in_chans": _input_channels(model),
    }
    try:
        with torch.device("meta"):
            same = build_timm(config)
    except (ConfigError, RuntimeError, TypeError, ValueError):
        return None
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (model, same)]
    return {"builder": "timm", "config": config} if shapes[0] == shapes[1] else None


def _input_channels(model: nn.Module) -> int:
    """What the first convolution reads."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 0)


def build_timm(config: Mapping[str, Any]) -> nn.Module:
    """An untrained timm model from :func:`timm_source`'s config; no file is ever read for it.

    Raises:
        ConfigError: settings other than name, num_classes and in_chans.
    """
    if set(config) != {"name", "num_classes", "in_chans"}:
        raise ConfigError(f"a timm skeleton takes name, num_classes, in_chans; got {list(config)}")
    return create_timm(str(config["name"]), **{key: int(config[key]) for key in _SIZES})


_SIZES = ("num_classes", "in_chans")


def load_timm() -> ModuleType:
    """The timm package, importable also where torchvision's compiled library is not.

    Raises:
        MissingDependency: timm or the torchvision it needs is not installed.
    """
    if "timm" not in sys.modules:
        _make_torchvision_importable()
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "timm", "timm", "a timm backbone") from error


def _make_torchvision_importable() -> None:
    """Declare the operators that torchvision decorates on import, if its own library cannot.

    A torchvision built for CUDA does not load its library beside a CPU-only torch, and importing it
    then fails because the operators are unknown. Nothing that timm runs calls them.
    """
    if torch.version.cuda is not None or "torchvision" in sys.modules or _declared:
        return
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is None or torchvision.origin is None:
        return
    if not _has_loadable_library(Path(torchvision.origin).parent):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def _has_loadable_library(folder: Path) -> bool:
    for library in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False
