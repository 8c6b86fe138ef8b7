"""Controls: networks of the same cost or the same training, without routing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from sigmabranch.backbones import ModelSpec
from sigmabranch.conversion import single_path
from sigmabranch.errors import ConfigError
from sigmabranch.measure import cost
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.sizing import (
    active_params,
    at_share,
    check_share,
    dense_of_products,
    dense_of_size,
)
from sigmabranch.peers.system import System, Trained, check_choices
from sigmabranch.tasks import Task, count_task
from sigmabranch.tasks.counting import example, sketch


@dataclass(frozen=True, kw_only=True)
class DenseContinued(System):
    """The full dense network, trained on with the fine-tuning recipe: the ceiling."""

    name: ClassVar[str] = "dense-continued"
    summary: ClassVar[str] = "the dense network, trained on"

    def sketch(self, task: Task) -> nn.Module:
        """The dense network itself."""
        return task.model.build()

    def run(self, bench: Bench) -> Trained:
        """Fine-tune the source network as it is."""
        return Trained(network=bench.continued(), recipe=bench.recipe, epochs=bench.epochs)


@dataclass(frozen=True, kw_only=True)
class DenseEqual(System):
    """A narrow dense network that costs what one path costs, from scratch in one schedule.

    Attributes:
        match: what is equal to within one percent: ``"params"`` or ``"macs"``.
        params: how many; those of a path of the task's tree if None.
        distill_weight: share of its loss that imitates the source network.
        active_share: that of the tree whose path it equals, as for the branched network; None for
            the task's own tree.
    """

    name: ClassVar[str] = "dense-equal"
    summary: ClassVar[str] = "a narrow dense network of equal active size"

    match: Literal["params", "macs"] = "params"
    params: int | None = None
    distill_weight: float = 0.0
    active_share: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, "match")
        check_share(self.active_share)
        if self.params is not None and self.active_share is not None:
            raise ConfigError("params and active_share both say how large it is: set one")
        if self.params is not None and (self.params < 1 or self.match == "macs"):
            raise ConfigError(f"dense-equal params is a number of parameters, got {self.params}")
        if not 0 <= self.distill_weight <= 1:
            raise ConfigError(f"distill_weight must be in [0, 1], got {self.distill_weight}")

    def check(self, task: Task) -> None:
        """No width may come within one percent."""
        self.spec(task)

    def spec(self, task: Task) -> ModelSpec:
        """The narrow network's shape."""
        sized = at_share(task, self.active_share)
        if self.match == "params":
            return dense_of_size(task.model, self.params or active_params(sized))
        return dense_of_products(task, count_task(sized)["net"]["macs_flop_counter"])

    def sketch(self, task: Task) -> nn.Module:
        """The narrow network."""
        return self.spec(task).build()

    def run(self, bench: Bench) -> Trained:
        """Train it from scratch for as many epochs as the others have behind them."""
        with bench.seeded():
            network: nn.Module = self.spec(bench.task).build()
        recipe = replace(bench.scratch_recipe, distill_weight=self.distill_weight)
        bench.train(network, recipe=recipe)
        taught = ", distilled from the source network" if self.distill_weight else ""
        return Trained(
            network=network,
            recipe=recipe,
            epochs=recipe.epochs,
            mark=f"from scratch in one schedule{taught}",
        )


@dataclass(frozen=True, kw_only=True)
class SinglePath(System):
    """One path cut from the source network, without routers, and fine-tuned alike.

    Attributes:
        match: what its fine-tuning has in common with the branched network's: ``"epochs"``, or
            ``"training"`` compute, which buys more epochs because one path is trained and not all.
        active_share: that of the tree whose path it is, as for the branched network; None for the
            task's own tree.
    """

    name: ClassVar[str] = "single-path"
    summary: ClassVar[str] = "one path of the tree's widths, no routing"

    match: Literal["epochs", "training"] = "epochs"
    active_share: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, "match")
        check_share(self.active_share)

    def check(self, task: Task) -> None:
        """The tree must fit the network."""
        sketch(at_share(task, self.active_share))

    def sketch(self, task: Task) -> nn.Module:
        """Trunk, specializers and head of one path of the tree."""
        sized = at_share(task, self.active_share)
        # A path has no siblings to share with.
        _, net = sketch(replace(sized, tree=replace(sized.tree, tied=0.0, delta=0)))
        leaf = net.tree.leaves[0]
        nodes = [leaf[: level + 1] for level in range(len(leaf))]
        return nn.Sequential(net.trunk, *map(net.specializer, nodes), net.head(leaf))

    def run(self, bench: Bench) -> Trained:
        """Cut, re-estimate batch norms, fine-tune."""
        task = at_share(bench.task, self.active_share)
        network = single_path(bench.dense(), bench.calibration(), task.tree, spec=task.conversion)
        recipe, mark = bench.recipe, ""
        if self.match == "training":
            epochs = round(recipe.epochs * self._training_ratio(bench.task))
            recipe = recipe.lasting(epochs)
            mark = f"{epochs} epochs of fine-tuning: as much compute as the branched network's"
        bench.train(network, recipe=recipe)
        return Trained(
            network=network, recipe=recipe, epochs=task.dense.epochs + recipe.epochs, mark=mark
        )

    def _training_ratio(self, task: Task) -> float:
        """Multiply-adds of a training step of the branched network over those of this one."""
        branched = count_task(at_share(task, self.active_share))["net"]["soft_macs"]
        return branched / cost(self.sketch(task), example(task))["dense"]["macs"]
