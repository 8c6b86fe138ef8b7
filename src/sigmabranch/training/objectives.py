"""What a training step minimises: a dense network's loss, or a branched one's.

Shapes: B batch, L leaves, V classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.conversion.calibrate import has_labels
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.training.engine import Engine
from sigmabranch.training.losses import branched_loss, distillation
from sigmabranch.training.recipe import FinetuneRecipe, Recipe


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
    """

    entry: str

    def setup(self, engine: Engine) -> None:
        """Move what the objective owns to the engine's device; called once before training."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """The loss of one batch, ``progress`` in [0, 1] being the share of training done."""


class DenseObjective:
    """Cross-entropy of a plain network, mixed with imitation of a teacher, or that alone.

    Args:
        recipe: label smoothing and distillation.
        teacher: network whose logits (B, V) are imitated when ``recipe.distill_weight`` > 0.
    """

    entry = "forward"

    def __init__(self, recipe: Recipe, teacher: nn.Module | None = None) -> None:
        _check_teacher(recipe, teacher)
        self.recipe = recipe
        self.teacher = teacher if recipe.distill_weight else None

    def setup(self, engine: Engine) -> None:
        """Move the teacher to the engine's device, in evaluation mode."""
        if self.teacher is not None:
            self.teacher.to(engine.device).eval()

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, progress: float) -> StepOutput:
        """Loss and training accuracy of one batch."""
        return self.classified(model(x), x, y)

    def classified(self, logits: Tensor, x: Tensor, y: Tensor) -> StepOutput:
        """The same for logits (B, V) that are there, of a network that gives more than these."""
        logits_BV = logits.float()
        if not has_labels(y):
            _check_imitation_alone(self.recipe)
            return StepOutput(self._imitation(logits_BV, x), {})
        check_labels(y, logits_BV.shape[-1])
        loss = F.cross_entropy(logits_BV, y, label_smoothing=self.recipe.label_smoothing)
        if self.teacher is not None:
            loss = torch.lerp(loss, self._imitation(logits_BV, x), self.recipe.distill_weight)
        return StepOutput(loss, {"train_top1": percent(logits_BV.argmax(1) == y)})

    def _imitation(self, logits_BV: Tensor, x: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            teacher_BV = self.teacher(x)
        return distillation(logits_BV, teacher_BV, self.recipe.distill_temperature).mean()


class BranchedObjective:
    """Equations 5 to 8 on all leaves of a ``SigmaBranchNet`` (see :mod:`.losses`).

    Args:
        recipe: weights, temperatures and switches.
        teacher: dense network to imitate when ``recipe.distill_weight`` > 0.
        class_leaf: (V, L) leaf shares of each class, rows summing to one, needed with
            ``recipe.class_target``.
    """

    entry = "soft"

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
        self.teacher = teacher if recipe.distill_weight else None
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
            with torch.no_grad():
                teacher_BV = self.teacher(x)
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
    if recipe.distill_weight < 1:
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
    if recipe.distill_weight and teacher is None:
        raise ConfigError("recipe distill_weight needs a teacher: give one, or set it to 0")
