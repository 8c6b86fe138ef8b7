"""The only file that imports timm."""

from __future__ import annotations

import importlib
import importlib.util
import sys
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
