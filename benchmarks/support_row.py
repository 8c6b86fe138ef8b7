"""Everything the support sweep measures of one network."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, combinations, islice
from typing import Any, TypeVar

import psutil
import torch
from benchmarks.support_check import path_errors
from benchmarks.support_models import LESS, built, subject
from torch import Tensor, nn

from sigmabranch.backbones import Backbone, as_backbone
from sigmabranch.conversion import BudgetPlan, ConversionSpec, convert, plan_budget
from sigmabranch.conversion.cut import Cutter
from sigmabranch.coupling import TOLERANCE, WRITTEN, CouplingMap, trace
from sigmabranch.errors import ConfigError, ConversionError, SigmaBranchError, UnsupportedOperation
from sigmabranch.net import Path, SigmaBranchNet
from sigmabranch.tree import ENTRIES, TreeSpec

MIB = 2**20
INPUTS = 8
BYTES = 4  # of a parameter
SPEC = ConversionSpec(samples=INPUTS, norm_samples=INPUTS, centred=True, balanced=True)

TRIES = 3  # conversions that show one way to begin
SMALL = TreeSpec.balanced(depth=1)  # the tree by which it is shown
ERRORS = ("path_error", "path_error_settled")

T = TypeVar("T")


def measured(
    name: str, seed: int = 0, tree: TreeSpec | None = None, entries: Sequence[str] = ENTRIES
) -> dict[str, Any]:
    """The row of one network: how it fared, what it cost, what it was asked for and gave.

    Args:
        name: of the network.
        seed: of weights and inputs.
        tree: its tree but for cuts and sizes; two levels and four leaves if None.
        entries: ways for a level to begin, of which it is shown whether it can.
    """
    model, example = built(name, seed)
    row = {
        **asdict(subject(name)),
        "less": dict(LESS.get(name, {})),
        "input": list(example.shape[1:]),
        "params": _count(model),
    }
    meter = Meter()
    try:
        with torch.no_grad():
            row |= _converted(model, example, tree or TreeSpec(), seed, entries, meter)
    except SigmaBranchError as error:
        row |= {"outcome": "refused", "during": meter.phase, "reason": str(error)}
    return row | {"seconds": meter.seconds, "extra_mib": meter.extra_mib}


def _converted(
    model: nn.Module,
    example: Tensor,
    tree: TreeSpec,
    seed: int,
    entries: Sequence[str],
    meter: Meter,
) -> dict[str, Any]:
    backbone = meter("follow", lambda: as_backbone(model, example))
    watched = tuple(dict.fromkeys((*backbone.chain, backbone.head[-1], *backbone.whole)))
    coupling = meter("trace", lambda: trace(backbone.model, example, watch=watched))
    plan, asked = meter("budget", lambda: _solved(backbone, example, tree))
    inputs = varied(example, seed)
    net = meter("convert", lambda: convert(backbone, [inputs], plan.tree, spec=SPEC))
    built_params = max(_count(Path(net, leaf)) for leaf in net.tree.leaves)
    found = {
        "stages": len(backbone.stages),
        **asked,
        **_sizes(plan, built_params),
        **_tree(plan.tree, backbone, coupling),
        **_outcome(backbone, coupling, net, inputs[:1]),
        "whole": _whole(coupling),
    }
    shown = {entry: found for entry in found["begin"] if found["groups_cut"]}
    return found | {
        "entries": {
            entry: {key: shown[entry][key] for key in ("cuts", *ERRORS)}
            if entry in shown
            else _entry(backbone, coupling, entry, inputs)
            for entry in entries
        }
    }


def varied(example: Tensor, seed: int) -> Tensor:
    """Random inputs that differ in size, not in noise alone, so that a router has a choice."""
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(INPUTS, *example.shape[1:], generator=generator)
    scales = torch.linspace(0.5, 2, INPUTS)[torch.randperm(INPUTS, generator=generator)]
    return inputs * scales.view(-1, *[1] * (inputs.ndim - 1))


def _whole(coupling: CouplingMap) -> list[str]:
    """Forwards in which a size is written, so that channels are kept for them."""
    written = {why for why in coupling.fixed.values() if why.startswith(WRITTEN)}
    return sorted(why.removeprefix(WRITTEN) for why in written)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _solved(
    backbone: Backbone, example: Tensor, tree: TreeSpec
) -> tuple[BudgetPlan, dict[str, Any]]:
    """A plan for half of the network or, where no path is as small, for the middle of what is."""
    dense = _count(backbone.model)
    smallest = _smallest(backbone, example, tree)
    half = dense // 2
    asked = half if smallest < half else (smallest + dense) // 2
    plan = plan_budget(backbone, example, BYTES * asked, tree)
    request = "half" if asked == half else "middle"
    return plan, {"request": request, "asked_params": asked, "smallest_params": smallest}


def _smallest(backbone: Backbone, example: Tensor, tree: TreeSpec) -> int:
    """Parameters of the smallest path, as a budget that nothing meets is told."""
    try:
        plan_budget(backbone, example, 1, tree)
    except ConfigError as error:
        told = re.search(r"the smallest path has ([\d,]+)", str(error))
        if told is None:
            raise
        return int(told[1].replace(",", "")) // BYTES
    raise AssertionError("a path of one byte")


def _sizes(plan: BudgetPlan, built_params: int) -> dict[str, Any]:
    sizes = plan.candidates[0].sizes
    return {
        "active_params": sizes.active_params,
        "built_params": built_params,
        "spent": plan.spent,
        "total_params": sizes.total_params,
        "macs": sizes.macs,
        "candidates": len(plan.candidates),
        "smallest_share": plan.candidates[0].smallest_share,
    }


def _tree(tree: TreeSpec, backbone: Backbone, coupling: CouplingMap) -> dict[str, Any]:
    levels = backbone.levels(tree.depth, tree.cuts)
    return {
        "cuts": list(tree.cuts or ()),
        "widths": list(tree.widths or ()),
        "shares": list(tree.shares or ()),
        "heads": list(tree.heads or ()),
        "begin": list(Cutter(backbone, levels, coupling, tree.entry).entries),
    }


def _outcome(
    backbone: Backbone, coupling: CouplingMap, net: SigmaBranchNet, inputs: Tensor
) -> dict[str, Any]:
    """Exact or approximate, by which operations, and how far the paths are off."""
    dropped = dropped_units(coupling, net)
    cut = [space.units[torch.isin(space.units, dropped)].tolist() for space in coupling.spaces]
    operations = [
        {_operation(coupling.inexact[unit]) for unit in units if unit in coupling.inexact}
        for units in cut
    ]
    error, settled = path_errors(backbone, net, inputs)
    return {
        "outcome": "approximate" if any(operations) else "exact",
        "groups_cut": sum(map(bool, cut)),
        "groups_inexact": sum(map(bool, operations)),
        "inexact_by": dict(sorted(Counter(chain.from_iterable(operations)).items())),
        "verify_error": max(
            channels["max_error"] for node in net.record["nodes"].values() for channels in node
        ),
        "path_error": error,
        "path_error_settled": settled,
    }


def _operation(why: str) -> str:
    """The operation in a reason such as "layer_norm in stages.1.norm"."""
    return why.partition(" in ")[0]


def dropped_units(coupling: CouplingMap, net: SigmaBranchNet) -> Tensor:
    """The units that some node of the tree does without."""
    gone = [torch.empty(0, dtype=torch.int64)]
    for plan in net.plans.values():
        for name, axes in plan.keep.items():
            for axis, kept in axes.items():
                units = coupling.axes[name][axis]
                gone.append(units[~torch.isin(torch.arange(len(units)), kept)])
    return torch.cat(gone).unique()


def _entry(backbone: Backbone, coupling: CouplingMap, entry: str, inputs: Tensor) -> dict[str, Any]:
    """Whether a level can begin in that way, shown by a conversion at the last places for it."""
    why = "no level of this network can"
    for chosen in islice(_trees(backbone, coupling, SMALL, entry), TRIES):
        try:
            net = convert(backbone, [inputs], chosen, spec=SPEC)
        except SigmaBranchError as error:
            why = str(error)
            continue
        if len(dropped_units(coupling, net)):
            error, settled = path_errors(backbone, net, inputs[:1])
            if not settled <= TOLERANCE:
                why = f"a path is off by {settled:.0e} of the largest logit, norms settled"
                continue
            cuts = list(chosen.cuts or ())
            return {"cuts": cuts, **dict(zip(ERRORS, (error, settled), strict=True))}
        why = "there are no channels to cut inside"
    return {"cuts": None, "reason": why}


def _trees(
    backbone: Backbone, coupling: CouplingMap, tree: TreeSpec, entry: str
) -> Iterator[TreeSpec]:
    """Trees of which some level would begin in that way, those with the last cuts first.

    Left to itself, a tree mixes levels that project with levels that cannot.
    """
    stages = [stage for stage in backbone.stages if backbone.chain.index(stage)]
    for cuts in reversed(list(combinations(stages, tree.depth))):
        levels = backbone.levels(tree.depth, cuts)
        for how in (entry, None):
            try:
                begins = Cutter(backbone, levels, coupling, how).entries
            except (ConversionError, UnsupportedOperation):
                continue
            if entry in begins:
                yield replace(tree, cuts=cuts, entry=how)
                break


@dataclass(slots=True)
class Meter:
    """Seconds and memory of phases, one after the other.

    Attributes:
        phase: the last one that began.
        seconds: of each phase.
        extra_mib: the most memory that each held at once, beyond what was held before it.
    """

    phase: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    extra_mib: dict[str, float] = field(default_factory=dict)

    def __call__(self, phase: str, act: Callable[[], T]) -> T:
        """Do ``act``, noting what it took."""
        self.phase = phase
        began = time.perf_counter()
        with _Watch() as watch:
            try:
                return act()
            finally:
                self.seconds[phase] = time.perf_counter() - began
                self.extra_mib[phase] = watch.extra / MIB


class _Watch(threading.Thread):
    """Samples this process's memory, since its peak as the system tells it never falls."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._process.memory_info().rss
        self.extra = 0

    def __enter__(self) -> _Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.extra = max(self.extra, self._process.memory_info().rss - self._before)
