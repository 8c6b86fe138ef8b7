"""DeepMoE: gates on the channels inside residual blocks (Wang et al., arXiv:1806.01531).

*Narrow* in the paper's tables means a network of ordinary width, as here.

Shapes: B batch, L gated convolutions, U gates of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.measure import count_parameters
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.expert_resnet import Chosen, ExpertResNet
from sigmabranch.peers.phases import phases, phases_mark
from sigmabranch.peers.skipping import (
    check_size,
    check_target,
    check_weights,
    residual_spec,
)
from sigmabranch.peers.system import System, Trained, check_choices
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example
from sigmabranch.training import DenseObjective, Recipe, StepOutput

# Share of the first training in which the penalty grows to its weight.
_WARMUP = 0.2


@dataclass(frozen=True, kw_only=True)
class DeepMoE(System):
    """Channels inside residual blocks that gates switch off.

    No official code exists. Ours, where the paper is silent: the embedding's widths
    (32-64-128-128, for images above 64 pixels 32-64-128-192-128, and an eighth of them where the
    dense network has under two million parameters) with batch norm; gates behind batch norm and
    ReLU; an embedding scaled to a constant sum and heads of equal weights, so that all gates are 1
    at first and training begins at the source network; the penalty's warm-up over a fifth of the
    first training, which takes 60 % of the epochs.

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
    sized_by: ClassVar[tuple[str, ...]] = ("sparsity", "target")

    variant: Literal["A", "B"] = "A"
    sparsity: float = 1e-3
    embedding_weight: float = 1.0
    target: float | None = None
    target_weight: float = 5.0

    def __post_init__(self) -> None:
        check_choices(self, "variant")
        if self.target is not None:
            check_target(self, self.target)
        check_weights(self, "sparsity", "embedding_weight", "target_weight")

    def check(self, task: Task) -> None:
        """The network must have residual blocks, and the recipe two epochs."""
        residual_spec(self.name, task)
        phases(task.finetune)

    def fitted(self, task: Task, active_params: int) -> Self:
        """With the target that gives the size if all convolutions open the same share of gates."""
        self.check(task)
        network = self.sketch(task)
        always = network.bounds()["least"]["active_params"]
        check_size(self, always, active_params)
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
        return {
            "gated_convolutions": len(network.widths),
            "gates": sum(network.widths),
            "embedding_params": count_parameters([network.embedding]),
            "head_params": count_parameters([network.heads]),
        }

    def run(self, bench: Bench) -> Trained:
        """Train gates and network together, then the network alone behind frozen gates."""
        first, last = phases(bench.recipe)
        dense = bench.dense().cpu()
        with bench.seeded():
            network = ExpertResNet(dense, bench.example(), self.variant)
            network.classify_embedding(bench.task.model.classes)
        network.to(bench.device)
        objective = SparseObjective(first, bench.teacher(bench.recipe), self, network.widths)
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


class SparseObjective(DenseObjective):
    """Classification by the network and by the embedding, and few open gates."""

    entry = "gated"

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
        logit_BU = cast(Tensor, chosen.head_logits)
        open_BU = (logit_BU > 0).float() + (logit_BU - logit_BU.detach())
        share_BL = torch.stack([part.mean(1) for part in open_BU.split(self.widths, 1)], dim=1)
        return self.system.target_weight * (share_BL - target).square().sum(1).mean()
