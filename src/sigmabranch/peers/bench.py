"""The bench every system is put on: the same source network, data, recipe and seed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sigmabranch.tasks import Chain, Task
from sigmabranch.tasks.chain import Ordered, seeded
from sigmabranch.tasks.counting import example
from sigmabranch.training import FinetuneRecipe, Objective, Recipe


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One row's place to work.

    Attributes:
        chain: the task's; gives the source network, the data and the branched network.
        folder: of this row alone, for checkpoints.
    """

    chain: Chain
    folder: Path

    @property
    def task(self) -> Task:
        """Data, network and recipes."""
        return self.chain.task

    @property
    def seed(self) -> int:
        """Of whatever the system draws at random."""
        return self.chain.seed

    @property
    def device(self) -> torch.device:
        """Where networks are trained and measured."""
        return self.chain.engine.device

    @property
    def recipe(self) -> FinetuneRecipe:
        """The one recipe of the table: fine-tuning from the source network."""
        return self.task.finetune

    @property
    def epochs(self) -> int:
        """Epochs behind every network of the table, the source network's included."""
        return self.task.dense.epochs + self.task.finetune.epochs

    @property
    def scratch_recipe(self) -> Recipe:
        """The dense network's recipe, as long as source training and fine-tuning together."""
        return self.task.dense.lasting(self.epochs)

    def dense(self) -> nn.Module:
        """A fresh copy of the trained source network, on :attr:`device`, in eval mode."""
        return self.chain.dense()

    def teacher(self, recipe: Recipe) -> nn.Module | None:
        """The source network, if ``recipe`` asks for imitation of it."""
        return self.dense() if recipe.distills else None

    def continued(self) -> nn.Module:
        """The source network, trained on with :attr:`recipe`; once for all rows that need it."""
        network = self.chain.dense()
        self.chain.train(network, self.recipe, self.chain.folder / "continued")
        return network

    def example(self) -> Tensor:
        """One blank input, (1, ...), on the CPU."""
        return example(self.task)

    def calibration(self) -> Ordered:
        """Batches of (inputs, labels) of the training split, without augmentation."""
        return self.chain.calibration()

    def seeded(self) -> AbstractContextManager[None]:
        """Context in which torch's generator starts from :attr:`seed`."""
        return seeded(self.seed)

    def train(
        self,
        network: nn.Module,
        objective: Objective | None = None,
        *,
        recipe: Recipe | None = None,
        step: str = "trained",
    ) -> None:
        """Train ``network`` in place, resuming the checkpoint in the row's folder.

        Args:
            network: (B, ...) → (B, V) logits in eval mode.
            objective: cross-entropy of the logits if None, with distillation from the source
                network if the recipe says so.
            recipe: :attr:`recipe` if None.
            step: name of the sub-folder, for systems of several trainings.
        """
        self.chain.train(network, recipe or self.recipe, self.folder / step, objective)
