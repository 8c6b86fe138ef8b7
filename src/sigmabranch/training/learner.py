"""A network and what moves it: one optimizer step at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sigmabranch.conversion.calibrate import without_labels
from sigmabranch.data import Share, derive_seed
from sigmabranch.errors import CheckpointError, MemoryExhausted, NumericError
from sigmabranch.training.engine import Engine
from sigmabranch.training.memory import largest_fitting, out_of_memory
from sigmabranch.training.mixing import MIXES
from sigmabranch.training.objectives import Objective, StepOutput
from sigmabranch.training.optim import (
    NodeScale,
    build_average,
    build_optimizer,
    build_schedule,
    lr_factor,
)
from sigmabranch.training.passes import Pass, split_share, weighted_sum
from sigmabranch.training.recipe import Recipe

_UNCHANGED = (
    "the batch size stays that of the recipe, and the same command then continues from the last "
    "checkpoint"
)

# Input channels from which no overrun was found: see :func:`_memory_format`.
_SAFE_INPUTS = 8


class Learner:
    """Trains ``model`` in place, on the engine's device.

    Args:
        model: the network; ``objective.entry`` names the method that is trained.
        objective: the loss.
        recipe: optimizer, schedule, precision and the rest.
        engine: devices and processes.
        steps_per_epoch: optimizer steps, for the schedule.
        pass_size: most samples that go through the network at once in this process.
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
        pass_size: int,
        seed: int,
    ) -> None:
        self._model, self._objective, self._recipe = model, objective, recipe
        self._engine, self._pass_size, self._seed = engine, pass_size, seed
        self._steps_per_epoch = steps_per_epoch
        self._total_steps = steps_per_epoch * recipe.epochs
        self.step, self.lr = 0, recipe.lr

        objective.setup(engine)
        model.to(engine.device)
        turn = objective.turn
        self._turn_step = 0 if turn is None else max(1, round(turn.share * self._total_steps))
        if turn is not None:
            turn.prepare(model, done=False)
        self._format = _memory_format(model, engine.device)
        model.to(memory_format=self._format)  # type: ignore[call-overload]
        self._average = build_average(model, recipe)
        self._assemble()

    def _assemble(self) -> None:
        """Optimizer, schedule and wrapper for the parameters that the network has now."""
        self._optimizer = build_optimizer(self._model, self._recipe)
        self._schedule = build_schedule(self._optimizer, self._recipe, self._steps_per_epoch)
        self._node_scale: NodeScale | None = None
        entry: nn.Module = _Entry(self._model, self._objective.entry)
        if self._recipe.compile:
            entry.compile()
        self._entry, self._stepper = self._engine.setup(entry, self._optimizer)

    @property
    def network(self) -> nn.Module:
        """What to evaluate: the moving average if there is one, else the network itself."""
        return self._model if self._average is None else self._average.module

    @property
    def turns(self) -> bool:
        """Whether the network turns now, between the step that is done and the next one."""
        return self.step == self._turn_step > 0

    @property
    def has_turned(self) -> bool:
        """Whether the network has the form in which it will be used."""
        return self.step >= self._turn_step

    def turn(self, batches: Iterable[Share]) -> None:
        """Change the network as the objective asks; moments and schedule go on.

        Args:
            batches: samples that the change may learn from.
        """
        turn, old = self._objective.turn, self._optimizer
        assert turn is not None
        schedule, rates = self._schedule.state_dict(), [g["lr"] for g in old.param_groups]
        before = copy.deepcopy(self._model.state_dict()) if self._average else {}
        self._model.eval()
        with self._engine.autocast(self._recipe.precision):
            origin = turn.make(
                self._model, self._formatted(batches), self._engine.shards, self._seed
            )
        if self._average is not None:
            self._average = self._turned(self._average, before)
        self._assemble()
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            for parameter in group["params"]:
                moments = old.state.get(origin.get(parameter, parameter))
                if moments:
                    self._optimizer.state[parameter] = copy.deepcopy(moments)
        self._schedule.load_state_dict(schedule)
        self._model.train()

    def _turned(self, average: AveragedModel, before: Mapping[str, Tensor]) -> AveragedModel:
        """The moving average in the network's new form; what the turn has changed starts anew."""
        turned = build_average(self._model, self._recipe)
        assert turned is not None
        means, now = average.module.state_dict(), self._model.state_dict()
        kept = {name: means[name] for name in now if torch.equal(before[name], now[name])}
        turned.module.load_state_dict({**now, **kept})
        turned.n_averaged.copy_(average.n_averaged)
        return turned

    def _formatted(self, batches: Iterable[Share]) -> Iterator[Share]:
        for share in batches:
            yield share._replace(x=self._in_format(share.x))

    def _in_format(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self._format) if x.ndim == 4 else x

    def train(self) -> None:
        """Put the network into training mode."""
        self._model.train()

    def learn(self, share: Share) -> dict[str, Tensor]:
        """One step on the mean gradient over the step's samples.

        Returns:
            The metrics, whose average over processes is their mean over the samples.

        Raises:
            MemoryExhausted: with the option that makes the step fit.
        """
        passes = split_share(share, self._pass_size, self._engine.rank, self._engine.world_size)
        outputs = self._outputs(passes)
        if outputs is None:
            raise self._exhausted(share, max(len(part.y) for part in passes))
        metrics = {"loss": weighted_sum([output.loss.detach() for output in outputs], passes)}
        for name in outputs[0].metrics:
            metrics[name] = weighted_sum([output.metrics[name] for output in outputs], passes)
        leaf_probs = [output.leaf_prob for output in outputs if output.leaf_prob is not None]
        if leaf_probs:
            self._scale_nodes(self._engine.mean(weighted_sum(leaf_probs, passes)))
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
        self._engine.unify(self._model)
        self.rest()

    def rest(self) -> None:
        """Put the network into evaluation mode."""
        if self._objective.turn is not None:
            self._objective.turn.release(self._model)
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
        if self._objective.turn is not None and step >= self._turn_step:
            self._objective.turn.prepare(self._model, done=True)
            self._average = build_average(self._model, self._recipe)
            self._assemble()
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
        self.lr = self._recipe.lr * lr_factor(self._recipe, max(step - 1, 0), self._steps_per_epoch)

    def _outputs(self, passes: Sequence[Pass]) -> list[StepOutput] | None:
        """Add the gradients of all passes; None if memory ran out, which frees what they held."""
        try:
            return [
                self._backward(part, number, last=number + 1 == len(passes))
                for number, part in enumerate(passes)
            ]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None

    def _backward(self, part: Pass, number: int, *, last: bool) -> StepOutput:
        x, y = self._in_format(part.x), part.y
        torch.manual_seed(derive_seed(self._seed, self.step, number, self._engine.rank))
        if self._recipe.mix != "none":
            x, y = MIXES[self._recipe.mix](x, self._recipe.mix_alpha), without_labels(y)
        progress = self.step / self._total_steps
        with self._engine.accumulating(self._entry, not last):
            with self._engine.autocast(self._recipe.precision):
                output = self._objective(self._entry, x, y, progress)
            self._engine.backward(output.loss * part.weight)
        return output

    def _exhausted(self, share: Share, tried: int) -> MemoryExhausted:
        """What to say when ``tried`` samples at once were too many."""
        begun = f"out of memory with {tried} samples per pass"
        own = math.ceil(share.total / self._engine.world_size)
        if self._engine.world_size > 1:  # a trial would wait for processes that have no part in it
            passes = math.ceil(2 * own / tried)
            return MemoryExhausted(f"{begun} and process: try --accumulate {passes}; {_UNCHANGED}")
        fitting = largest_fitting(lambda samples: self._attempt(share, samples), tried)
        if not fitting:
            return MemoryExhausted(
                f"{begun}, and a single one does not fit either: use a larger device"
            )
        return MemoryExhausted(
            f"{begun}; {fitting} fit: use --accumulate {math.ceil(own / fitting)}; {_UNCHANGED}"
        )

    def _attempt(self, share: Share, samples: int) -> None:
        """Forward and backward of some of a step's samples, for their use of memory alone."""
        self._stepper.zero_grad(set_to_none=True)
        self._backward(Pass(share.x[:samples], share.y[:samples], 1.0), 0, last=True)

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


def _memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """The layout of images in which ``model`` trains fastest, or else safely."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    # PyTorch 2.13 on CPUs corrupts memory where it trains some small convolutions channels last:
    # the process dies later, somewhere else. Networks that hold one keep the order that is safe.
    unsafe = device.type == "cpu" and any(
        conv.kernel_size == (1, 1) and conv.stride != (1, 1) and conv.in_channels < _SAFE_INPUTS
        for conv in convolutions
    )
    return torch.channels_last if convolutions and not unsafe else torch.contiguous_format
