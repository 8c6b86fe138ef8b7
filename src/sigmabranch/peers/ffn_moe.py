"""Analytical FFN-to-MoE: the feed-forward layers of a transformer, regrouped into experts.

After "Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis" (CMoE, ACL 2026). It was
made for language models with gated layers; here it is carried over to fc1, activation, fc2. Neurons
that often fire strongly become a shared expert; the rest are dealt into equal clusters of neurons
that fire together, and one neuron of each cluster tells whether its cluster is worth computing.

Shapes: B batch, T tokens (of all images), D width, H hidden width, N experts, S shared ones, R
routed ones (N = S + R), M neurons an expert, K chosen experts, L layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.coupling import evaluating
from sigmabranch.errors import ConfigError, MissingDependency
from sigmabranch.measure import Load, module_costs
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.sizing import TOLERANCE, parameters_of
from sigmabranch.peers.system import System, Trained, share
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example

# Into how many an expert may be split to meet a size.
_FINER = (1, 2, 4)


class FeedForward(nn.Module):
    """What any module is called here that :func:`feed_forwards` finds."""

    fc1: nn.Linear
    act: nn.Module
    fc2: nn.Linear


@dataclass(frozen=True, kw_only=True)
class FfnMoE(System):
    """Feed-forward layers carved into experts, of which each token takes a few.

    Layers are carved one after the other, each fed by those already carved. Without tuning the
    output is a plain partial sum of the dense layer's. The original tunes low-rank adapters (LoRA
    of rank 8, Adam at 5.65e-5, one epoch of 2,048 samples); here all weights are fine-tuned with
    the table's recipe, as in every other system.

    A token reads few experts, but what an image must read at batch 1 is the union over its tokens:
    that is its active size. :meth:`details` gives the size for one token beside it.

    Attributes:
        experts: N, shared ones included; divides the hidden width.
        shared: S, which every token takes.
        active: K routed experts that a token takes.
        markers: share of a layer's neurons that one token marks as firing, at least one neuron.
        weighted: rank a token's neurons by what they add to the output, |h_j|·‖W2[:, j]‖, and not
            by |h_j|.
        normalised: rank by activations of normalised inputs and weight rows, as the original code
            does.
        tuned: fine-tune afterwards.
        samples: training images that the activations are measured on.
        balance_rate: by how much a step of training moves the handicap of an expert that is chosen
            more, or less, often than the average.
    """

    name: ClassVar[str] = "ffn-moe"
    summary: ClassVar[str] = "feed-forward layers split into experts by firing pattern"

    experts: int = 16
    shared: int = 2
    active: int = 2
    markers: float = 0.02
    weighted: bool = False
    normalised: bool = True
    tuned: bool = True
    samples: int = 1024
    balance_rate: float = 1e-3

    def __post_init__(self) -> None:
        share("ffn-moe markers", self.markers)
        if not (self.shared >= 0 and 1 <= self.active <= self.experts - self.shared):
            raise ConfigError(
                f"of {self.experts} experts {self.shared} cannot be shared and {self.active} "
                "active: ffn-moe needs shared at least 0 and active from 1 to experts - shared"
            )
        if self.samples < 1 or not 0 <= self.balance_rate < math.inf:
            raise ConfigError("ffn-moe samples must be at least 1, balance_rate at least 0")

    def check(self, task: Task) -> None:
        """The network must have feed-forward layers that split into equal experts."""
        with torch.device("meta"):
            model = task.model.build()
        self._check_network(model, task.name)

    def fitted(self, task: Task, active_params: int) -> Self:
        """The same system with about ``active_params`` read for one token.

        What an image reads is the union over its tokens and cannot be set beforehand. The share of
        neurons that is shared stays; ``active`` changes, and experts are halved or quartered where
        whole ones miss the size by more than one percent. A size that no choice of experts reaches,
        because attention and the shared neurons alone are larger or the dense network is smaller,
        leaves the system as it is.
        """
        self.check(task)
        with torch.device("meta"):
            model = task.model.build()
        sizes: dict[Self, int] = {}
        for parts in _FINER:
            sizes |= {each: each._token_params(model) for each in self._choices(model, parts)}
            nearest = min(sizes, key=lambda each: abs(sizes[each] - active_params))
            if abs(sizes[nearest] - active_params) <= TOLERANCE * active_params:
                return nearest
        in_reach = min(sizes.values()) <= active_params <= max(sizes.values())
        return nearest if in_reach else self

    def sketch(self, task: Task) -> MoeNet:
        """The carved network, its neurons in their old order."""
        self.check(task)
        model = task.model.build()
        for path, ffn in feed_forwards(model).items():
            hidden = ffn.fc1.out_features
            model.set_submodule(path, self._layer(ffn, torch.arange(hidden)))
        return MoeNet(model, example(task))

    def details(self, network: nn.Module, task: Task) -> dict[str, Any]:
        """``active_params_per_token`` and the share of neurons in it, ``ffn_share_per_token``."""
        del task
        return {
            "active_params_per_token": cast(MoeNet, network).params_per_token,
            "ffn_share_per_token": (self.shared + self.active) / self.experts,
        }

    def run(self, bench: Bench) -> Trained:
        """Carve the source network, then fine-tune it unless that is switched off."""
        model = bench.dense()
        self._check_network(model, bench.task.name)
        self.carve(model, lambda: bench.calibration().part(0, 1, self.samples))
        network = MoeNet(model, bench.example())
        if self.tuned:
            bench.train(network)
        return Trained(
            network=network,
            recipe=bench.recipe if self.tuned else None,
            epochs=bench.epochs if self.tuned else bench.task.dense.epochs,
            mark="" if self.tuned else "no fine-tuning",
            notes=self.details(network, bench.task),
        )

    @torch.no_grad()
    def carve(
        self, model: nn.Module, read: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    ) -> nn.Module:
        """Replace every feed-forward layer of ``model`` by experts, in place.

        Args:
            model: in eval mode.
            read: the (inputs, labels) batches to measure activations on, on the model's device;
                called once for each layer.

        Raises:
            MissingDependency: scipy is not installed.
        """
        for path, ffn in feed_forwards(model).items():
            together_HH = self._firing_together(model, ffn, read())
            order_H, speaker_R = grouped(together_HH, self.experts, self.shared)
            model.set_submodule(path, self._layer(ffn, order_H, speaker_R))
        return model

    def _firing_together(
        self, model: nn.Module, ffn: FeedForward, batches: Iterable[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """(H, H) float64: how many tokens mark both neurons; the diagonal, how many mark one."""
        hidden = ffn.fc1.out_features
        marks = max(1, round(self.markers * hidden))
        together_HH = torch.zeros(hidden, hidden, dtype=torch.float64)

        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            strength_TH = self._strength(ffn, args[0].flatten(0, -2))
            best_TK = strength_TH.topk(marks, dim=1).indices
            marker_TH = torch.zeros_like(strength_TH).scatter_(1, best_TK, 1.0)
            # Counts of one batch are exact in float32.
            together_HH.add_((marker_TH.T @ marker_TH).to("cpu", torch.float64))

        hook = ffn.register_forward_pre_hook(count)
        try:
            with evaluating(model):
                for x, _ in batches:
                    model(x)
        finally:
            hook.remove()
        return together_HH

    def _strength(self, ffn: FeedForward, x_TD: Tensor) -> Tensor:
        """(T, H): what a token's neurons are ranked by."""
        before_TH = ffn.fc1(x_TD)
        if self.normalised:
            # Both norms divide the bias too, so that a neuron keeps its threshold.
            length_TH = x_TD.norm(dim=1, keepdim=True) * ffn.fc1.weight.norm(dim=1)
            before_TH = before_TH / length_TH.clamp_min(torch.finfo(x_TD.dtype).tiny)
        strength_TH = ffn.act(before_TH).abs()
        return strength_TH * ffn.fc2.weight.norm(dim=0) if self.weighted else strength_TH

    def _layer(
        self, ffn: FeedForward, order_H: Tensor, speaker_R: Tensor | None = None
    ) -> ExpertLayer:
        """``ffn`` with its neurons in that order; each expert's first one speaks if None do."""
        if speaker_R is None:
            speaker_R = order_H.view(self.experts, -1)[self.shared :, 0]
        return ExpertLayer(
            ffn,
            order_H,
            speaker_R,
            experts=self.experts,
            active=self.active,
            balance_rate=self.balance_rate,
        )

    def _check_network(self, model: nn.Module, where: str) -> None:
        widths = {ffn.fc1.out_features for ffn in feed_forwards(model).values()}
        if not widths:
            raise ConfigError(
                f"ffn-moe needs layers of fc1, act and fc2, and the {type(model).__name__} of "
                f"{where} has none: choose a task with a transformer, such as cifar100-vit"
            )
        common = math.gcd(*widths)
        if common % self.experts:
            fewest = self.shared + self.active
            allowed = [n for n in range(fewest, common + 1) if common % n == 0]
            raise ConfigError(
                f"a hidden width of {' or '.join(map(str, sorted(widths)))} does not split into "
                f"{self.experts} equal experts: set ffn-moe experts to one of "
                f"{', '.join(map(str, allowed))}"
            )

    def _choices(self, model: nn.Module, parts: int) -> list[Self]:
        """All numbers of active experts, each expert cut into ``parts``; none if it cannot be."""
        experts, shared = parts * self.experts, parts * self.shared
        if any(ffn.fc1.out_features % experts for ffn in feed_forwards(model).values()):
            return []
        return [
            replace(self, experts=experts, shared=shared, active=active)
            for active in range(1, experts - shared + 1)
        ]

    def _token_params(self, model: nn.Module) -> int:
        """Parameters that one token reads once the dense ``model`` is carved this way."""
        total = parameters_of(model)
        routed = self.experts - self.shared
        for ffn in feed_forwards(model).values():
            row = ffn.fc1.in_features + (ffn.fc1.bias is not None)
            neuron = row + ffn.fc2.out_features
            unread = (routed - self.active) * (ffn.fc1.out_features // self.experts)
            total += routed * (row + 1) - unread * neuron  # a router's row and a scale each
        return total


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


class MoeNet(nn.Module):
    """A network whose feed-forward layers are :class:`ExpertLayer`; its active size varies.

    Every token takes as many experts as any other, so the multiply-adds are the same for all
    inputs; what is read depends on how alike the tokens of an image are.

    Args:
        model: the carved network, (B, ...) → (B, V) logits, images along the first axis of what its
            feed-forward layers see.
        example: one input, (1, ...), to count on.
    """

    expert_params: Tensor

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.model = model
        # Dispatch computes K experts a token whatever the input, so any input gives the count.
        self.total_params, self.macs = module_costs(model, example)[""]
        layers = self.layers()
        prices = [layer.expert_params for layer in layers for _ in layer.scale]
        self.params_per_token = self.total_params - sum(
            layer.expert_params * (len(layer.scale) - layer.router.active) for layer in layers
        )
        device = layers[0].scale.device
        self.register_buffer("expert_params", torch.tensor(prices, device=device), persistent=False)

    def layers(self) -> list[ExpertLayer]:
        """The layers with experts, in order."""
        return [module for module in self.model.modules() if isinstance(module, ExpertLayer)]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, V)."""
        return self.model(x)

    def with_load(self, x: Tensor) -> tuple[Tensor, Load]:
        """Logits (B, V) and load; choices are the experts that any token of an image took."""
        chosen: dict[nn.Module, Tensor] = {}

        def keep(router: nn.Module, _: tuple[Tensor, ...], choice: Choice) -> None:
            chosen[router] = choice.chosen

        hooks = [layer.router.register_forward_hook(keep) for layer in self.layers()]
        try:
            logits_BV = self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        used_BLR = [_union(chosen[layer.router], layer, len(x)) for layer in self.layers()]
        choices_BG = torch.cat(used_BLR, dim=1)
        unused_B = (~choices_BG * self.expert_params).sum(dim=1)
        macs_B = torch.full_like(unused_B, self.macs)
        return logits_BV, Load(self.total_params - unused_B, macs_B, choices_BG)

    def bounds(self) -> dict[str, dict[str, int]]:
        """From an image whose tokens all agree to one whose tokens take every expert."""
        return {
            "least": {"active_params": self.params_per_token, "macs": self.macs},
            "most": {"active_params": self.total_params, "macs": self.macs},
        }

    def no_weight_decay(self) -> set[str]:
        """What the network inside exempts."""
        names: Iterable[str] = getattr(self.model, "no_weight_decay", tuple)()
        return {f"model.{name}" for name in names}


def feed_forwards(model: nn.Module) -> dict[str, FeedForward]:
    """The modules of ``model`` that compute fc2(act(fc1(x))) and nothing else, by path."""
    return {
        path: cast(FeedForward, module)
        for path, module in model.named_modules()
        if _is_feed_forward(module)
    }


def grouped(together_HH: Tensor, experts: int, shared: int) -> tuple[Tensor, Tensor]:
    """Deal neurons into experts of equal size by which tokens mark them.

    The L1 distance between two neurons' markers, one bit a token, follows from how often each is
    marked and how often both are; so does the distance from a mean of such markers. Clusters start
    from the leftovers that are marked most and take one pass of balanced assignment, as in the
    original code.

    Args:
        together_HH: tokens that mark both neurons, symmetric; the diagonal counts one neuron's.
        experts: N.
        shared: S.

    Returns:
        (H,) the neurons expert by expert, shared ones first; (R,) the neuron of each routed expert
        nearest to the mean of its markers.

    Raises:
        MissingDependency: scipy is not installed.
    """
    rate_H = together_HH.diagonal()
    by_rate_H = rate_H.argsort(descending=True, stable=True)
    size = len(rate_H) // experts
    common_H, left_J = by_rate_H.tensor_split([shared * size])
    if len(left_J) == size:
        cluster_J = torch.zeros_like(left_J)
    else:
        start_R = left_J[: experts - shared]
        apart_JR = rate_H[left_J, None] + rate_H[start_R] - 2 * together_HH[left_J][:, start_R]
        cluster_J = _balanced(apart_JR, size)
    members = [left_J[cluster_J == cluster] for cluster in range(experts - shared)]
    speakers = [_nearest_to_mean(together_HH, member_M) for member_M in members]
    return torch.cat([common_H, *members]), torch.stack(speakers)


def _balanced(cost_JR: Tensor, size: int) -> Tensor:
    """(J,) the cluster of each row, ``size`` rows to a cluster, at the least total cost."""
    try:
        from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 (an optional package)
    except ImportError as error:
        raise MissingDependency("scipy", "peers", "dealing neurons into experts") from error
    _, seat_J = linear_sum_assignment(cost_JR.repeat_interleave(size, dim=1).numpy())
    return torch.from_numpy(seat_J) // size


def _nearest_to_mean(together_HH: Tensor, member_M: Tensor) -> Tensor:
    """The member whose markers are nearest in L1 to the mean c of all members'.

    Σ_t |a_t − c_t| = Σ_t c_t + Σ_t a_t − 2·Σ_t a_t·c_t for bits a_t and c_t in [0, 1], and the
    first sum is the same for all members.
    """
    own_MM = together_HH[member_M][:, member_M]
    return member_M[(own_MM.diagonal() - 2 * own_MM.mean(dim=1)).argmin()]


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
    taken.weight.data = linear.weight.data[row].clone()
    if linear.bias is not None:
        taken.bias.data = linear.bias.data[row].clone()
    return taken


def _union(chosen_TK: Tensor, layer: ExpertLayer, images: int) -> Tensor:
    """(B, R) bool: the experts that any of an image's tokens chose."""
    chosen_BX = chosen_TK.view(images, -1)
    used_BR = torch.zeros(images, len(layer.scale), dtype=torch.bool, device=chosen_TK.device)
    return used_BR.scatter_(1, chosen_BX, True)
