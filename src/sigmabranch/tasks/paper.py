"""What the paper says about its three tasks, as data: constants (table II), results (table III).

Keys are settings as ``--set`` writes them, values as ``Task.to_dict`` gives them. Every setting of
a task of the paper stands in exactly one of the three lists below; a new one needs a mark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Source(StrEnum):
    """Where a constant comes from."""

    STATED = "stated"  # the paper says so, in words, a table or an equation
    FITTED = "fitted"  # it does not, but its printed counts single this value out
    OURS = "ours"  # it does not say; our choice


@dataclass(frozen=True, kw_only=True, slots=True)
class Printed:
    """One network's figures in table III, as printed.

    Attributes:
        stored, run: parameters of all branches and of one path, in millions.
        flops: of one path, in units of 10^9.
        top1, top5: accuracy in percent; None where the paper prints none.
        balance: entropy of the leaf usage, 1 being even.
    """

    stored: float
    run: float
    flops: float
    top1: float
    top5: float | None = None
    balance: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperTask:
    """One of the paper's tasks.

    Attributes:
        title: data and network, as the paper names them.
        stated: setting → the value that the paper states.
        fitted: setting → the value that its printed counts single out.
        open: the settings that it leaves to us.
        built_in: (section, what, value, source) of constants that no setting holds.
        dense, branched: its results.
        active_reduction, flops_reduction: percent, as printed.
        flops_per_mac: what a multiply-add counts in its FLOPs; found by fitting.
    """

    title: str
    stated: Mapping[str, Any]
    fitted: Mapping[str, Any]
    open: frozenset[str]
    built_in: tuple[tuple[str, str, str, Source], ...]
    dense: Printed
    branched: Printed
    active_reduction: float
    flops_reduction: float
    flops_per_mac: int = 1


def _both(**values: Any) -> dict[str, Any]:
    """The same settings of the dense training and of fine-tuning."""
    parts = ("dense", "finetune")
    return {f"{part}.{name}": value for part in parts for name, value in values.items()}


_STATED: Mapping[str, Any] = {
    "data.train_limit": None,
    "data.test_limit": None,
    "data.held_out": None,
    "tree.leaves": [[0, 0], [0, 1], [1, 0], [1, 1]],
    "tree.cuts": None,
    "tree.decide_after": None,
    "tree.trunk_share": None,
    "tree.tied": 0.0,
    "tree.delta": 0,
    "tree.entry": None,
    "tree.shares": None,
    "tree.heads": None,
    "conversion.inner": None,
    # Spherical k-means of the latents as they are, and channels by mean activation.
    "conversion.clusters": "latents",
    "conversion.channels": "activation",
    "conversion.projection": "random",
    "conversion.centred": False,
    "conversion.balanced": False,
    # Equations 5 to 8 have no further factor and no further term.
    "finetune.resp_prior": False,
    "finetune.class_target": False,
    "finetune.balance_weight": 0.0,
    "finetune.share_first": 0.0,
    "finetune.node_grad_scale": False,
    "finetune.distill_weight": 0.0,
    "finetune.distill_weight_end": None,
    "finetune.upcycle": 0.0,
}

_OPEN = frozenset(
    {
        "tree.projection_dropout",
        *(f"conversion.{name}" for name in
          ("samples", "shared_fraction", "restarts", "norm_samples", "affine_samples", "seed")),
        *(f"{part}.{name}" for part in ("dense", "finetune") for name in (
            "lr", "momentum", "betas", "weight_decay", "decay_norm_and_bias", "step_factor",
            "label_smoothing", "clip_norm", "distill_temperature", "precision", "compile",
            "ema_decay", "eval_every", "mix", "mix_alpha",
        )),
        "dense.distill_weight",
        "dense.distill_weight_end",
        *(f"finetune.{name}" for name in
          ("resp_weight_end", "resp_temperature", "resp_temperature_end", "groups")),
    }
)  # fmt: skip

_BUILT_IN = (
    ("tree", "router", "one linear layer on the latent, softmax", Source.STATED),
    ("tree", "latent", "pool, linear, layer norm, dropout; no activation", Source.STATED),
    ("tree", "latents", "one projection per router", Source.FITTED),
    ("conversion", "clusters per split", "2", Source.STATED),
    ("conversion", "k-means", "k-means++ seeds, at most 100 rounds", Source.OURS),
    ("conversion", "specific channels", "largest difference of mean activations", Source.OURS),
    ("finetune", "label smoothing", "in eq. 5, not in eq. 6", Source.OURS),
)

# ResNet-50 of timm, trained with SGD.
_IMAGES: Mapping[str, Any] = {
    **_STATED,
    "model.block": "bottleneck",
    "model.layers": [3, 4, 6, 3],
    "model.planes": [64, 128, 256, 512],
    "model.strides": [1, 2, 2, 2],
    "model.stem_width": 64,
    "model.in_channels": 3,
    "tree.projection_dim": 128,
    **_both(optimizer="sgd", batch_size=256, schedule="cosine", warmup_epochs=5.0),
    "finetune.resp_weight": 0.3,
}
_IMAGES_FITTED: Mapping[str, Any] = {"tree.widths": None, "tree.round_to": 1}
_IMAGES_OPEN = _OPEN | {"dense.step_epochs", "finetune.step_epochs"}
_IMAGES_BUILT_IN = (
    *_BUILT_IN,
    ("model", "stride of a bottleneck", "in its middle convolution", Source.FITTED),
    ("conversion", "inner channels", "largest L1 norm, once for both branches", Source.STATED),
    ("conversion", "heads", "the dense classifier's columns and bias", Source.STATED),
    ("tree", "width rule", "dense width / √(specializers of the level)", Source.STATED),
    ("tree", "level widths", "724, 1024 (inner 181, 256)", Source.FITTED),
)

PAPER: Mapping[str, PaperTask] = {
    "cifar100-resnet50": PaperTask(
        title="CIFAR-100 / ResNet-50",
        stated={
            **_IMAGES,
            "data.name": "cifar100",
            "data.image_size": None,
            "model.classes": 100,
            "dense.epochs": 200,
            "finetune.epochs": 60,
        },
        fitted={**_IMAGES_FITTED, "model.stem": "cifar"},
        open=_IMAGES_OPEN,
        built_in=(
            ("data", "augmentation", "crop with 4 px of padding, mirror", Source.OURS),
            *_IMAGES_BUILT_IN,
        ),
        dense=Printed(stored=23.71, run=23.71, flops=1.305, top1=76.99, top5=94.65),
        branched=Printed(
            stored=25.55, run=9.41, flops=0.888, top1=76.92, top5=95.30, balance=0.935
        ),
        active_reduction=60.3,
        flops_reduction=32.0,
    ),
    "imagenet-resnet50": PaperTask(
        title="ImageNet-1K / ResNet-50",
        stated={
            **_IMAGES,
            "data.name": "imagenet",
            "model.stem": "imagenet",
            "model.classes": 1000,
            "dense.epochs": 90,
            "finetune.epochs": 100,
        },
        fitted={**_IMAGES_FITTED, "data.image_size": 224},
        open=_IMAGES_OPEN,
        built_in=(
            ("data", "augmentation", "random resized crop, mirror", Source.OURS),
            *_IMAGES_BUILT_IN,
        ),
        dense=Printed(stored=25.56, run=25.56, flops=4.112, top1=76.54),
        branched=Printed(stored=29.25, run=10.34, flops=2.834, top1=74.82, balance=0.965),
        active_reduction=59.5,
        flops_reduction=31.1,
    ),
    "modelnet40-pointnet2": PaperTask(
        title="ModelNet40 / PointNet++",
        stated={
            **_STATED,
            "data.name": "modelnet40",
            "data.image_size": None,
            "model.classes": 40,
            "tree.widths": [512, 256],
            **_both(optimizer="adam", batch_size=32, epochs=200, schedule="step", step_epochs=20),
        },
        fitted={
            # The published network has 64 neighbours in its second set abstraction.
            "model.neighbours": [32, 32],
            "model.widths": [[64, 64, 128], [128, 128, 256], [256, 512, 1024]],
            "model.connected": [512, 256],
            "model.channels": 3,
            "tree.projection_dim": 128,
        },
        open=_OPEN
        | {
            *("model.centroids", "model.radii", "model.dropout", "tree.round_to"),
            *("dense.warmup_epochs", "finetune.warmup_epochs", "finetune.resp_weight"),
        },
        built_in=(
            *_BUILT_IN,
            ("data", "points", "1,024 of each cloud", Source.STATED),
            ("data", "augmentation", "scale, shift, drop points", Source.OURS),
            ("model", "biases", "in fully connected layers, not in shared ones", Source.FITTED),
            ("tree", "inner widths", "256, 256 at level 1; a head of 128", Source.FITTED),
            ("conversion", "inner channels, heads", "largest L1 norm", Source.OURS),
        ),
        dense=Printed(stored=1.47, run=1.47, flops=1.148, top1=90.15),
        branched=Printed(stored=1.46, run=0.61, flops=1.030, top1=91.25),
        active_reduction=58.3,
        flops_reduction=10.3,
        flops_per_mac=2,
    ),
}
