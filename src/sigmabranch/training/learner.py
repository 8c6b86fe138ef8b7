"""A network and what moves it: one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.data.seeds import derive_seed
from sigmabranch.errors import CheckpointError, NumericError
from sigmabranch.training.engine import Engine
from sigmabranch.training.objectives import Objective, StepOutput
from sigmabranch.training.optim import NodeScale, build_average, build_optimizer, build_schedule
from sigmabranch.training.recipe import Recipe


class Learner:
    """Trains ``model`` in place, on the engine's device.

    Args:
        model: the network; ``objective.entry`` names the method that is trained.
        objective: the loss.
        recipe: optimizer, schedule, precision and the rest.
        engine: devices and processes.
        steps_per_epoch: optimizer steps, for the schedule.
        seed: of whatever is random inside the network.

    Attributes:
        step: optimizer steps done.
        lr: learning rate of the latest step.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        recipe: Recipe,
        engine: Engine,
        *,
        steps_per_epoch: int,
        seed: int,
    ) -> None:
        self._model, self._objective, self._recipe = model, objective, recipe
        self._engine, self._seed = engine, seed
        self._total_steps = steps_per_epoch * recipe.epochs
        self.step, self.lr = 0, recipe.lr

        objective.setup(engine)
        model.to(engine.device)
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = build_optimizer(model, recipe)
        self._schedule = build_schedule(self._optimizer, recipe, steps_per_epoch)
        self._average = build_average(model, recipe)
        self._node_scale: NodeScale | None = None
        entry: nn.Module = _Entry(model, objective.entry)
        if recipe.compile:
            entry.compile()
        self._entry, self._stepper = engine.setup(entry, self._optimizer)

    @property
    def network(self) -> nn.Module:
        """What to evaluate: the moving average if there is one, else the network itself."""
        return self._model if self._average is None else self._average.module

    def train(self) -> None:
        """Put the network into training mode."""
        self._model.train()

    def learn(self, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """One step on the averaged gradients of ``batches``; returns their mean metrics."""
        outputs = [self._backward(x, y, i, len(batches)) for i, (x, y) in enumerate(batches)]
        metrics = {"loss": mean([output.loss.detach() for output in outputs])}
        for name in outputs[0].metrics:
            metrics[name] = mean([output.metrics[name] for output in outputs])
        leaf_probs = [output.leaf_prob for output in outputs if output.leaf_prob is not None]
        if leaf_probs:
            self._scale_nodes(self._engine.mean(mean(leaf_probs)))
        if self._recipe.clip_norm:
            metrics["grad_norm"] = self._engine.clip(
                self._entry, self._stepper, self._recipe.clip_norm
            )
        self.lr = self._optimizer.param_groups[0]["lr"]
        self._stepper.step()
        self._stepper.zero_grad(set_to_none=True)
        self._schedule.step()
        if self._average is not None:
            self._average.update_parameters(self._model)
        self.step += 1
        return metrics

    def finish(self) -> None:
        """Give the network its averaged weights and put it into evaluation mode."""
        if self._average is not None:
            self._model.load_state_dict(self._average.module.state_dict())
        self._model.eval()

    def check_finite(self) -> None:
        """Look for NaN or infinity in the weights, which a finite loss does not exclude.

        Raises:
            NumericError: there is one.
        """
        weights = [p.detach() for p in self._model.parameters() if p.requires_grad]
        if not torch.stack(torch._foreach_norm(weights)).isfinite().all():
            raise NumericError(
                f"a weight became NaN or infinite by step {self.step}: "
                "lower lr or set clip_norm; the last checkpoint is kept"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs besides the step's number."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Continue after optimizer step ``step``.

        Raises:
            CheckpointError: the state is that of another network.
        """
        try:
            self._model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
            if self._average is not None:
                self._average.load_state_dict(state["average"])
        except (RuntimeError, ValueError, KeyError) as error:
            what = " ".join(str(error).split())
            raise CheckpointError(
                f"the checkpoint does not fit this network: {what[:200]}; use another folder"
            ) from error
        self.step = step

    def _backward(self, x: Tensor, y: Tensor, part: int, parts: int) -> StepOutput:
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        torch.manual_seed(derive_seed(self._seed, self.step, part, self._engine.rank))
        progress = self.step / self._total_steps
        with self._engine.accumulating(self._entry, part + 1 < parts):
            with self._engine.autocast(self._recipe.precision):
                output = self._objective(self._entry, x, y, progress)
            self._engine.backward(output.loss / parts)
        return output

    def _scale_nodes(self, leaf_prob: Tensor) -> None:
        if self._node_scale is None:
            self._node_scale = NodeScale(self._model, len(leaf_prob), leaf_prob.device)
        self._node_scale(leaf_prob)


class _Entry(nn.Module):
    """Calls one method of a network, so that wrapping and compiling it covers that method."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.model, self.method)(x)


def mean(values: Sequence[Tensor]) -> Tensor:
    """Mean of tensors of one shape."""
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean(0)
