"""What systems that remove filters share: which stand or fall together, how many stay, the cut.

A filter is a row of a convolution with its entry in the batch norm behind it.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn

from sigmabranch.backbones import ResNetSpec, as_backbone
from sigmabranch.coupling import CouplingMap, SlicePlan, Space, plan_slices, trace
from sigmabranch.errors import ConfigError
from sigmabranch.peers.system import System
from sigmabranch.tasks import Task

# Couplings do not depend on an image's size, so they are traced on a small one.
_TRACED_SIDE = 64
# Rates are searched in steps of one part in so many.
_RATE_STEPS = 10_000

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


class Scatter(nn.Module):
    """Puts channels back to where they were in the full width and leaves zeros elsewhere.

    Args:
        positions: of the channels, (C,).
        width: channels that come out.
    """

    positions: Tensor

    def __init__(self, positions: Tensor, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("positions", positions.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, width, H, W)."""
        full = x.new_zeros(x.shape[0], self.width, *x.shape[2:])
        return full.index_copy(1, self.positions, x)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """What can be removed of one shape of network.

    Attributes:
        model: a network of that shape; its weights do not matter.
        coupling: its map.
        groups: disjoint, in the network's order.
    """

    model: nn.Module
    coupling: CouplingMap
    groups: Sequence[FilterGroup]

    def size(self, group: FilterGroup) -> int:
        """Filters of each of the group's convolutions."""
        return len(self.coupling.axes[f"{group.name}.weight"][0])

    def plan(self, kept: Kept) -> SlicePlan:
        """The cut that leaves the filters ``kept``; whole where a group is not mentioned."""
        groups = [group for group in self.groups if group.name in kept]
        keep: dict[Space | str, Tensor] = {}
        for group in groups:
            if not group.scattered:
                units = self.coupling.axes[f"{group.name}.weight"][0]
                keep[self.coupling.space_with(units)] = units[kept[group.name].cpu()]
        plan = plan_slices(self.model, self.coupling, keep)
        for group in groups:
            if group.scattered:
                plan = plan.then(_rows_alone(group, kept[group.name].cpu(), plan.source))
        return plan

    def params(self, counts: Mapping[str, int]) -> int:
        """Parameters of what is left when so many filters of each group stay."""
        return sum(
            math.prod(
                counts[self._along[name, axis]] if (name, axis) in self._along else side
                for axis, side in enumerate(parameter.shape)
            )
            for name, parameter in self.model.named_parameters()
        )

    @cached_property
    def _along(self) -> dict[tuple[str, int], str]:
        """(Parameter, axis) → the group whose filters lie along it."""
        first = {
            int(self.coupling.axes[f"{group.name}.weight"][0][0]): group.name
            for group in self.groups
            if group.scattered is None
        }
        along = {
            (tensor, axis): first[int(units[0])]
            for tensor, axes in self.coupling.axes.items()
            for axis, units in axes.items()
            if int(units[0]) in first
        }
        for group in self.groups:
            if group.scattered is not None:
                along |= {(tensor, 0): group.name for tensor in _own_tensors(group)}
        return along

    def cut(self, network: nn.Module, kept: Kept) -> nn.Module:
        """A copy of ``network`` with only the filters ``kept``."""
        small = copy.deepcopy(network)
        self.plan(kept).reshape(small)
        for group in self.groups:
            positions = kept.get(group.name)
            if group.scattered and positions is not None and len(positions) < self.size(group):
                _fill_up(small, group, positions, self.size(group))
        # It names the shape of the network before the cut.
        small.__dict__.pop("skeleton_source", None)
        return small


@dataclass(frozen=True, kw_only=True)
class FilterPruning(System):
    """Base of the systems that remove filters at a rate.

    A subclass has a field ``rate`` and says which groups there are and what a rate leaves of each.
    """

    def groups(self, model: nn.Module, coupling: CouplingMap) -> list[FilterGroup]:
        """What is removed together."""
        return coupled_groups(model, coupling)

    def remaining(self, group: FilterGroup, size: int) -> int:
        """How many of ``size`` filters stay, below 1 where the setting would empty the layer."""
        raise NotImplementedError

    def check(self, task: Task) -> None:
        """Refuse networks other than ResNets, and a setting that empties a layer."""
        self.counts(self.layout(task))

    def layout(self, task: Task) -> Layout:
        """What can be removed of the task's network.

        Raises:
            ConfigError: it is no ResNet.
        """
        if not isinstance(task.model, ResNetSpec):
            raise ConfigError(
                f"{self.name} prunes ResNets, and the network of {task.name} is a "
                f"{task.model.family}: choose another task or leave {self.name} out"
            )
        model, coupling = _anatomy(task.model)
        return Layout(model=model, coupling=coupling, groups=self.groups(model, coupling))

    def counts(self, layout: Layout) -> dict[str, int]:
        """Group name → filters that stay of it.

        Raises:
            ConfigError: none would.
        """
        result = {}
        for group in layout.groups:
            size = layout.size(group)
            result[group.name] = self.remaining(group, size)
            if result[group.name] < 1:
                raise ConfigError(
                    f"{self.name} would leave nothing of {group.name} with its {size} filters: "
                    "use a smaller rate"
                )
        return result

    def sketch(self, task: Task) -> nn.Module:
        """The network after the cut: the first filters of each layer, as many as would stay."""
        layout = self.layout(task)
        return layout.cut(task.model.build(), _first(self.counts(layout)))

    def fitted(self, task: Task, active_params: int) -> Self:
        """The same system with the one rate whose network is nearest to ``active_params``."""
        layout = self.layout(task)

        @cache
        def params(step: int) -> int:
            system = self.changed({"rate": step / _RATE_STEPS})
            left = {g.name: max(1, system.remaining(g, layout.size(g))) for g in layout.groups}
            return layout.params(left)

        steps = range(_RATE_STEPS)
        step = bisect_left(steps, -active_params, key=lambda step: -params(step))
        if step == len(steps):
            raise ConfigError(
                f"{self.name} cannot make the network of {task.name} as small as "
                f"{active_params:,} parameters: the smallest has {params(step - 1):,}"
            )
        near = min({max(0, step - 1), step}, key=lambda step: abs(params(step) - active_params))
        system = self.changed({"rate": near / _RATE_STEPS})
        system.check(task)
        return system

    def details(self, network: nn.Module, task: Task) -> dict[str, Any]:
        """``filters`` and how many stay, those of coupled convolutions counted once."""
        layout = self.layout(task)
        return {
            "filters": sum(map(layout.size, layout.groups)),
            "filters_kept": sum(self.counts(layout).values()),
        }


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


def coupled_groups(model: nn.Module, coupling: CouplingMap) -> list[FilterGroup]:
    """Groups that can be removed for good: all that write to one residual stream are one."""
    together: dict[int, list[str]] = {}
    for conv in convolutions(model):
        first = int(coupling.axes[f"{conv}.weight"][0][0])
        together.setdefault(first, []).append(conv)
    return [FilterGroup(convs=tuple(convs)) for convs in together.values()]


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


def positions_of_best(order: Tensor, count: int) -> Tensor:
    """The last ``count`` of an ascending ``order``, as ascending positions on the CPU."""
    return order[len(order) - count :].sort().values.cpu()


@lru_cache(maxsize=8)
def _anatomy(spec: ResNetSpec) -> tuple[nn.Module, CouplingMap]:
    """A network of this shape without memory, and its couplings."""
    model = spec.build()
    coupling = trace(model, torch.zeros(1, spec.in_channels, _TRACED_SIDE, _TRACED_SIDE))
    return model.to("meta"), coupling


def _first(counts: Mapping[str, int]) -> dict[str, Tensor]:
    return {name: torch.arange(count) for name, count in counts.items()}


def _own_tensors(group: FilterGroup) -> list[str]:
    """The tensors of which the filters of a scattered group are rows."""
    tensors = [f"{conv}.weight" for conv in group.convs]
    for norm in group.norms if group.scattered == "norm" else ():
        tensors += [f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    return tensors


def _rows_alone(group: FilterGroup, positions: Tensor, source: str) -> SlicePlan:
    """Cut filters without those who read them."""
    edits: dict[str, dict[str, int | tuple[int, ...]]] = {
        conv: {"out_channels": len(positions)} for conv in group.convs
    }
    if group.scattered == "norm":
        edits |= {norm: {"num_features": len(positions)} for norm in group.norms}
    keep = {name: {0: positions} for name in _own_tensors(group)}
    return SlicePlan(keep=keep, edits=edits, source=source)


def _fill_up(network: nn.Module, group: FilterGroup, positions: Tensor, width: int) -> None:
    """Put a :class:`Scatter` behind what the group says."""
    for path in group.norms if group.scattered == "norm" else group.convs:
        owner, _, leaf = path.rpartition(".")
        module = network.get_submodule(path)
        scatter = Scatter(positions.to(next(module.parameters()).device), width)
        filled = nn.Sequential(OrderedDict(narrow=module, scatter=scatter))
        setattr(network.get_submodule(owner), leaf, filled)
