"""What a training step minimises: a dense network's loss, or a branched one's.

Shapes: B batch, L leaves, V classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.conversion import class_targets
from sigmabranch.conversion.calibrate import has_labels
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.net import SigmaBranchNet, is_branched
from sigmabranch.training.engine import Engine
from sigmabranch.training.losses import branched_loss, distillation
from sigmabranch.training.recipe import FinetuneRecipe, Recipe
from sigmabranch.training.turn import Turn
from sigmabranch.training.upcycling import Upcycling


class StepOutput(NamedTuple):
    """What an objective makes of one batch.

    Attributes:
        loss: scalar with gradient.
        metrics: scalars without gradient, the same names at every step.
        leaf_prob: E[P_j] over the batch, (L,), when node gradients are to be scaled by it.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    leaf_prob: Tensor | None = None


class Objective(Protocol):
    """Turns a batch into a loss; ``entry`` names the method of the model that it calls.

    Labels of a batch that has none are as :func:`~sigmabranch.conversion.calibrate.as_pair` says.

    Attributes:
        turn: what happens to the model in the middle of its training, or None.
    """

    entry: str
    turn: Turn | None

    def setup(self, engine: Engine) -> None:
        """Move what the objective owns to the engine's device; called once before training."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """The loss of one batch, ``progress`` in [0, 1] being the share of training done."""


class DenseObjective:
    """Cross-entropy of a plain network, mixed with imitation of a teacher, or that alone.

    Args:
        recipe: label smoothing and distillation.
        teacher: network whose logits (B, V) are imitated when the recipe distills.
    """

    entry = "forward"
    turn: Turn | None = None

    def __init__(self, recipe: Recipe, teacher: nn.Module | None = None) -> None:
        _check_teacher(recipe, teacher)
        self.recipe = recipe
        self.teacher = teacher if recipe.distills else None

    def setup(self, engine: Engine) -> None:
        """Move the teacher to the engine's device, in evaluation mode."""
        if self.teacher is not None:
            self.teacher.to(engine.device).eval()

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """Loss and training accuracy of one batch."""
        return self.classified(model(x), x, y, progress)

    def classified(self, logits: Tensor, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """The same for logits (B, V) that are there, of a network that gives more than these."""
        logits_BV = logits.float()
        if not has_labels(y):
            _check_imitation_alone(self.recipe)
            return StepOutput(self._imitation(logits_BV, x), {})
        check_labels(y, logits_BV.shape[-1])
        loss = F.cross_entropy(logits_BV, y, label_smoothing=self.recipe.label_smoothing)
        if self.teacher is not None:
            weight = self.recipe.distill_weight_at(progress)
            loss = torch.lerp(loss, self._imitation(logits_BV, x), weight)
        return StepOutput(loss, {"train_top1": percent(logits_BV.argmax(1) == y)})

    def _imitation(self, logits_BV: Tensor, x: Tensor) -> Tensor:
        assert self.teacher is not None
        teacher_BV = taught(self.teacher, x, logits_BV.shape[-1])
        return distillation(logits_BV, teacher_BV, self.recipe.distill_temperature).mean()


class BranchedObjective:
    """Equations 5 to 8 on all leaves of a ``SigmaBranchNet`` (see :mod:`.losses`).

    Args:
        recipe: weights, temperatures and switches.
        teacher: dense network to imitate when the recipe distills.
        class_leaf: (V, L) leaf shares of each class, rows summing to one, needed with
            ``recipe.class_target``.
    """

    entry = "soft"
    turn: Turn | None = None

    def __init__(
        self,
        recipe: FinetuneRecipe,
        teacher: nn.Module | None = None,
        class_leaf: Tensor | None = None,
    ) -> None:
        _check_teacher(recipe, teacher)
        if recipe.class_target and class_leaf is None:
            raise ConfigError(
                "recipe class_target needs a network converted with class clusters: "
                "convert with them, or set class_target=false"
            )
        self.recipe = recipe
        self.teacher = teacher if recipe.distills else None
        self.class_leaf = class_leaf
        self.engine: Engine | None = None

    def setup(self, engine: Engine) -> None:
        """Move teacher and class targets to the engine's device."""
        self.engine = engine if engine.world_size > 1 else None
        if self.teacher is not None:
            self.teacher.to(engine.device).eval()
        if self.class_leaf is not None:
            self.class_leaf = self.class_leaf.to(engine.device)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """Loss, its terms, and how sharp routing and its target are on one batch.

        Raises:
            DataError: labels that the network has no output for, or none where they are needed.
        """
        labelled = has_labels(y)
        if not labelled:
            _check_imitation_alone(self.recipe)
        soft = model(x)
        if labelled:
            check_labels(y, soft[0].shape[-1])
        teacher_BV = None
        if self.teacher is not None:
            teacher_BV = taught(self.teacher, x, soft[0].shape[-1])
        terms = branched_loss(
            soft,
            y if labelled else None,
            self.recipe,
            progress=progress,
            class_leaf=self.class_leaf,
            teacher_logits=teacher_BV,
            global_mean=self._mean_of_all(len(y)),
        )
        with torch.no_grad():
            prob_BL = soft[1].float().exp()
            top_B, leaf_B = prob_BL.max(1)
            chosen_BV = soft[0][torch.arange(len(y), device=y.device), leaf_B]
            metrics = {
                "cls": terms.cls,
                "resp": terms.resp,
                "balance_loss": terms.balance,
                "distill": terms.distill,
                **_right(chosen_BV, y if labelled else None, teacher_BV),
                "train_max_p": top_B.mean(),
                "train_max_r": terms.responsibility.amax(1).mean(),
            }
            leaf_prob_L = terms.weight.mean(0) if self.recipe.node_grad_scale else None
        present = {name: value for name, value in metrics.items() if value is not None}
        return StepOutput(terms.total, present, leaf_prob_L)

    def _mean_of_all(self, samples: int) -> Callable[[Tensor], Tensor] | None:
        """Turns a mean over this process's ``samples`` into that over all processes' samples."""
        if self.engine is None:
            return None
        engine = self.engine

        def joint(mean_L: Tensor) -> Tensor:
            count = mean_L.new_tensor(float(samples))
            return engine.mean(mean_L * count) / engine.mean(count)

        return joint


class RoutedObjective(DenseObjective):
    """A dense network's loss on the path of each sample: a step costs what one path costs.

    The network's own top-1 decisions choose the path, so the routers learn nothing. Every node's
    gradient becomes the mean over the samples that passed it.

    Args:
        recipe: late upcycling, label smoothing and distillation.
        teacher: as for :class:`DenseObjective`.
        leaves: L.
    """

    entry = "hard"
    recipe: FinetuneRecipe

    def __init__(self, recipe: FinetuneRecipe, teacher: nn.Module | None, leaves: int) -> None:
        super().__init__(recipe, teacher)
        self.leaves = leaves
        self._upcycling = Upcycling(recipe, self.teacher)
        self.turn = self._upcycling

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """Loss and training accuracy of one batch, and how many samples each leaf had."""
        hard = model(x)
        if self.recipe.groups == "confusions" and hard[0].shape[-1] < self.leaves:
            raise ConfigError(
                f"{hard[0].shape[-1]} classes cannot be dealt out to {self.leaves} leaves: "
                "choose a tree of fewer leaves, or finetune.groups=clusters"
            )
        output = self.classified(hard[0], x, y, progress)
        used_L = hard[1].bincount(minlength=self.leaves) / len(x)
        return output._replace(leaf_prob=used_L if self._upcycling.done else None)


def finetuning(
    net: SigmaBranchNet, recipe: FinetuneRecipe, teacher: nn.Module | None = None
) -> Objective:
    """What fine-tuning minimises: the paper's loss, or with ``recipe.upcycle`` that of each path.

    Without branches it is a dense network's loss, whatever the recipe says of routing.

    Raises:
        ConfigError: the recipe needs a teacher, class clusters, or branches that are alike.
    """
    if not is_branched(net):
        return DenseObjective(recipe, teacher)
    if recipe.upcycle:
        return RoutedObjective(recipe, teacher, len(net.tree.leaves))
    return BranchedObjective(recipe, teacher, class_targets(net.record))


def taught(teacher: nn.Module, x: Tensor, classes: int) -> Tensor:
    """The teacher's logits, (B, V), without gradient.

    Raises:
        DataError: it has other classes than the network.
    """
    with torch.no_grad():
        teacher_BV = teacher(x)
    if teacher_BV.shape != (len(x), classes):
        raise DataError(
            f"the teacher gives outputs of shape {tuple(teacher_BV.shape)} where the network gives "
            f"{(len(x), classes)}: use a teacher of the same {classes} classes"
        )
    return teacher_BV


def check_labels(y: Tensor, classes: int) -> None:
    """Raise :class:`DataError` at a label that the network has no output for.

    Only on the CPU: reading the labels of an accelerator would make the host wait at every step.
    """
    if y.device.type == "cpu" and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise DataError(
            f"labels reach from {int(y.min())} to {int(y.max())}, the network has {classes} "
            "classes: relabel the data or widen the head"
        )


def _check_imitation_alone(recipe: Recipe) -> None:
    """Raise :class:`DataError` unless the recipe leaves nothing to learn from labels."""
    if recipe.distill_weight < 1 or recipe.distill_weight_at(1.0) < 1:
        raise DataError(
            f"the loader gives no labels, and recipe distill_weight is {recipe.distill_weight:g}: "
            "set it to 1 and give a teacher, or yield (inputs, labels)"
        )


def _right(
    logits_BV: Tensor, y: Tensor | None, teacher_BV: Tensor | None
) -> dict[str, Tensor | None]:
    """How often the logits give the true class or, where nobody knows that, the teacher's."""
    given_B = logits_BV.argmax(1)
    if y is not None:
        return {"train_top1": percent(given_B == y)}
    assert teacher_BV is not None
    return {"train_as_teacher": percent(given_B == teacher_BV.argmax(1))}


def percent(hit: Tensor) -> Tensor:
    """Share of true entries, in percent, as a scalar tensor."""
    return 100.0 * hit.float().mean()


def _check_teacher(recipe: Recipe, teacher: nn.Module | None) -> None:
    if recipe.distills and teacher is None:
        raise ConfigError("recipe distill_weight needs a teacher: give one, or set it to 0")
