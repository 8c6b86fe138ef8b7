"""A ResNet whose blocks are run or skipped input by input.

A gate reads the output of the block before its own. The first block has no gate, and the projection
of a shortcut always runs.

Shapes: B batch, G gates, V classes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from sigmabranch.backbones.resnet import Bottleneck
from sigmabranch.measure import Load, module_costs
from sigmabranch.peers.gates import GATES, State
from sigmabranch.peers.skipping import Block, SkippingNet, residual_parts


class Gated(NamedTuple):
    """What one pass gives.

    Attributes:
        logits: (B, V).
        open: (B, G) float 0 or 1, in training with the gates' gradient.
        gate_logits: (B, G), as actions are drawn from them.
    """

    logits: Tensor
    open: Tensor
    gate_logits: Tensor


class GatedResNet(SkippingNet):
    """A ResNet with a gate before every residual block but the first; takes over its modules.

    Args:
        dense: a ResNet on the CPU.
        example: one input, (1, ...), for the prices.
        gate: kind of gate, one of :data:`~sigmabranch.peers.gates.GATES`.

    Attributes:
        sampling: how training makes a choice of a logit: by ``"threshold"``, or with noise,
            ``"bernoulli"`` (no gradient) or ``"gumbel"`` (straight through).
        temperature: what a logit is divided by before a choice is made; small is sharp.
        noise: of the Gumbel samples, 1 being as much as the logits are made for.
        handicap: what all gates' logits are lowered by.
        price: what reading all that can be skipped adds to a loss that asks for it.

    Raises:
        ConfigError: the network has no residual blocks.
    """

    noise: Tensor
    handicap: Tensor
    price: Tensor
    block_params_G: Tensor
    block_macs_G: Tensor

    def __init__(self, dense: nn.Module, example: Tensor, gate: str = "recurrent") -> None:
        super().__init__()
        self.stem, blocks, self.head = residual_parts(dense)
        self.blocks = nn.ModuleList(SkippableBlock(block) for block in blocks)
        self.gates = GATES[gate]([_outputs(block) for block in blocks[:-1]])
        self.sampling: Literal["threshold", "bernoulli", "gumbel"] = "threshold"
        self.temperature = 1.0
        self.register_buffer("noise", torch.ones(()), persistent=False)
        self.register_buffer("handicap", torch.zeros(()))
        self.register_buffer("price", torch.zeros(()))
        self._set_prices(module_costs(self, example))

    def _set_prices(self, costs: dict[str, tuple[int, int]]) -> None:
        bodies = [costs[f"blocks.{number}.body"] for number in range(1, len(self.blocks))]
        params, macs = (torch.tensor(column) for column in zip(*bodies, strict=True))
        self.register_buffer("block_params_G", params, persistent=False)
        self.register_buffer("block_macs_G", macs, persistent=False)
        whole_params, whole_macs = costs[""]
        self.always_params = whole_params - int(params.sum())
        self.always_macs = whole_macs - int(macs.sum())

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) → (B, V) logits."""
        return self.gated(x).logits

    def gated(self, x: Tensor) -> Gated:
        """Logits and the gates' choices."""
        first, *others = (cast(SkippableBlock, block) for block in self.blocks)
        skips, state = self.skips(x), None
        feature = first.run(self.stem(x))
        opens, logits = [], []
        for number, block in enumerate(others):
            logit_B, state = self._gate(number, feature, state)
            open_B = self._choice(logit_B)
            if skips:
                feature = block.run(feature) if bool(open_B) else block.shortcut(feature)
            else:
                feature = block(feature, open_B)
            opens.append(open_B)
            logits.append(logit_B)
        return Gated(self.head(feature), torch.stack(opens, 1), torch.stack(logits, 1))

    def with_load(self, x: Tensor) -> tuple[Tensor, Load]:
        """Logits (B, V) and what each input made the network read and compute."""
        logits, open_BG, _ = self.gated(x)
        chosen_BG = open_BG > 0.5
        return logits, Load(
            active_params=self.always_params + (chosen_BG * self.block_params_G).sum(1),
            macs=self.always_macs + (chosen_BG * self.block_macs_G).sum(1),
            choices=chosen_BG,
        )

    def bounds(self) -> dict[str, dict[str, int]]:
        """The cost with all gates closed and with all open."""
        least = {"active_params": self.always_params, "macs": self.always_macs}
        optional = (int(self.block_params_G.sum()), int(self.block_macs_G.sum()))
        added = zip(least.items(), optional, strict=True)
        return {"least": least, "most": {name: value + more for (name, value), more in added}}

    def share_read(self, open_G: Tensor) -> Tensor:
        """Share of the skippable parameters that gates read which are open so often, a scalar."""
        return (open_G * self.block_params_G).sum() / self.block_params_G.sum()

    def _gate(self, number: int, feature: Tensor, state: State) -> tuple[Tensor, State]:
        with torch.autocast(feature.device.type, enabled=False):
            logit_B, state = self.gates(feature.float(), number, state)
        return (logit_B - self.handicap) / self.temperature, state

    def _choice(self, logit_B: Tensor) -> Tensor:
        """1 where the block runs, else 0."""
        if self.training and self.sampling == "bernoulli":
            return torch.bernoulli(logit_B.detach().sigmoid())
        if self.training and self.sampling == "gumbel":
            # The difference of two Gumbel variables is logistic.
            logistic_B = torch.rand_like(logit_B).logit(eps=1e-6)
            logit_B = logit_B + self.noise * logistic_B / self.temperature
        open_B = straight_through(logit_B)
        return open_B.clamp(1.0, 1.0) if self.all_open else open_B


class SkippableBlock(nn.Module):
    """A residual block in two parts: what always runs, and what can be skipped."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        parts = [part for name, part in block.named_children() if name != "downsample"]
        self.shortcut = block.downsample or nn.Identity()
        self.body, self.act = nn.Sequential(*parts[:-1]), parts[-1]

    def run(self, x: Tensor) -> Tensor:
        """What the block of the dense network gives."""
        return self.act(self.body(x) + self.shortcut(x))

    def forward(self, x: Tensor, open_B: Tensor) -> Tensor:
        """That where the gate is open, the shortcut elsewhere."""
        shortcut = self.shortcut(x)
        whole = self.act(self.body(x) + shortcut)
        open_B = open_B.to(whole.dtype)[:, None, None, None]
        return open_B * whole + (1 - open_B) * shortcut


def straight_through(logit: Tensor) -> Tensor:
    """1 where ``logit`` is positive, else 0, with the gradient of the sigmoid."""
    soft = logit.sigmoid()
    return (logit > 0).to(soft) + (soft - soft.detach())


def _outputs(block: Block) -> int:
    last = block.conv3 if isinstance(block, Bottleneck) else block.conv2
    return last.out_channels
