"""A network whose filters can be silenced while it trains, and the training that silences them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sigmabranch.peers.filters import FilterGroup, Kept
from sigmabranch.training import Recipe, StepOutput
from sigmabranch.training.objectives import DenseObjective

# Far below one step's share of a period, far above the rounding of its product.
_ROUNDING = 1e-6


class MaskedNet(nn.Module):
    """A network with one mask per group of filters; a masked filter puts out zero.

    Convolution rows and the scale and shift of the batch norm behind them are multiplied by the
    mask, so a masked filter gets no gradient and could be removed without a trace.

    Args:
        network: trained in place, under its own names below ``network.``.
        groups: disjoint groups of its filters.
    """

    period: Tensor

    def __init__(self, network: nn.Module, groups: Sequence[FilterGroup]) -> None:
        super().__init__()
        self.network, self.groups = network, tuple(groups)
        device = next(network.parameters()).device
        # Integers and booleans: a moving average of the weights copies these.
        self.register_buffer("period", torch.tensor(-1, device=device))
        for group in self.groups:
            size = len(self._weight(group.name))
            mask = torch.ones(size, dtype=torch.bool, device=device)
            self.register_buffer(_buffer(group.name), mask)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) → (B, V) logits of the network without the masked filters."""
        masked = {}
        for group in self.groups:
            mask_N = self.get_buffer(_buffer(group.name))
            for conv, norm in zip(group.convs, group.norms, strict=True):
                masked[f"{conv}.weight"] = self._weight(conv) * mask_N[:, None, None, None]
                masked[f"{norm}.weight"] = self._weight(norm) * mask_N
                masked[f"{norm}.bias"] = self.network.get_parameter(f"{norm}.bias") * mask_N
        return functional_call(self.network, masked, (x,))

    @torch.no_grad()
    def mask(self, kept: Kept) -> None:
        """Mask what is not ``kept``, and set the weights of masked convolution rows to zero.

        Groups that are not mentioned stay as they are.
        """
        for group in self.groups:
            if group.name not in kept:
                continue
            mask_N = self.get_buffer(_buffer(group.name))
            mask_N.fill_(False)[kept[group.name].to(mask_N.device)] = True
            for conv in group.convs:
                self._weight(conv).mul_(mask_N[:, None, None, None])

    def kept(self) -> dict[str, Tensor]:
        """Group name → positions of the filters that are not masked, on the CPU."""
        return {
            group.name: self.get_buffer(_buffer(group.name)).nonzero().flatten().cpu()
            for group in self.groups
        }

    def _weight(self, path: str) -> Tensor:
        return self.network.get_parameter(f"{path}.weight")


class MaskingObjective(DenseObjective):
    """The dense objective, with new masks at the start of each period of training.

    Args:
        net: what is trained; it remembers the period, so a resumed run masks as often as one that
            was not interrupted.
        recipe: label smoothing and distillation.
        periods: equal parts of the training.
        choose: period → what stays from then on.
        teacher: see :class:`~sigmabranch.training.objectives.DenseObjective`.
    """

    def __init__(
        self,
        net: MaskedNet,
        recipe: Recipe,
        *,
        periods: int,
        choose: Callable[[int], Kept],
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__(recipe, teacher)
        self.net, self.periods, self.choose = net, periods, choose
        self._period: int | None = None  # the net's, known without asking its device

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """Loss and training accuracy of one batch, after masking if a period begins."""
        period = int(progress * self.periods + _ROUNDING)
        if self._period is None:
            self._period = int(self.net.period)
        if period > self._period:
            with torch.no_grad():
                self.net.mask(self.choose(period))
            self.net.period.fill_(period)
            self._period = period
        return super().__call__(model, x, y, progress)


def _buffer(group: str) -> str:
    return "mask_" + group.replace(".", "_")
