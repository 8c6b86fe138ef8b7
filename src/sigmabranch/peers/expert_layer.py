"""A feed-forward layer as experts, of which each token takes a few.

Shapes: B batch, T tokens (of all images), D width, H hidden width, N experts, S shared ones, R
routed ones (N = S + R), M neurons an expert, K chosen experts.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """What any module is called here that :func:`feed_forwards` finds."""

    fc1: nn.Linear
    act: nn.Module
    fc2: nn.Linear


class Choice(NamedTuple):
    """What a router says of each token.

    Attributes:
        score: (T, R) float32, the softmax over routed experts.
        chosen: (T, K) int64, the experts to compute.
    """

    score: Tensor
    chosen: Tensor


class ExpertRouter(nn.Module):
    """Scores each expert by the activation of one of its own neurons.

    In training mode every call moves the handicaps towards equal use, without gradient; they are a
    buffer, so that a checkpoint holds them. As with the statistics of a batch norm, a step made of
    several passes moves them several times.

    Args:
        gate: Linear(D, R), the neurons that speak for their experts.
        act: the layer's activation.
        active: K.
        balance_rate: γ, by how much a call moves a handicap.
    """

    balance: Tensor

    def __init__(self, gate: nn.Linear, act: nn.Module, active: int, balance_rate: float) -> None:
        super().__init__()
        self.gate, self.act, self.active, self.balance_rate = gate, act, active, balance_rate
        self.register_buffer("balance", torch.zeros_like(gate.weight[:, 0]))

    def forward(self, x_TD: Tensor) -> Choice:
        """Scores and choice for each token."""
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TR = self.act(self.gate(x_TD.float())).abs().softmax(dim=1)
            chosen_TK = (score_TR.detach() + self.balance).topk(self.active, dim=1).indices
        if self.training:
            self._rebalance(chosen_TK)
        return Choice(score_TR, chosen_TK)

    @torch.no_grad()
    def _rebalance(self, chosen_TK: Tensor) -> None:
        load_R = F.one_hot(chosen_TK, len(self.balance)).sum(dim=(0, 1)).float()
        self.balance -= self.balance_rate * (load_R - load_R.mean()).sign()


class ExpertLayer(nn.Module):
    """A feed-forward layer whose neurons lie expert by expert, the shared ones first.

    Output: shared(x) + Σ over chosen experts of (1 + score·scale)·expert(x), where the scales start
    at zero and fc2's bias is added once. In training mode all experts are computed and those not
    chosen are multiplied by zero; in eval mode only those are computed that some token chose, and
    only for these tokens.

    Args:
        ffn: the layer, with fc1, act and fc2; it is copied.
        order_H: its neurons in their new order.
        speaker_R: the neuron that speaks for each routed expert.
        experts: N.
        active: K.
        balance_rate: see :class:`ExpertRouter`.
    """

    def __init__(
        self,
        ffn: FeedForward,
        order_H: Tensor,
        speaker_R: Tensor,
        *,
        experts: int,
        active: int,
        balance_rate: float,
    ) -> None:
        super().__init__()
        self.experts, self.shared = experts, experts - len(speaker_R)
        self.neurons = ffn.fc1.out_features // experts
        self.fc1 = _rows(ffn.fc1, order_H)
        self.act = copy.deepcopy(ffn.act)
        self.fc2 = copy.deepcopy(ffn.fc2)
        self.fc2.weight.data = ffn.fc2.weight.data[:, order_H.to(ffn.fc2.weight.device)]
        self.router = ExpertRouter(_rows(ffn.fc1, speaker_R), self.act, active, balance_rate)
        self.scale = nn.Parameter(torch.zeros_like(self.router.balance))
        self.train(ffn.training)

    @property
    def expert_params(self) -> int:
        """Parameters of one expert."""
        bias = 0 if self.fc1.bias is None else self.neurons
        return self.neurons * (self.fc1.in_features + self.fc2.out_features) + bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., D) → (B, ..., D)."""
        x_TD = x.flatten(0, -2)
        score_TR, chosen_TK = self.router(x_TD)
        gain_TR = 1 + score_TR * self.scale
        compute = self._masked if self.training else self._dispatched
        return compute(x_TD, gain_TR, chosen_TK).unflatten(0, x.shape[:-1])

    def _masked(self, x_TD: Tensor, gain_TR: Tensor, chosen_TK: Tensor) -> Tensor:
        used_TR = torch.zeros_like(gain_TR).scatter(1, chosen_TK, 1.0)
        weight_TN = F.pad(gain_TR * used_TR, (self.shared, 0), value=1.0)
        hidden_TNM = self.act(self.fc1(x_TD)).unflatten(1, (self.experts, self.neurons))
        return self.fc2((hidden_TNM * weight_TN[:, :, None]).flatten(1))

    def _dispatched(self, x_TD: Tensor, gain_TR: Tensor, chosen_TK: Tensor) -> Tensor:
        out_TD = self._part(x_TD, 0, self.shared, self.fc2.bias)
        for expert in chosen_TK.unique().tolist():
            token_t = (chosen_TK == expert).any(dim=1).nonzero().squeeze(1)
            first = self.shared + expert
            part_tD = self._part(x_TD[token_t], first, first + 1)
            part_tD = gain_TR[token_t, expert, None] * part_tD
            out_TD = out_TD.index_add(0, token_t, part_tD.to(out_TD.dtype))
        return out_TD

    def _part(self, x_TD: Tensor, start: int, stop: int, bias: Tensor | None = None) -> Tensor:
        """What experts ``start`` to ``stop`` make of the tokens, plus ``bias``."""
        own = slice(start * self.neurons, stop * self.neurons)
        own_bias = None if self.fc1.bias is None else self.fc1.bias[own]
        hidden_TM = self.act(F.linear(x_TD, self.fc1.weight[own], own_bias))
        return F.linear(hidden_TM, self.fc2.weight[:, own], bias)


def feed_forwards(model: nn.Module) -> dict[str, FeedForward]:
    """The modules of ``model`` that compute fc2(act(fc1(x))) and nothing else, by path."""
    return {
        path: cast(FeedForward, module)
        for path, module in model.named_modules()
        if _is_feed_forward(module)
    }


def _is_feed_forward(module: nn.Module) -> bool:
    children = dict(module.named_children())
    fc1, fc2 = children.pop("fc1", None), children.pop("fc2", None)
    if not isinstance(fc1, nn.Linear) or not isinstance(fc2, nn.Linear):
        return False
    if isinstance(module, ExpertLayer) or children.pop("act", None) is None:
        return False
    return fc1.out_features == fc2.in_features and all(map(_does_nothing, children.values()))


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _rows(linear: nn.Linear, row: Tensor) -> nn.Linear:
    """A copy of ``linear`` with those output rows."""
    row = row.to(linear.weight.device)
    taken = nn.Linear(
        linear.in_features, len(row), linear.bias is not None, device="meta"
    ).to_empty(device=linear.weight.device)
    taken.weight.data = linear.weight.data[row]
    if linear.bias is not None:
        taken.bias.data = linear.bias.data[row]
    return taken
