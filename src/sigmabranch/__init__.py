"""Turn a dense network into one that runs a single root-to-leaf path per input.

    net = sb.convert(dense, loader)        # dense model → branched net
    sb.finetune(net, loader, recipe)       # train all paths with soft routing
    sb.evaluate(net, test_loader)          # measure one path per input
    net.save("net"); net = sb.load("net")

Names are loaded on first use, so that importing the package costs no more than importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sigmabranch.version import __version__

if TYPE_CHECKING:
    from sigmabranch.backbones import (
        Backbone,
        ConvNeXt,
        ConvNeXtSpec,
        PointNet2,
        PointNet2Spec,
        ResNet,
        ResNetSpec,
        ViT,
        ViTSpec,
        WideResNet,
        WideResNetSpec,
        as_backbone,
    )
    from sigmabranch.conversion import (
        ConversionRecord,
        ConversionSpec,
        Proposal,
        convert,
        plan_budget,
        propose_tree,
        rebuild,
        single_path,
    )
    from sigmabranch.coupling import CouplingMap, SlicePlan, trace
    from sigmabranch.deploy import Package, Prediction, Runtime, StreamFilter, pack
    from sigmabranch.errors import SigmaBranchError
    from sigmabranch.explain import Explanation
    from sigmabranch.hub import from_hub, model_card, push_to_hub
    from sigmabranch.measure import cost as count
    from sigmabranch.measure import evaluate, evaluate_dense
    from sigmabranch.net import HardOutput, SigmaBranchNet, SoftOutput
    from sigmabranch.race import Best, best
    from sigmabranch.saving import load, save_dense
    from sigmabranch.training import FinetuneRecipe, Recipe, finetune, train
    from sigmabranch.tree import TreeSpec

_HOMES = {
    "sigmabranch.backbones": (
        "Backbone",
        "ConvNeXt",
        "ConvNeXtSpec",
        "PointNet2",
        "PointNet2Spec",
        "ResNet",
        "ResNetSpec",
        "ViT",
        "ViTSpec",
        "WideResNet",
        "WideResNetSpec",
        "as_backbone",
    ),
    "sigmabranch.conversion": (
        "ConversionRecord",
        "ConversionSpec",
        "Proposal",
        "convert",
        "plan_budget",
        "propose_tree",
        "rebuild",
        "single_path",
    ),
    "sigmabranch.coupling": ("CouplingMap", "SlicePlan", "trace"),
    "sigmabranch.deploy": ("Package", "Prediction", "Runtime", "StreamFilter", "pack"),
    "sigmabranch.errors": ("SigmaBranchError",),
    "sigmabranch.explain": ("Explanation",),
    "sigmabranch.hub": ("from_hub", "model_card", "push_to_hub"),
    "sigmabranch.measure": ("evaluate", "evaluate_dense"),
    "sigmabranch.net": ("HardOutput", "SigmaBranchNet", "SoftOutput"),
    "sigmabranch.race": ("Best", "best"),
    "sigmabranch.saving": ("load", "save_dense"),
    "sigmabranch.training": ("FinetuneRecipe", "Recipe", "finetune", "train"),
    "sigmabranch.tree": ("TreeSpec",),
}
_PLACES = {name: (home, name) for home, names in _HOMES.items() for name in names} | {
    "count": ("sigmabranch.measure", "cost"),
}

__all__ = [
    "Backbone",
    "Best",
    "ConvNeXt",
    "ConvNeXtSpec",
    "ConversionRecord",
    "ConversionSpec",
    "CouplingMap",
    "Explanation",
    "FinetuneRecipe",
    "HardOutput",
    "Package",
    "PointNet2",
    "PointNet2Spec",
    "Prediction",
    "Proposal",
    "Recipe",
    "ResNet",
    "ResNetSpec",
    "Runtime",
    "SigmaBranchError",
    "SigmaBranchNet",
    "SlicePlan",
    "SoftOutput",
    "StreamFilter",
    "TreeSpec",
    "ViT",
    "ViTSpec",
    "WideResNet",
    "WideResNetSpec",
    "__version__",
    "as_backbone",
    "best",
    "convert",
    "count",
    "evaluate",
    "evaluate_dense",
    "finetune",
    "from_hub",
    "load",
    "model_card",
    "pack",
    "plan_budget",
    "propose_tree",
    "push_to_hub",
    "rebuild",
    "save_dense",
    "single_path",
    "trace",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'sigmabranch' has no attribute {name!r}")
    home, attribute = _PLACES[name]
    return getattr(importlib.import_module(home), attribute)


def __dir__() -> list[str]:
    return __all__
