"""What was printed for ResNet-50 on ImageNet-1K, by the Sigma-Branch paper and by others.

Only figures that were read there; what a source does not print is None. Nothing here was measured
by this library.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sigmabranch.tasks.paper import PAPER


class Printer(StrEnum):
    """Who printed a figure."""

    PAPER = "the Sigma-Branch paper's table"
    OWN = "the system's own paper or repository"


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One printed row.

    Attributes:
        title: of the row.
        printer: who printed it.
        top1, top5: percent.
        start: top-1 of the dense network that it starts from.
        params: active, in millions.
        flops: in units of 10^9.
        params_saved, flops_saved: percent of the dense network.
        counts: keys of the counts of ours that may explain it, as ``published_table`` takes them.
        note: what keeps the row from being compared, if anything does.
    """

    title: str
    printer: Printer
    top1: float | None = None
    top5: float | None = None
    start: float | None = None
    params: float | None = None
    flops: float | None = None
    params_saved: float | None = None
    flops_saved: float | None = None
    counts: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedAblation:
    """One row of the paper's ablation on ImageNet-1K.

    Attributes:
        title: of the row.
        settings: of this library that make the change; empty for the full method.
        top1: percent.
        balance: of the leaves, where it is known which of the printed ones belongs to the row.
    """

    title: str
    settings: tuple[str, ...]
    top1: float
    balance: float | None = None


def _fpgm(rate: float) -> tuple[str, ...]:
    return tuple(f"fpgm rate={rate} {name}" for name in ("inner", "official", "coupled"))


_IMAGENET = PAPER["imagenet-resnet50"]
_HRANK = tuple(f"hrank rates=62 {name}" for name in ("literal", "official", "physical"))
_HRANK_RATES = "Its layer rates are not published, so that nothing can be counted."
_MIXED = (
    "The parameters were computed by the Sigma-Branch paper, the FLOPs quoted from FPGM's script, "
    "which prunes further layers: the row mixes two conventions."
)


def _hrank_plus(schedule: str, params: float, flops: float, top1: float) -> Published:
    return Published(
        title=f"HRankPlus, {schedule} schedule, {params} M",
        printer=Printer.OWN,
        start=76.15,
        top1=top1,
        params=params,
        flops=flops,
    )


PUBLISHED: tuple[Published, ...] = (
    Published(
        title="Sigma-Branch",
        printer=Printer.PAPER,
        start=_IMAGENET.dense.top1,
        top1=_IMAGENET.branched.top1,
        params=_IMAGENET.branched.run,
        flops=_IMAGENET.branched.flops,
        params_saved=_IMAGENET.active_reduction,
        flops_saved=_IMAGENET.flops_reduction,
        counts=("sigma-branch",),
    ),
    Published(
        title="FPGM-30",
        printer=Printer.PAPER,
        params=16.96,
        flops_saved=42.2,
        counts=_fpgm(0.3),
        note=_MIXED,
    ),
    Published(
        title="FPGM-40",
        printer=Printer.PAPER,
        params=14.57,
        flops_saved=53.5,
        counts=_fpgm(0.4),
        note=_MIXED,
    ),
    Published(
        title="HRank-62",
        printer=Printer.PAPER,
        params=13.77,
        flops=1.55,
        counts=_HRANK,
        note="Filters that are gone are still counted as inputs of the next layer.",
    ),
    Published(
        title="SkipNet+SP",
        printer=Printer.PAPER,
        top1=70.03,
        params_saved=6.7,
        flops_saved=6.7,
        counts=("skipnet",),
        note="Equal savings on both axes, 1/15, suggest that blocks were counted: one of the 15 "
        "gated ones. SP is SkipNet's initialisation only; its own repository has a checkpoint of "
        "it for ResNet-50, whose accuracy there is not known to us.",
    ),
    Published(
        title="Narrow-DeepMoE-A",
        printer=Printer.PAPER,
        top1=66.27,
        params_saved=43.6,
        flops_saved=59.6,
        counts=("deepmoe",),
        note="There is no official code, and the method leaves much unspecified.",
    ),
    Published(
        title="FPGM-30",
        printer=Printer.OWN,
        start=76.15,
        top1=75.59,
        top5=92.63,
        flops_saved=42.2,
        counts=_fpgm(0.3),
    ),
    Published(
        title="FPGM-40",
        printer=Printer.OWN,
        start=76.15,
        top1=74.83,
        top5=92.32,
        flops_saved=53.5,
        counts=_fpgm(0.4),
    ),
    Published(
        title="HRank-44",
        printer=Printer.OWN,
        start=76.15,
        top1=74.98,
        top5=92.33,
        params=16.15,
        flops=2.30,
        note=_HRANK_RATES,
    ),
    Published(
        title="HRank-62",
        printer=Printer.OWN,
        start=76.15,
        top1=71.98,
        top5=91.01,
        params=13.77,
        flops=1.55,
        counts=_HRANK,
        note="Its count leaves the next layer's inputs in, as its authors say.",
    ),
    Published(
        title="HRank-76",
        printer=Printer.OWN,
        start=76.15,
        top1=69.10,
        top5=89.58,
        params=8.27,
        flops=0.98,
        note=_HRANK_RATES,
    ),
    _hrank_plus("step", 15.09, 2.26, 75.56),
    _hrank_plus("step", 11.05, 1.52, 74.19),
    _hrank_plus("cosine", 11.05, 1.52, 75.83),
    _hrank_plus("cosine", 11.81, 1.38, 75.60),
    _hrank_plus("step", 8.02, 0.95, 72.30),
    _hrank_plus("cosine", 6.56, 1.02, 74.24),
    Published(
        title="DecisioNet",
        printer=Printer.OWN,
        note="No figure for ResNet-50 on ImageNet-1K is known to us.",
    ),
)

PUBLISHED_ABLATION: tuple[PublishedAblation, ...] = (
    PublishedAblation(
        title="full method", settings=(), top1=_IMAGENET.branched.top1, balance=0.965
    ),
    PublishedAblation(
        title="random partition", settings=("conversion.channels=random",), top1=73.95
    ),
    PublishedAblation(title="λ = 0", settings=("finetune.resp_weight=0",), top1=73.34),
)
