"""DeepMoE: gates on the channels inside residual blocks (Wang et al., arXiv:1806.01531).

A shallow network embeds the input; a linear map and a ReLU make of the embedding one gate for each
channel of each gated convolution. A channel whose gate is 0 need be neither read nor computed.
*Narrow* in the paper's tables means a network of ordinary width, as here.

Shapes: B batch, C channels of one gated convolution, D embedding, L gated convolutions, U gates of
all of them, V classes; a last 2 is (parameters, MACs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.backbones import GlobalAveragePool
from sigmabranch.backbones.resnet import Bottleneck
from sigmabranch.errors import ConfigError
from sigmabranch.measure import Load, module_costs
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.skipnet import (
    Block,
    GatedObjective,
    SkippingNet,
    check_choices,
    check_target,
    conv_norm_relu,
    phases,
    phases_mark,
    residual_parts,
    residual_spec,
    teacher,
)
from sigmabranch.peers.system import System, Trained
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example
from sigmabranch.training import Recipe, StepOutput

# Channels of the embedding network for small and for large images.
_SMALL, _LARGE = (32, 64, 128, 128), (32, 64, 128, 192, 128)
_SMALL_SIDE = 64
# Below this size of the dense network they are divided by this, or the embedding would outweigh it.
_LIGHT_PARAMS, _LIGHT_DIVISOR = 2_000_000, 8
# Share of the first training in which the penalty grows to its weight.
_WARMUP = 0.2
# Mean of a rectified standard normal variable, which is what normalised features start as.
_RECTIFIED = 1 / math.sqrt(2 * math.pi)
# How far the gates of one input differ at the start, about 1.
_SPREAD = 0.1


@dataclass(frozen=True, kw_only=True)
class DeepMoE(System):
    """Channels inside residual blocks that gates switch off.

    No official code exists. Ours, where the paper is silent: the embedding's widths
    (32-64-128-128, for images above 64 pixels 32-64-128-192-128, and an eighth of them where the
    dense network has under two million parameters) with batch norm; gates behind batch norm and
    ReLU; heads that start all gates at about 1, so that training begins near the source network;
    the penalty's warm-up over a fifth of the first training, which takes 60 % of the epochs.

    Attributes:
        variant: ``"A"`` gates the first two convolutions of a bottleneck, ``"B"`` the second only.
            In a basic block either gates the first.
        sparsity: λ, of the sum of all gates, averaged over the batch.
        embedding_weight: μ, of the cross-entropy of a classifier on the embedding.
        target: if given, share of gates that each input is to open in each convolution, which then
            replaces λ (ours, with a gradient straight through the threshold to the heads). It is
            asked of every input, not of their mean, because two convolutions in a row cost the
            product of their shares.
        target_weight: of the squared distances from ``target``, summed over convolutions.
    """

    name: ClassVar[str] = "deepmoe"
    summary: ClassVar[str] = "gates switch channels inside residual blocks off, input by input"

    variant: Literal["A", "B"] = "A"
    sparsity: float = 1e-3
    embedding_weight: float = 1.0
    target: float | None = None
    target_weight: float = 5.0

    def __post_init__(self) -> None:
        check_choices(self, "variant")
        if self.target is not None:
            check_target(self.name, self.target)
        for name in ("sparsity", "embedding_weight", "target_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"deepmoe {name} must be at least 0, got {getattr(self, name)}")

    def check(self, task: Task) -> None:
        """The network must have residual blocks, and the recipe two epochs."""
        residual_spec(self.name, task)
        phases(task.finetune)

    def fitted(self, task: Task, active_params: int) -> Self:
        """With the target that gives the size if all convolutions open the same share of gates."""
        self.check(task)
        network = self.sketch(task)
        always = network.bounds()["least"]["active_params"]
        if active_params <= always:
            raise ConfigError(
                f"deepmoe always reads {always:,} parameters, more than the {active_params:,} asked"
            )
        linear, square = network.growth()
        wanted = active_params - always
        share = 2 * wanted / (linear + math.sqrt(linear**2 + 4 * square * wanted))
        return replace(self, target=min(1.0, share))

    def sketch(self, task: Task) -> ExpertResNet:
        """The gated network, all gates open."""
        return ExpertResNet(task.model.build(), example(task), self.variant).opened()

    def details(self, network: nn.Module, task: Task) -> dict[str, Any]:
        """Sizes of what chooses the channels."""
        assert isinstance(network, ExpertResNet)
        parts = {"embedding": network.embedding, "head": network.heads}
        sizes = {
            f"{name}_params": sum(parameter.numel() for parameter in part.parameters())
            for name, part in parts.items()
        }
        return {"gated_convolutions": len(network.widths), "gates": sum(network.widths), **sizes}

    def run(self, bench: Bench) -> Trained:
        """Train gates and network together, then the network alone behind frozen gates."""
        first, last = phases(bench.recipe)
        dense = bench.dense().cpu()
        with bench.seeded():
            network = ExpertResNet(dense, bench.example(), self.variant)
            network.classify_embedding(bench.task.model.classes)
        network.to(bench.device)
        objective = SparseObjective(first, teacher(bench), self, network.widths)
        bench.train(network, objective, recipe=first, step="joint")
        network.freeze_gates()
        bench.train(network, recipe=last)
        return Trained(
            network=network,
            recipe=last,
            epochs=bench.epochs,
            mark=phases_mark(first, last),
            counted=network.opened(),
        )


class Chosen(NamedTuple):
    """What one pass gives.

    Attributes:
        logits: (B, V).
        gate_logits: (B, U); their ReLU is the gates.
        head_logits: the same with a gradient for the heads alone.
        embedded_logits: (B, V) of the classifier on the embedding, if there is one.
    """

    logits: Tensor
    gate_logits: Tensor
    head_logits: Tensor
    embedded_logits: Tensor | None


class ExpertResNet(SkippingNet):
    """A ResNet whose inner channels are chosen input by input; takes over its modules.

    Args:
        dense: a ResNet on the CPU.
        example: one image, (1, ...), for the embedding's depth and for the prices.
        variant: see :class:`DeepMoE`.

    Attributes:
        widths: channels of each gated convolution, U in all.

    Raises:
        ConfigError: the network has no residual blocks.
    """

    always_2: Tensor
    linear_L2: Tensor
    pair_L2: Tensor
    widths_L: Tensor

    def __init__(self, dense: nn.Module, example: Tensor, variant: str = "A") -> None:
        super().__init__()
        light = sum(p.numel() for p in dense.parameters()) < _LIGHT_PARAMS
        self.stem, blocks, self.head = residual_parts(dense)
        self.blocks = nn.ModuleList(ExpertBlock(block, variant) for block in blocks)
        self.widths = [width for block in self._blocks() for width in block.widths]
        self.embedding = _embedding(example, light)
        dimension = _widths(example, light)[-1]
        self.heads = nn.Linear(dimension, sum(self.widths), bias=False)
        mean = 1 / (_RECTIFIED * dimension)
        nn.init.normal_(self.heads.weight, mean, _SPREAD * mean * math.sqrt(dimension))
        self.classifier: nn.Linear | None = None
        self.frozen = False
        self._set_prices(module_costs(self, example))

    def classify_embedding(self, classes: int) -> None:
        """Add the classifier that only training needs."""
        self.classifier = nn.Linear(self.heads.in_features, classes)

    def freeze_gates(self) -> None:
        """Keep the gates as functions of the input as they are, and drop the classifier."""
        self.classifier, self.frozen = None, True
        for part in (self.embedding, self.heads):
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but a frozen embedding, whose statistics stay."""
        super().train(mode)
        if self.frozen:
            self.embedding.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) → (B, V) logits."""
        return self.gated(x).logits

    def gated(self, x: Tensor) -> Chosen:
        """Logits and what the gates were made of."""
        embedded_BD, logit_BU = self._gate_logits(x)
        gates = self._gates(logit_BU).split(self.widths, dim=1)
        skips, feature = self.skips(x), self.stem(x)
        for block in self._blocks():
            own, gates = gates[: len(block.widths)], gates[len(block.widths) :]
            feature = block.sliced(feature, own) if skips else block(feature, own)
        embedded_BV = None if self.classifier is None else self.classifier(embedded_BD)
        head_logit_BU = self.heads(embedded_BD.detach()) if self.training else logit_BU
        return Chosen(self.head(feature), logit_BU, head_logit_BU, embedded_BV)

    def with_load(self, x: Tensor) -> tuple[Tensor, Load]:
        """Logits (B, V) and what each input made the network read and compute."""
        logits, logit_BU, *_ = self.gated(x)
        chosen_BU = self._gates(logit_BU) > 0
        active_BL = torch.stack([part.sum(1) for part in chosen_BU.split(self.widths, 1)], 1)
        params_B, macs_B = self._spent(active_BL).unbind(1)
        return logits, Load(active_params=params_B, macs=macs_B, choices=chosen_BU)

    def bounds(self) -> dict[str, dict[str, int]]:
        """The cost with all gates closed and with all open."""
        ends = torch.stack([torch.zeros_like(self.widths_L), self.widths_L])
        names = ("active_params", "macs")
        least, most = (dict(zip(names, row, strict=True)) for row in self._spent(ends).tolist())
        return {"least": least, "most": most}

    def growth(self) -> tuple[int, int]:
        """(a, b): a share s of open gates in every convolution reads a·s + b·s² parameters more."""
        linear = (self.widths_L * self.linear_L2[:, 0]).sum()
        square = (self.widths_L[:-1] * self.widths_L[1:] * self.pair_L2[:-1, 0]).sum()
        return int(linear), int(square)

    def _blocks(self) -> list[ExpertBlock]:
        return [cast(ExpertBlock, block) for block in self.blocks]

    def _gate_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            embedded_BD = self.embedding(x.float())
            return embedded_BD, self.heads(embedded_BD)

    def _gates(self, logit_BU: Tensor) -> Tensor:
        gate_BU = logit_BU.relu()
        return gate_BU.clamp(1.0, 1.0) if self.all_open else gate_BU

    def _spent(self, active_BL: Tensor) -> Tensor:
        """(B, 2) of the whole network, for so many open channels of each gated convolution."""
        return self.always_2 + self._optional(active_BL)

    def _optional(self, active_BL: Tensor) -> Tensor:
        """(B, 2) of the open channels alone."""
        single_B2 = (active_BL[:, :, None] * self.linear_L2).sum(1)
        both_BL = active_BL[:, :-1] * active_BL[:, 1:]
        return single_B2 + (both_BL[:, :, None] * self.pair_L2[:-1]).sum(1)

    def _set_prices(self, costs: dict[str, tuple[int, int]]) -> None:
        """What one open channel costs, and one of a convolution with one of the next."""
        linear_L2 = torch.zeros(len(self.widths), 2, dtype=torch.int64)
        pair_L2 = torch.zeros_like(linear_L2)
        first = 0
        for number, block in enumerate(self._blocks()):
            units = [f"blocks.{number}.units.{unit}" for unit in range(len(block.units))]
            prices = [_prices(costs, path) for path in units]
            block.add_prices(prices, linear_L2[first:], pair_L2[first:])
            first += len(block.widths)
        self.register_buffer("linear_L2", linear_L2, persistent=False)
        self.register_buffer("pair_L2", pair_L2, persistent=False)
        self.register_buffer("widths_L", torch.tensor(self.widths), persistent=False)
        always_2 = torch.tensor(costs[""]) - self._optional(self.widths_L[None])[0]
        self.register_buffer("always_2", always_2, persistent=False)


class Unit(nn.Module):
    """A convolution and its norm, of which some channels can be left out."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, gated: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.gated = conv, norm, gated

    def forward(self, x: Tensor) -> Tensor:
        """All output channels of all input channels."""
        return self.norm(self.conv(x))

    def part(self, x: Tensor, read: Tensor | None, write: Tensor | None) -> Tensor:
        """Output channels ``write`` of an ``x`` that holds input channels ``read``; None is all."""
        weight = _picked(_picked(self.conv.weight, 0, write), 1, read)
        norm = self.norm
        rows = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        mean, variance, scale, shift = (_picked(cast(Tensor, row), 0, write) for row in rows)
        x = _convolved(x, weight, self.conv)
        if not len(mean):
            return x
        return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, norm.eps)


class ExpertBlock(nn.Module):
    """A residual block whose inner channels are multiplied by gates.

    Attributes:
        widths: channels of each gated convolution.
    """

    def __init__(self, block: Block, variant: str) -> None:
        super().__init__()
        self.shortcut = block.downsample or nn.Identity()
        units = [
            Unit(block.conv1, block.bn1, variant == "A" or not isinstance(block, Bottleneck)),
            Unit(block.conv2, block.bn2, isinstance(block, Bottleneck)),
        ]
        if isinstance(block, Bottleneck):
            units.append(Unit(block.conv3, block.bn3, False))
        self.units = nn.ModuleList(units)
        self.widths = [unit.conv.out_channels for unit in units if unit.gated]

    def forward(self, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Every channel, times its gate; ``gates`` are (B, C) for each gated convolution."""
        shortcut, left = self.shortcut(x), iter(gates)
        *inner, last = self._units()
        for unit in inner:
            x = unit(x).relu()
            if unit.gated:
                x = x * next(left).to(x.dtype)[:, :, None, None]
        return (last(x) + shortcut).relu()

    def sliced(self, x: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """The same for one input, from the weights of its open channels alone."""
        shortcut, left = self.shortcut(x), iter(gates)
        *inner, last = self._units()
        read = None
        for unit in inner:
            gate_C = next(left)[0] if unit.gated else None
            write = None if gate_C is None else gate_C.nonzero().flatten()
            x = unit.part(x, read, write).relu()
            if gate_C is not None and write is not None:
                x = x * gate_C[write].to(x.dtype)[:, None, None]
            read = write
        return (last.part(x, read, None) + shortcut).relu()

    def add_prices(self, prices: Sequence[Tensor], linear_L2: Tensor, pair_L2: Tensor) -> None:
        """Add what depends on the gates, in place, from this block's first gated convolution on.

        Args:
            prices: of each unit: (convolution, norm) by (parameters, MACs).
            linear_L2: for each open channel.
            pair_L2: for each open channel together with one of the next gated convolution.
        """
        own, read = -1, False
        for unit, (conv_2, norm_2) in zip(self._units(), prices, strict=True):
            inputs, outputs = unit.conv.in_channels, unit.conv.out_channels
            if unit.gated:
                linear_L2[own + 1] += norm_2 // outputs
            if unit.gated and read:
                pair_L2[own] += conv_2 // (inputs * outputs)
            elif unit.gated:
                linear_L2[own + 1] += conv_2 // outputs
            elif read:
                linear_L2[own] += conv_2 // inputs
            own, read = own + unit.gated, unit.gated

    def _units(self) -> list[Unit]:
        return [cast(Unit, unit) for unit in self.units]


class SparseObjective(GatedObjective):
    """Classification by the network and by the embedding, and few open gates."""

    def __init__(
        self,
        recipe: Recipe,
        teacher: nn.Module | None,
        system: DeepMoE,
        widths: Sequence[int],
    ) -> None:
        super().__init__(recipe, teacher)
        self.system, self.widths = system, list(widths)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """Loss, training accuracy and share of open gates of one batch."""
        chosen = model(x)
        output = self.classified(chosen.logits, x, y, progress)
        embedded = F.cross_entropy(chosen.embedded_logits.float(), y)
        penalty = min(1.0, progress / _WARMUP) * self._penalty(chosen)
        loss = output.loss + self.system.embedding_weight * embedded + penalty
        metrics = {**output.metrics, "open": (chosen.gate_logits > 0).float().mean()}
        return StepOutput(loss, metrics)

    def _penalty(self, chosen: Chosen) -> Tensor:
        target = self.system.target
        if target is None:
            return self.system.sparsity * chosen.gate_logits.relu().sum(1).mean()
        # Through the embedding it would close all gates at once, by an embedding of zero; and with
        # the gradient of a sigmoid, a gate that has gone far below 0 would never come back.
        logit_BU = chosen.head_logits
        open_BU = (logit_BU > 0).float() + (logit_BU - logit_BU.detach())
        share_BL = torch.stack([part.mean(1) for part in open_BU.split(self.widths, 1)], dim=1)
        return self.system.target_weight * (share_BL - target).square().sum(1).mean()


def _embedding(example: Tensor, light: bool) -> nn.Sequential:
    """Image → (B, D)."""
    widths = (example.shape[1], *_widths(example, light))
    layers = [conv_norm_relu(inputs, outputs, 2) for inputs, outputs in pairwise(widths)]
    return nn.Sequential(*layers, GlobalAveragePool())


def _widths(example: Tensor, light: bool) -> list[int]:
    widths = _SMALL if max(example.shape[2:]) <= _SMALL_SIDE else _LARGE
    return [width // (_LIGHT_DIVISOR if light else 1) for width in widths]


def _prices(costs: dict[str, tuple[int, int]], path: str) -> Tensor:
    """(2, 2): (convolution, norm) by (parameters, MACs)."""
    return torch.tensor([costs[f"{path}.conv"], costs[f"{path}.norm"]])


def _picked(tensor: Tensor, axis: int, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(axis, index)


def _convolved(x: Tensor, weight: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution with another weight, which may have no channels at all."""
    stride, padding = conv.stride, cast(tuple[int, int], conv.padding)
    if weight.numel():
        return F.conv2d(x, weight, None, stride, padding)
    sides = [
        (side + 2 * pad - size) // step + 1
        for side, pad, size, step in zip(
            x.shape[2:], padding, conv.kernel_size, stride, strict=True
        )
    ]
    return x.new_zeros(1, len(weight), *sides)
