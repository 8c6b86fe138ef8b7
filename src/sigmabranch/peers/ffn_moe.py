"""Analytical FFN-to-MoE: the feed-forward layers of a transformer, regrouped into experts.

After "Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis" (CMoE, ACL 2026). It was
made for language models with gated layers; here it is carried over to fc1, activation, fc2. Neurons
that often fire strongly become a shared expert; the rest are dealt into equal clusters of neurons
that fire together, and one neuron of each cluster tells whether its cluster is worth computing.

Shapes: T tokens (of all images), D width, H hidden width, N experts, S shared ones, R routed ones
(N = S + R), K chosen experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from sigmabranch.coupling import evaluating
from sigmabranch.errors import ConfigError
from sigmabranch.measure import count_parameters
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.expert_layer import ExpertLayer, FeedForward, feed_forwards
from sigmabranch.peers.moe_net import MoeNet
from sigmabranch.peers.neuron_groups import grouped
from sigmabranch.peers.sizing import TOLERANCE
from sigmabranch.peers.system import System, Trained, share
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example

# Into how many an expert may be split to meet a size.
_FINER = (1, 2, 4)


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
    sized_by: ClassVar[tuple[str, ...]] = ("experts", "active")

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
        total = count_parameters([model])
        routed = self.experts - self.shared
        for ffn in feed_forwards(model).values():
            row = ffn.fc1.in_features + (ffn.fc1.bias is not None)
            neuron = row + ffn.fc2.out_features
            unread = (routed - self.active) * (ffn.fc1.out_features // self.experts)
            total += routed * (row + 1) - unread * neuron  # a router's row and a scale each
        return total
