"""The three networks that a budget can buy, each with the recipe that is best known for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from torch import nn

from sigmabranch.backbones import FAMILIES, ModelSpec, source_of
from sigmabranch.conversion import Budget, ConversionSpec, convert, plan_budget, single_path
from sigmabranch.errors import ConfigError
from sigmabranch.measure import count_parameters
from sigmabranch.net import SigmaBranchNet
from sigmabranch.peers.sizing import dense_within
from sigmabranch.race.ground import Ground
from sigmabranch.tasks.chain import seeded
from sigmabranch.training import DenseObjective, FinetuneRecipe, Objective, Recipe, finetuning
from sigmabranch.tree import TreeSpec

# Share of the loss that imitates the dense network, and of the training before leaves part.
_CUT_IMITATION, _SCRATCH_IMITATION, _UPCYCLE = 0.3, 0.5, 0.4

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a race is run for.

    Attributes:
        budget: bytes of the float32 parameters that one input may read.
        tree: whose paths spend it.
        conversion: how channels and clusters are chosen.
        finetune: recipe of tree and path; it decides the schedule of both.
        scratch: recipe of the narrow dense network, which starts from scratch.
        narrow: shape of that network, or None.
        reason: why there is none.
    """

    budget: int
    tree: TreeSpec
    conversion: ConversionSpec
    finetune: FinetuneRecipe
    scratch: Recipe
    narrow: ModelSpec | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        parts = ("tree", "conversion", "finetune", "scratch")
        return {"budget": self.budget, **{name: getattr(self, name).to_dict() for name in parts}}

    def candidates(self) -> list[Candidate]:
        """Those that are possible, the cheapest to store first."""
        cut: list[Candidate] = [SinglePath(self), Tree(self)]
        return cut if self.narrow is None else [NarrowDense(self), *cut]

    def left_out(self) -> dict[str, str]:
        """Candidate → why it is not possible."""
        return {} if self.narrow is not None else {NarrowDense.name: self.reason}


def make_plan(
    dense: nn.Module,
    example: Any,
    budget: int | str,
    tree: TreeSpec,
    conversion: ConversionSpec,
    finetune: FinetuneRecipe,
    scratch: Recipe,
) -> Plan:
    """Solve a budget for all candidates, without data.

    Args:
        dense: the network; its weights do not matter.
        example: a legal input, (1, ...).
        budget: bytes of the parameters that one input may read, such as ``"12MB"``, or ``"40%"``
            of the dense network.
        tree: its leaves and what it names of cuts and heads; widths are solved anew.
        conversion, finetune, scratch: as for :class:`Plan`; what is not set of imitation and late
            upcycling is set here.

    Raises:
        ConfigError: a budget that no tree meets, or that holds the whole dense network.
        UnsupportedOperation, ConversionError: see :func:`~sigmabranch.conversion.plan_budget`.
    """
    size = count_parameters([dense])
    limits = Budget.parse(budget, size)
    if limits.bytes(size) <= limits.active_bytes:
        raise ConfigError(
            f"the budget of {limits.active_bytes:,} bytes holds the whole dense network, which has "
            f"{limits.bytes(size):,}: use that, or give a smaller budget"
        )
    planned = plan_budget(dense, example, budget, tree)
    narrow, reason = _narrow(dense, limits.active_bytes * 8 // limits.bits)
    return Plan(
        budget=limits.active_bytes,
        tree=planned.tree,
        conversion=replace(conversion, channels="average"),
        finetune=replace(imitating(finetune, _CUT_IMITATION), upcycle=finetune.upcycle or _UPCYCLE),
        scratch=imitating(scratch, _SCRATCH_IMITATION),
        narrow=narrow,
        reason=reason,
    )


def imitating(recipe: AnyRecipe, weight: float) -> AnyRecipe:
    """The recipe, imitating the dense network by that weight unless it says how much itself."""
    return recipe if recipe.distills else replace(recipe, distill_weight=weight)


def _narrow(dense: nn.Module, params: int) -> tuple[ModelSpec | None, str]:
    """The largest narrower network of the same family, or the reason why there is none."""
    source: Mapping[str, Any] = source_of(dense) or {}
    family = FAMILIES.get(str(source.get("builder")))
    if family is None:
        return None, (
            f"this library builds no narrower {type(dense).__name__}: it knows the families "
            f"{', '.join(FAMILIES)}"
        )
    try:
        return dense_within(family.from_dict(source["config"]), params), ""
    except ConfigError as error:
        return None, str(error)


@dataclass(frozen=True, slots=True)
class Candidate(ABC):
    """One way to spend the budget."""

    name: ClassVar[str]
    plan: Plan

    @property
    @abstractmethod
    def recipe(self) -> Recipe:
        """How it is trained."""

    @abstractmethod
    def make(self, ground: Ground) -> nn.Module:
        """The network before its training; the same at every call."""

    def objective(self, network: nn.Module, ground: Ground) -> Objective:
        """What its training minimises."""
        del network
        return DenseObjective(self.recipe, ground.dense)


class NarrowDense(Candidate):
    """A narrow dense network from scratch, distilled from the dense one."""

    name = "narrow-dense"

    @property
    def recipe(self) -> Recipe:
        """See :class:`Candidate`."""
        return self.plan.scratch

    def make(self, ground: Ground) -> nn.Module:
        """See :class:`Candidate`."""
        assert self.plan.narrow is not None
        with seeded(ground.seed):
            return self.plan.narrow.build()


class SinglePath(Candidate):
    """One path cut from the dense network, fine-tuned."""

    name = "single-path"

    @property
    def recipe(self) -> Recipe:
        """See :class:`Candidate`."""
        return replace(self.plan.finetune, upcycle=0.0)

    def make(self, ground: Ground) -> nn.Module:
        """See :class:`Candidate`."""
        return single_path(
            ground.dense, ground.calibration, self.plan.tree, spec=_seeded(self.plan, ground)
        )


class Tree(Candidate):
    """A tree cut from the dense network, fine-tuned with late upcycling."""

    name = "tree"

    @property
    def recipe(self) -> FinetuneRecipe:
        """See :class:`Candidate`."""
        return self.plan.finetune

    def make(self, ground: Ground) -> SigmaBranchNet:
        """See :class:`Candidate`."""
        return convert(
            ground.dense,
            ground.calibration,
            self.plan.tree,
            spec=_seeded(self.plan, ground),
            progress=ground.calibrating,
        )

    def objective(self, network: nn.Module, ground: Ground) -> Objective:
        """See :class:`Candidate`."""
        assert isinstance(network, SigmaBranchNet)
        return finetuning(network, self.recipe, ground.dense)


def _seeded(plan: Plan, ground: Ground) -> ConversionSpec:
    return replace(plan.conversion, seed=ground.seed + plan.conversion.seed)


def sizes(network: nn.Module) -> dict[str, int]:
    """Parameters that one input reads at most, and all that are stored."""
    stored = count_parameters([network])
    if not isinstance(network, SigmaBranchNet):
        return {"active_params": stored, "stored_params": stored}
    paths = (count_parameters([network.path(leaf)]) for leaf in network.tree.leaves)
    return {"active_params": max(paths), "stored_params": stored}
