"""A ResNet whose inner channels are experts: each input reads and computes its own.

A shallow network embeds the input; a linear map and a ReLU make of the embedding one gate for each
channel of each gated convolution. A channel whose gate is 0 need be neither read nor computed.

Shapes: B batch, D embedding, L gated convolutions, U gates of all of them, V classes; a last 2 is
(parameters, MACs).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from sigmabranch.backbones import GlobalAveragePool
from sigmabranch.measure import Load, count_parameters, module_costs
from sigmabranch.peers.expert_block import ExpertBlock
from sigmabranch.peers.gates import conv_norm_relu
from sigmabranch.peers.skipping import SkippingNet, residual_parts

# Channels of the embedding network for small and for large images.
_SMALL, _LARGE = (32, 64, 128, 128), (32, 64, 128, 192, 128)
_SMALL_SIDE = 64
# Below this size of the dense network they are divided by this, or the embedding would outweigh it.
_LIGHT_PARAMS, _LIGHT_DIVISOR = 2_000_000, 8


class Chosen(NamedTuple):
    """What one pass gives.

    Attributes:
        logits: (B, V).
        gate_logits: (B, U); their ReLU is the gates.
        head_logits: the same with a gradient for the heads alone, while there is a classifier.
        embedded_logits: (B, V) of the classifier on the embedding, while there is one.
    """

    logits: Tensor
    gate_logits: Tensor
    head_logits: Tensor | None = None
    embedded_logits: Tensor | None = None


class ExpertResNet(SkippingNet):
    """A ResNet whose inner channels are chosen input by input; takes over its modules.

    Args:
        dense: a ResNet on the CPU.
        example: one image, (1, ...), for the embedding's depth and for the prices.
        variant: see :class:`~sigmabranch.peers.deepmoe.DeepMoE`.

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
        light = count_parameters([dense]) < _LIGHT_PARAMS
        self.stem, blocks, self.head = residual_parts(dense)
        self.blocks = nn.ModuleList(ExpertBlock(block, variant) for block in blocks)
        self.widths = [width for block in self._blocks() for width in block.widths]
        self.embedding = _embedding(example, light)
        dimension = _widths(example, light)[-1]
        self.heads = nn.Linear(dimension, sum(self.widths), bias=False)
        nn.init.constant_(self.heads.weight, 1 / math.sqrt(dimension))  # all gates are 1
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
        logits_BV = self.head(feature)
        if self.classifier is None:
            return Chosen(logits_BV, logit_BU)
        return Chosen(
            logits_BV, logit_BU, self.heads(embedded_BD.detach()), self.classifier(embedded_BD)
        )

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
            embedded_BD = _of_one_size(self.embedding(x.float()))
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


def _of_one_size(embedded_BD: Tensor) -> Tensor:
    """With entries that sum to √D, so that equal weights make equal gates for every input."""
    sum_B1 = embedded_BD.sum(1, keepdim=True).clamp_min(torch.finfo(embedded_BD.dtype).tiny)
    return embedded_BD * (math.sqrt(embedded_BD.shape[1]) / sum_B1)


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
