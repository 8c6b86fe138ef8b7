"""The filters of a ResNet: where they are, and which stand or fall together.

A filter is a row of a convolution with its entry in the batch norm behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from sigmabranch.backbones import as_backbone
from sigmabranch.coupling import CouplingMap

#: Group name -> positions of the filters that stay, int64 ascending.
Kept: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterGroup:
    """Filters of which the i-th of every convolution stands or falls with the others' i-th.

    Attributes:
        convs: paths of the convolutions, in the network's order.
        scattered: behind what the missing channels are filled up with zeros, so that whoever
            reads on keeps the full width; None if readers shrink too.
    """

    convs: tuple[str, ...]
    scattered: Literal["conv", "norm"] | None = None

    @property
    def name(self) -> str:
        """Path of the first convolution."""
        return self.convs[0]

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the batch norms behind the convolutions, in the same order."""
        return tuple(map(norm_behind, self.convs))


def coupled_groups(model: nn.Module, coupling: CouplingMap) -> list[FilterGroup]:
    """Groups that can be removed for good: all that write to one residual stream are one."""
    together: dict[int, list[str]] = {}
    for conv in convolutions(model):
        first = int(coupling.axes[f"{conv}.weight"][0][0])
        together.setdefault(first, []).append(conv)
    return [FilterGroup(convs=tuple(convs)) for convs in together.values()]


def single_groups(model: nn.Module, coupling: CouplingMap) -> list[FilterGroup]:
    """Every convolution by itself; residual streams, to which several write, keep their width."""
    shared = {
        conv
        for group in coupled_groups(model, coupling)
        if len(group.convs) > 1
        for conv in group.convs
    }
    return [
        FilterGroup(convs=(conv,), scattered="norm" if conv in shared else None)
        for conv in convolutions(model)
    ]


def convolutions(model: nn.Module) -> list[str]:
    """Paths of a ResNet's convolutions: the stem's, then each block's, its shortcut's last."""
    stages = as_backbone(model).stages
    blocks = [
        f"{stage}.{name}"
        for stage in stages
        for name, _ in model.get_submodule(stage).named_children()
    ]
    leaves = ("conv1", "conv2", "conv3", "downsample.0")
    known = {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return [
        "conv1",
        *(path for block in blocks for leaf in leaves if (path := f"{block}.{leaf}") in known),
    ]


def is_shortcut(conv: str) -> bool:
    """Whether the convolution at a path is a block's shortcut."""
    return conv.endswith("downsample.0")


def norm_behind(conv: str) -> str:
    """Path of the batch norm that follows a convolution."""
    if is_shortcut(conv):
        return conv.removesuffix("0") + "1"
    owner, dot, leaf = conv.rpartition(".")
    return owner + dot + leaf.replace("conv", "bn")


def stage_of(conv: str) -> int:
    """1 and up for the stages of a ResNet, 0 for its stem."""
    stage, dot, _ = conv.partition(".")
    return int(stage.removeprefix("layer")) if dot else 0
