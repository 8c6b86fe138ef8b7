"""What kind of system each is (the paper's table I, for every system here)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """How a system decides what is read.

    Attributes:
        source: who describes it.
        unit: what is read or left out as one.
        decided: when: once for all inputs, or for each.
        by: what the structure is made from.
        labels: whether making the structure needs labels.
        pretrained: whether it begins with a trained dense network.
        same_bytes: whether every input reads equally many bytes.
    """

    source: str
    unit: str
    decided: str
    by: str
    labels: bool
    pretrained: bool
    same_bytes: bool


_ONCE, _EACH = "once", "per input"

#: System name → its traits; the controls have none.
TRAITS: Mapping[str, Traits] = {
    "sigma-branch": Traits(
        source="arXiv 2606.09924",
        unit="path",
        decided=_EACH,
        by="activations",
        labels=False,
        pretrained=True,
        same_bytes=True,
    ),
    "fpgm": Traits(
        source="He et al., CVPR 2019",
        unit="filter",
        decided=_ONCE,
        by="weights",
        labels=False,
        pretrained=True,
        same_bytes=True,
    ),
    "hrank": Traits(
        source="Lin et al., CVPR 2020",
        unit="filter",
        decided=_ONCE,
        by="activations",
        labels=False,
        pretrained=True,
        same_bytes=True,
    ),
    "l1": Traits(
        source="Li et al., ICLR 2017; Torch-Pruning",
        unit="filter",
        decided=_ONCE,
        by="weights",
        labels=False,
        pretrained=True,
        same_bytes=True,
    ),
    "taylor": Traits(
        source="Molchanov et al., CVPR 2019; Torch-Pruning",
        unit="filter",
        decided=_ONCE,
        by="gradients",
        labels=True,
        pretrained=True,
        same_bytes=True,
    ),
    "skipnet": Traits(
        source="Wang et al., ECCV 2018",
        unit="block",
        decided=_EACH,
        by="training",
        labels=False,
        pretrained=True,
        same_bytes=False,
    ),
    "deepmoe": Traits(
        source="Wang et al., UAI 2019",
        unit="channel",
        decided=_EACH,
        by="training",
        labels=False,
        pretrained=False,
        same_bytes=False,
    ),
    "decisionet": Traits(
        source="Gottlieb et al., 2022",
        unit="path",
        decided=_EACH,
        by="label confusion",
        labels=True,
        pretrained=False,
        same_bytes=True,
    ),
    "ffn-moe": Traits(
        source="CMoE, ACL 2026",
        unit="expert of neurons",
        decided="per token",
        by="activations",
        labels=False,
        pretrained=True,
        same_bytes=False,
    ),
}
