"""DecisioNet (Gottlieb et al., ACCV 2022): a tree whose nodes learn which classes go where.

The classes are clustered by how often the source network confuses them; each inner node is a single
linear unit that is taught its class's side.

Shapes: B batch, V classes, I inner nodes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from sigmabranch.backbones import Levels, ModelSpec
from sigmabranch.errors import ConfigError
from sigmabranch.measure import count_parameters
from sigmabranch.net import SigmaBranchNet
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.decision_net import DecisionNet
from sigmabranch.peers.decision_parts import (
    Split,
    one_path,
    own_parts,
    path_params,
    redrawn,
    tree_parts,
)
from sigmabranch.peers.label_tree import LEFT, OFF_ITS_WAY, class_codes, confusions, linkage
from sigmabranch.peers.system import System, Trained, check_choices, share
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example, sketch
from sigmabranch.training import DenseObjective, FinetuneRecipe, Recipe, StepOutput
from sigmabranch.tree import TreeSpec

# How finely the width is solved for.
_WIDTH_STEPS = 1000


class DecisionObjective(DenseObjective):
    """Cross-entropy, and how far the gates on the true class's way are from its code.

    Args:
        recipe: label smoothing and distillation.
        code_weight: of the mean squared distance from the code.
        teacher: as for :class:`~sigmabranch.training.DenseObjective`.
    """

    entry = "gated"

    def __init__(
        self, recipe: Recipe, code_weight: float, teacher: nn.Module | None = None
    ) -> None:
        super().__init__(recipe, teacher)
        self.code_weight = code_weight

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """Loss, the distance from the codes, and how many gates are on their class's side."""
        logits_BV, gate_BI, arrived_BL, code_VI = model(x)
        loss, metrics, _ = self.classified(logits_BV, x, y, progress)
        code_BI = code_VI[y]
        on_way_BI = (code_BI != OFF_ITS_WAY).float()
        count = on_way_BI.sum().clamp(min=1)
        code_loss = ((gate_BI - code_BI).square() * on_way_BI).sum() / count
        hit_BI = ((gate_BI.detach() - code_BI).abs() <= 0.5).float() * on_way_BI
        metrics |= {"code": code_loss.detach(), "train_side": 100 * hit_BI.sum() / count}
        scaled = isinstance(self.recipe, FinetuneRecipe) and self.recipe.node_grad_scale
        leaf_prob_L = arrived_BL.detach().mean(0) if scaled else None
        return StepOutput(loss + self.code_weight * code_loss, metrics, leaf_prob_L)


@dataclass(frozen=True, kw_only=True)
class DecisioNet(System):
    """A tree over the classes, with supervised single-unit routers.

    Attributes:
        topology: ``"own"``: the source network's early stages as trunk, then branches of its later
            stages, each split narrower by ``width``; ``"tree"``: the task's own tree.
        start: ``"scratch"``, or with the task's tree ``"source"``: trunk, branches and heads as
            conversion leaves them, and only the decision nodes new.
        split: where ``"own"`` begins to branch: after the first stage (``"early"``), or so that
            the last split comes before the last stage (``"late"``).
        code_weight: β, how much gates are taught their class's side. The authors' code has 0, and
            says nothing of what they used.
        overlap: classes confused with the other side more often may go either way; None lets none.
        confusion: ``"counted"`` answers, or ``"expected"`` ones, the mean probabilities: these
            still tell classes apart where a network makes hardly a mistake on its training data.
        depth: levels of decisions of ``"own"``.
        width: share of the channels that ``"own"`` leaves after each split.
    """

    name: ClassVar[str] = "decisionet"
    summary: ClassVar[str] = "a tree over confused classes with supervised routers"
    sized_by: ClassVar[tuple[str, ...]] = ("width", "depth")

    topology: Literal["own", "tree"] = "own"
    start: Literal["scratch", "source"] = "scratch"
    split: Split = "early"
    code_weight: float = 1.0
    overlap: float | None = None
    confusion: Literal["counted", "expected"] = "counted"
    depth: int = 1
    width: float = 0.5

    def __post_init__(self) -> None:
        check_choices(self, "topology", "start", "split", "confusion")
        if (self.topology, self.start) == ("own", "source"):
            raise ConfigError(
                "decisionet start=source takes over the task's branches: set topology=tree too"
            )
        if not (self.code_weight >= 0 and math.isfinite(self.code_weight)):
            raise ConfigError(f"decisionet code_weight must be at least 0, got {self.code_weight}")
        if self.overlap is not None:
            share("decisionet overlap", self.overlap)
        if not 0 < self.width <= 1:
            raise ConfigError(f"decisionet width must be in (0, 1], got {self.width}")
        self._own_tree()

    def check(self, task: Task) -> None:
        """The tree must fit the network, ``"own"`` know how to narrow it, and SciPy be there."""
        if self.topology == "tree":
            if task.tree.decide_after is not None:
                raise ConfigError("DecisioNet decides level by level: leave out tree.decide_after")
            if task.tree.most_branches > 2:
                raise ConfigError("DecisioNet decides between left and right: use a binary tree")
            sketch(task)
        else:
            self._one_path(task)
        linkage()

    def fitted(self, task: Task, active_params: int) -> Self:
        """The width for ``"own"``; the task's tree has its own widths, so it stays."""
        if self.topology == "tree":
            return self

        def size(step: int) -> int:
            return replace(self, width=step / _WIDTH_STEPS)._active(task)

        steps = range(1, _WIDTH_STEPS + 1)
        least, most = size(steps[0]), size(steps[-1])
        if not least <= active_params <= most:
            raise ConfigError(
                f"decisionet cannot have {active_params:,} active parameters: a path of this "
                f"split has from {least:,} to {most:,}"
            )
        above = bisect_left(steps, active_params, key=size)
        near = steps[max(0, above - 1) : above + 1]
        best = min(near, key=lambda step: abs(size(step) - active_params))
        return replace(self, width=best / _WIDTH_STEPS)

    def sketch(self, task: Task) -> nn.Module:
        """Trunk, branches and decision nodes."""
        return self._network(task, None, _no_codes(task, self._tree(task)))

    def details(self, network: nn.Module, task: Task) -> dict[str, Any]:
        """Leaves, and parameters of all decision nodes."""
        assert isinstance(network, DecisionNet)
        nodes = count_parameters([network.nodes])
        return {"leaves": len(network.tree.leaves), "node_params": nodes}

    def run(self, bench: Bench) -> Trained:
        """Cluster the classes, make the network, train it.

        A class's side is part of the checkpoint, so a resumed run never changes it.
        """
        self.check(bench.task)
        task, shards = bench.task, bench.chain.engine.shards
        confusion_VV = confusions(
            bench.dense(),
            bench.calibration(),
            task.model.classes,
            expected=self.confusion == "expected",
            shards=shards,
        )
        converted = bench.chain.converted().cpu() if self.start == "source" else None
        codes_VI = class_codes(confusion_VV, self._tree(task), self.overlap)
        with bench.seeded():
            network = self._network(task, converted, codes_VI)
        recipe = bench.scratch_recipe if converted is None else bench.recipe
        objective = DecisionObjective(recipe, self.code_weight, bench.teacher(recipe))
        bench.train(network, objective, recipe=recipe)
        return Trained(
            network=network,
            recipe=recipe,
            epochs=bench.epochs,
            mark="from scratch" if converted is None else "",
            notes={
                "confused_percent": 100 * float(1 - confusion_VV.diagonal().mean()),
                "class_codes": network.codes.tolist(),
            },
        )

    def _tree(self, task: Task) -> TreeSpec:
        return task.tree if self.topology == "tree" else self._own_tree()

    def _own_tree(self) -> TreeSpec:
        return TreeSpec.balanced(self.depth)

    def _network(
        self, task: Task, converted: SigmaBranchNet | None, codes_VI: Tensor
    ) -> DecisionNet:
        """A fresh network, or the converted one with fresh decision nodes."""
        tree, blank = self._tree(task), example(task)
        if self.topology == "own":
            parts = own_parts(tree, *self._one_path(task), blank)
        else:
            parts = tree_parts(converted or redrawn(sketch(task)[1]))
        return DecisionNet(tree, parts, codes=codes_VI, example=blank)

    def _one_path(self, task: Task) -> tuple[ModelSpec, Levels]:
        return one_path(task.model, depth=self.depth, split=self.split, width=self.width)

    def _active(self, task: Task) -> int:
        """Parameters of one path of ``"own"``."""
        return path_params(*self._one_path(task), example(task))


def _no_codes(task: Task, tree: TreeSpec) -> Tensor:
    return torch.full((task.model.classes, len(tree.inner)), LEFT)
