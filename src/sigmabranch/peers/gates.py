"""Small networks that say, from the feature before it, whether a block is to run.

Shapes: B batch, C channels, E entries of the recurrent gates' state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sigmabranch.backbones import GlobalAveragePool

STATE_SIZE = 10
# As wide as their input, but no wider than in the networks that feed-forward gates were made for.
FEEDFORWARD_WIDTH = 64

State = tuple[Tensor, Tensor] | None


class RecurrentGates(nn.Module):
    """Pooling and a linear map per gate; one LSTM cell and one output for all gates.

    Args:
        widths: channels of the feature that each gate reads.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.pool = GlobalAveragePool()
        self.inputs = nn.ModuleList(nn.Linear(width, STATE_SIZE) for width in widths)
        self.cell = Cell(STATE_SIZE)
        self.output = nn.Linear(STATE_SIZE, 1)
        _initialise(self)

    def forward(self, feature: Tensor, number: int, state: State) -> tuple[Tensor, State]:
        """Logit (B,) of gate ``number`` and the state for the next."""
        input_BE = self.inputs[number](self.pool(feature))
        if state is None:
            state = (torch.zeros_like(input_BE), torch.zeros_like(input_BE))
        state = self.cell(input_BE, state)
        return self.output(state[0]).flatten(), state


class Cell(nn.Module):
    """An LSTM cell; of linear layers, because the counter knows those and no LSTM."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input = nn.Linear(size, 4 * size)
        self.hidden = nn.Linear(size, 4 * size)

    def forward(self, input_BE: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The next (output, memory), both (B, E)."""
        output_BE, memory_BE = state
        parts = (self.input(input_BE) + self.hidden(output_BE)).chunk(4, dim=1)
        write, keep, show = (part.sigmoid() for part in parts[:3])
        memory_BE = keep * memory_BE + write * parts[3].tanh()
        return show * memory_BE.tanh(), memory_BE


class FeedforwardGates(nn.Module):
    """A small convolutional network per gate.

    Args:
        widths: channels of the feature that each gate reads.
        gate: makes the convolutions of one gate, given its channels and its own width.
    """

    def __init__(self, widths: Sequence[int], gate: Callable[[int, int], nn.Sequential]) -> None:
        super().__init__()
        self.nets = nn.ModuleList()
        for width in widths:
            own = min(width, FEEDFORWARD_WIDTH)
            self.nets.append(
                nn.Sequential(gate(width, own), GlobalAveragePool(), nn.Linear(own, 2))
            )
        _initialise(self)

    def forward(self, feature: Tensor, number: int, state: State) -> tuple[Tensor, State]:
        """Logit (B,) of gate ``number``; there is no state."""
        closed_B, open_B = self.nets[number](feature).unbind(1)
        return open_B - closed_B, state


def _feedforward1(width: int, own: int) -> nn.Sequential:
    pool = nn.MaxPool2d(2, ceil_mode=True)
    return nn.Sequential(pool, conv_norm_relu(width, own, 1), conv_norm_relu(own, own, 2))


def _feedforward2(width: int, own: int) -> nn.Sequential:
    return nn.Sequential(conv_norm_relu(width, own, 2))


#: Kind → makes the gates, given the channels of the feature that each reads.
GATES: dict[str, Callable[[Sequence[int]], RecurrentGates | FeedforwardGates]] = {
    "recurrent": RecurrentGates,
    "feedforward1": lambda widths: FeedforwardGates(widths, _feedforward1),
    "feedforward2": lambda widths: FeedforwardGates(widths, _feedforward2),
}


def conv_norm_relu(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A 3×3 convolution, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _initialise(gates: nn.Module) -> None:
    """Xavier weights and zero biases, as published."""
    for module in gates.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
