"""FPGM: remove the filters nearest to the geometric median (He et al., CVPR 2019, 1811.00250).

Shapes: N filters of a group, D weights of one filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sigmabranch.backbones import ResNetSpec
from sigmabranch.coupling import CouplingMap
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.filters import FilterGroup, coupled_groups, is_shortcut, single_groups
from sigmabranch.peers.masking import MaskedNet, MaskingObjective
from sigmabranch.peers.pruning import FilterPruning, kept_per_group, positions_of_best
from sigmabranch.peers.system import Trained, check_choices, share
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example


@dataclass(frozen=True, kw_only=True)
class Fpgm(FilterPruning):
    """Soft pruning by distance: masks are chosen anew every epoch, the masked go at the end.

    Attributes:
        rate: share of each layer's filters that the distance rule removes, rounded to the nearest
            number, which the parameters printed for ResNet-50 require.
        convention: which layers. ``"inner"``: those inside a block, which gives the parameters
            that are mostly quoted. ``"official"``: the authors' script, every convolution but the
            shortcuts', the residual stream keeping its width; the FLOPs that are mostly quoted
            count this, with a block's stride in its first convolution. ``"coupled"``: the residual
            stream is narrowed too.
        norm_rate: share that goes first by smallest L2 norm (the paper's FPGM-mix).
    """

    name: ClassVar[str] = "fpgm"
    summary: ClassVar[str] = "static: filters near the geometric median removed, softly"

    rate: float = 0.3
    convention: Literal["inner", "official", "coupled"] = "inner"
    norm_rate: float = 0.0

    def __post_init__(self) -> None:
        share("fpgm rate", self.rate)
        share("fpgm norm_rate", self.norm_rate)
        check_choices(self, "convention")

    def groups(self, model: nn.Module, coupling: CouplingMap) -> list[FilterGroup]:
        """What is removed together under the convention."""
        if self.convention == "official":
            return [g for g in single_groups(model, coupling) if not is_shortcut(g.name)]
        groups = coupled_groups(model, coupling)
        if self.convention == "inner":
            return [g for g in groups if len(g.convs) == 1 and "." in g.name]
        return groups

    def remaining(self, group: FilterGroup, size: int) -> int:
        """How many of ``size`` filters neither rule removes."""
        return size - round(self.norm_rate * size) - round(self.rate * size)

    def details(self, network: nn.Module, task: Task) -> dict[str, Any]:
        """The filters, and what the authors' script would print for the official convention."""
        found, spec = super().details(network, task), task.model
        scripted = self.convention == "official" and not self.norm_rate
        if scripted and isinstance(spec, ResNetSpec) and spec.block == "bottleneck":
            side = example(task).shape[-1]
            before, after = (_script_macs(spec, side, rate) for rate in (0.0, self.rate))
            found["script_flops_reduction_percent"] = 100 * (1 - after / before)
        return found

    def run(self, bench: Bench) -> Trained:
        """Train under masks with the bench's recipe, then remove what is masked."""
        self.check(bench.task)
        layout, recipe = self.layout(bench.task), bench.recipe
        net = MaskedNet(bench.dense(), layout.groups)
        objective = MaskingObjective(
            net,
            recipe,
            periods=recipe.epochs,
            choose=lambda epoch: self.chosen(net.network, layout.groups),
            teacher=bench.teacher(recipe),
        )
        bench.train(net, objective)
        kept = net.kept()
        return Trained(
            network=layout.cut(net.network, kept).eval(),
            recipe=recipe,
            epochs=bench.epochs,
            notes=kept_per_group(kept),
        )

    def chosen(self, network: nn.Module, groups: Sequence[FilterGroup]) -> dict[str, Tensor]:
        """Group name → positions of the filters that stay, by the network's present weights."""
        result = {}
        for group in groups:
            weights = [network.get_parameter(f"{conv}.weight") for conv in group.convs]
            result[group.name] = filters_to_keep(weights, self.rate, self.norm_rate)
        return result


def filters_to_keep(weights: Sequence[Tensor], rate: float, norm_rate: float = 0.0) -> Tensor:
    """Positions that FPGM leaves of one group; scores add up over its convolutions.

    Of equal filters, those of lower position go first.

    Args:
        weights: of each convolution, (N, ...).
        rate: share removed by distance, among those that the norm leaves.
        norm_rate: share removed by norm.

    Returns:
        int64, ascending, on the CPU.
    """
    filters = [weight.detach().flatten(1).double() for weight in weights]
    size = len(filters[0])
    norm_N = sum((filter_ND.norm(dim=1) for filter_ND in filters), torch.zeros(()))
    large = positions_of_best(_ascending(norm_N), size - round(norm_rate * size))
    distance_N = sum((_redundancy(filter_ND[large]) for filter_ND in filters), torch.zeros(()))
    return large[positions_of_best(_ascending(distance_N), len(large) - round(rate * size))]


def _script_macs(spec: ResNetSpec, side: int, rate: float) -> float:
    """Multiply-adds as the authors count: fractional widths, a block's stride in its first 1×1.

    Batch norms are not counted; every convolution but the shortcuts' puts out 1 − ``rate`` of its
    channels, and all but those inside a block read the full residual stream.
    """
    kept = 1 - rate
    kernel = 7 if spec.stem == "imagenet" else 3
    side //= 1 if spec.stem == "cifar" else 2
    inputs = spec.stem_width * kept
    total = side**2 * kernel**2 * spec.in_channels * inputs
    side //= 2 if spec.stem == "imagenet" else 1
    for blocks, planes, stride in zip(spec.layers, spec.planes, spec.strides, strict=True):
        side, outputs = side // stride, 4 * planes
        for number in range(blocks):
            inner = inputs * planes * kept + 9 * (planes * kept) ** 2 + planes * outputs * kept**2
            total += side**2 * (inner + (inputs * outputs if number == 0 else 0))
            inputs = outputs
    return total + inputs * spec.classes


def _redundancy(filter_ND: Tensor) -> Tensor:
    """Sum of each filter's distances to all; the products of the quick way would not be exact."""
    distance_NN = torch.cdist(filter_ND, filter_ND, compute_mode="donot_use_mm_for_euclid_dist")
    return distance_NN.sum(1)


def _ascending(score_N: Tensor) -> Tensor:
    return score_N.cpu().argsort(stable=True)
