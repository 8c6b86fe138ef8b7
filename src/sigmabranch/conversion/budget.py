"""From a budget of bytes to cuts and widths, solved by counting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf, sqrt
from typing import Any

from torch import Tensor, nn

from sigmabranch.backbones import Backbone, as_backbone
from sigmabranch.backbones.forward import parameter_count
from sigmabranch.conversion.cut import Cutter
from sigmabranch.conversion.ruler import Ruler, Sizes, Tables, applications
from sigmabranch.coupling import CouplingMap, evaluating, trace
from sigmabranch.errors import ConfigError, ConversionError, SigmaBranchError, UnsupportedOperation
from sigmabranch.sizes import byte_count
from sigmabranch.tree import TreeSpec

# Steps of the common scale and of each level's own; the budget is hit within far less than 2 %.
_STEPS = 1024
# Where groups are few or wide, a step is large; a tree that leaves more unspent comes last.
_SPENT = 0.98


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a path, or the whole tree, may at most cost.

    Attributes:
        active_bytes: of one path's parameters.
        total_bytes: of all nodes' parameters, or None.
        macs: of one path's convolutions and linear layers, or None.
        bits: of one parameter.
    """

    active_bytes: int
    total_bytes: int | None = None
    macs: int | None = None
    bits: int = 32

    @classmethod
    def parse(
        cls,
        active: int | str,
        dense_params: int,
        *,
        total: int | str | None = None,
        macs: int | None = None,
        bits: int = 32,
    ) -> Budget:
        """A budget from sizes such as ``"12MB"``, or ``"40%"`` of the dense network.

        Raises:
            ConfigError: no size, or a number of bits that is no width of a parameter.
        """
        if bits not in (4, 8, 16, 32):
            raise ConfigError(f"{bits} bits are no width of a parameter: choose 4, 8, 16 or 32")

        def size(text: int | str) -> int:
            if str(text).strip().endswith("%"):
                try:
                    share = float(str(text).strip()[:-1]) / 100
                    if 0 < share < inf:
                        return int(share * dense_params * bits / 8)
                except ValueError:
                    pass
            return byte_count(text)

        return cls(
            active_bytes=size(active),
            total_bytes=None if total is None else size(total),
            macs=macs,
            bits=bits,
        )

    def allows(self, sizes: Sizes) -> bool:
        """Whether ``sizes`` stay within every limit."""
        return (
            self.bytes(sizes.active_params) <= self.active_bytes
            and (self.total_bytes is None or self.bytes(sizes.total_params) <= self.total_bytes)
            and (self.macs is None or sizes.macs <= self.macs)
        )

    def bytes(self, params: int) -> int:
        """Bytes of so many parameters."""
        return -(-params * self.bits // 8)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One tree that meets the budget.

    Attributes:
        tree: with cuts, widths and shares.
        sizes: its parameters and MACs.
        smallest_share: of the channels that a level keeps, outputs or inner ones, the smallest.
        best: no other candidate is as good in total size, MACs and smallest share, and better in
            one of them.
    """

    tree: TreeSpec
    sizes: Sizes
    smallest_share: float
    best: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "tree": self.tree.to_dict(),
            "active_params": self.sizes.active_params,
            "total_params": self.sizes.total_params,
            "macs": self.sizes.macs,
            "smallest_share": self.smallest_share,
            "best": self.best,
        }


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """The trees that meet a budget, and the one that is taken.

    The rule: of the candidates that spend the active bytes to 2 %, or of all if none does, the one
    whose most reduced level keeps the largest share of its channels; of equals, the one with the
    smaller total size.

    Attributes:
        budget: what was asked for.
        dense_params: parameters of the dense network.
        inexact: why the taken tree cannot compute exactly what is left of the dense network, one
            reason per operation; empty if it does.
        candidates: best by the rule first.
    """

    budget: Budget
    dense_params: int
    inexact: tuple[str, ...]
    candidates: tuple[Candidate, ...]

    @property
    def tree(self) -> TreeSpec:
        """The tree that is taken."""
        return self.candidates[0].tree

    @property
    def spent(self) -> float:
        """The part of the active bytes that its paths take."""
        used = self.budget.bytes(self.candidates[0].sizes.active_params)
        return used / self.budget.active_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "active_bytes": self.budget.active_bytes,
            "total_bytes": self.budget.total_bytes,
            "macs": self.budget.macs,
            "bits": self.budget.bits,
            "dense_params": self.dense_params,
            "spent": self.spent,
            "inexact": list(self.inexact),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }


def plan_budget(
    dense: nn.Module | Backbone,
    example: Tensor,
    budget: int | str,
    tree: TreeSpec | None = None,
    *,
    total: int | str | None = None,
    macs: int | None = None,
    bits: int = 32,
) -> BudgetPlan:
    """Find the cuts and widths that spend a budget, without data.

    Args:
        dense: the network.
        example: a legal input, (1, ...).
        budget: bytes of one path's parameters, such as ``"12MB"``, or ``"40%"`` of the dense.
        tree: leaves, projection and entry of the tree; two levels and four leaves if None. Cuts
            that it names are kept, and heads are cut if it names shares of them; widths and shares
            are solved anew.
        total: most bytes of all nodes, as if siblings shared nothing (they then have less).
        macs: most multiply-accumulates of a path's convolutions and linear layers.
        bits: of a parameter.

    Raises:
        ConfigError: no tree of that depth meets the budget; the message says the smallest size. Or
            siblings are to have deltas, which are not counted here.
        UnsupportedOperation: channels cannot be followed through an operation of the network.
        ConversionError: the network cannot be cut.
    """
    template = tree or TreeSpec()
    template.check_branched()
    if template.delta:
        raise ConfigError("a budget does not count deltas: set tree.delta=0, or widths by hand")
    backbone = as_backbone(dense, example)
    limits = Budget.parse(
        budget, parameter_count(backbone.model), total=total, macs=macs, bits=bits
    )
    found: list[Candidate] = []
    smallest: list[int] = []
    reasons: list[SigmaBranchError] = []
    with evaluating(backbone.model):
        watched = dict.fromkeys((*backbone.chain, backbone.head[-1], *backbone.whole))
        coupling = trace(backbone.model, example, watch=tuple(watched))
        positions = applications(backbone.model, example)
    tables: Tables = {}
    for cuts in _cuts(backbone, template.depth, template.cuts):
        for variant in _variants(template, coupling):
            try:
                ruler = _ruler(backbone, coupling, replace(variant, cuts=cuts), positions, tables)
            except (ConversionError, UnsupportedOperation) as error:
                reasons.append(error)
                continue
            least = ruler.sizes(_scaled(ruler, 0))
            smallest.append(limits.bytes(least.active_params))
            if limits.allows(least):
                found.append(_solved(ruler, limits))
    if not found:
        raise _impossible(limits, smallest, reasons)
    ranked = _ranked(found, limits)
    taken = ranked[0].tree
    return BudgetPlan(
        budget=limits,
        dense_params=parameter_count(backbone.model),
        inexact=_ruler(backbone, coupling, taken, positions, tables).cutter.inexact(taken),
        candidates=ranked,
    )


def _cuts(backbone: Backbone, depth: int, cuts: tuple[str, ...] | None) -> list[tuple[str, ...]]:
    """The given cuts, or every way to place them at the stages."""
    if cuts is not None:
        return [cuts]
    stages = [stage for stage in backbone.stages if backbone.chain.index(stage)]
    if len(stages) < depth:
        raise ConfigError(
            f"a tree of depth {depth} begins at {depth} stages, but the network has "
            f"{len(stages)} ({', '.join(stages)}{_why_few(backbone)}): use a smaller depth or name "
            "tree.cuts"
        )
    return list(combinations(stages, depth))


def _why_few(backbone: Backbone) -> str:
    """What is said of a link that is most of the network."""
    sizes = {path: parameter_count(backbone.model.get_submodule(path)) for path in backbone.chain}
    largest = max(sizes, key=lambda path: sizes[path])
    if 2 * sizes[largest] < parameter_count(backbone.model):
        return ""
    return f"; inside {largest} several tensors are handed on at once"


def _variants(tree: TreeSpec, coupling: CouplingMap) -> Iterator[TreeSpec]:
    """The tree as it is, and with attention heads cut where it leaves that open."""
    ones = (1.0,) * tree.depth
    yield replace(tree, widths=None, shares=None, heads=ones if tree.heads else None)
    if tree.heads is None and any(map(coupling.is_heads, coupling.spaces)):
        yield replace(tree, widths=None, shares=None, heads=ones)


def _ruler(
    backbone: Backbone,
    coupling: CouplingMap,
    tree: TreeSpec,
    positions: dict[str, int],
    tables: Tables,
) -> Ruler:
    levels = backbone.levels(tree.depth, tree.cuts)
    return Ruler(Cutter(backbone, levels, coupling, tree.entry), tree, positions, tables)


def _scaled(ruler: Ruler, step: int) -> TreeSpec:
    """The tree at one common scale: 0 keeps one unit of everything, the last step all.

    n specializers side by side keep width/√n or, where only inner channels are cut, 1/n of these
    (paper, section III-B), times the scale.
    """
    tree = ruler.tree
    widths: list[int] = []
    shares: list[float] = []
    most = max(tree.parallel(level) for level in range(1, tree.depth + 1))
    for level in range(1, tree.depth + 1):
        part = min(1.0, step / _STEPS * most / tree.parallel(level))
        part = max(part, 1e-9)
        if ruler.cutter.entries[level - 1] == "inner":
            widths.append(ruler.channels[level])
            shares.append(part)
        else:
            widths.append(_width(ruler, level, int(ruler.units[level] * sqrt(part))))
            shares.append(sqrt(part))
    return _with(tree, widths, shares)


def _width(ruler: Ruler, level: int, units: int) -> int:
    """Channels of so many units, at least one."""
    return -(-max(1, units) * ruler.channels[level] // ruler.units[level])


def _with(tree: TreeSpec, widths: Sequence[int], shares: Sequence[float]) -> TreeSpec:
    heads = tuple(shares) if tree.heads else None
    return replace(tree, widths=tuple(widths), shares=tuple(shares), heads=heads)


def _solved(ruler: Ruler, budget: Budget) -> Candidate:
    """The largest common scale that the budget allows, then what is left level by level."""

    def allowed(tree: TreeSpec) -> bool:
        return budget.allows(ruler.sizes(tree))

    tree = _scaled(ruler, _last(_STEPS, lambda step: allowed(_scaled(ruler, step))))
    for level in range(tree.depth, 0, -1):
        tree = _widened(ruler, tree, level, allowed)
    shares = [*(tree.shares or ()), *(_shares(ruler, tree))]
    return Candidate(tree=tree, sizes=ruler.sizes(tree), smallest_share=min(shares))


def _shares(ruler: Ruler, tree: TreeSpec) -> list[float]:
    full = ruler.channels[1:]
    return [width / whole for width, whole in zip(tree.widths or (), full, strict=True)]


def _widened(
    ruler: Ruler, tree: TreeSpec, level: int, allowed: Callable[[TreeSpec], bool]
) -> TreeSpec:
    """One level as wide, and then with as many inner channels, as is allowed."""
    if ruler.cutter.entries[level - 1] != "inner":
        widths = tree.widths or ()
        now = widths[level - 1] * ruler.units[level] // ruler.channels[level]

        def wider(step: int) -> TreeSpec:
            width = _width(ruler, level, now + step)
            return replace(tree, widths=_changed(widths, level, width))

        tree = wider(_last(ruler.units[level] - now, lambda step: allowed(wider(step))))
    if tree.heads is not None:
        tree = _fuller(tree, level, ("shares", "heads"), allowed)
    # A head is a large step; other inner channels fill what is left.
    return _fuller(tree, level, ("shares",), allowed)


def _fuller(
    tree: TreeSpec, level: int, names: Sequence[str], allowed: Callable[[TreeSpec], bool]
) -> TreeSpec:
    """The largest allowed shares of one level."""

    def at(step: int) -> TreeSpec:
        fields = {name: getattr(tree, name) for name in names}
        more = {name: share[level - 1] for name, share in fields.items()}
        more = {name: share + (1 - share) * step / _STEPS for name, share in more.items()}
        changed: dict[str, Any] = {
            name: _changed(fields[name], level, more[name]) for name in names
        }
        return replace(tree, **changed)

    return at(_last(_STEPS, lambda step: allowed(at(step))))


def _changed(values: tuple[Any, ...], level: int, value: Any) -> tuple[Any, ...]:
    return (*values[: level - 1], value, *values[level:])


def _last(steps: int, holds: Callable[[int], bool]) -> int:
    """The last of the steps from 0 on for which a condition holds that never comes back."""
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _ranked(found: Sequence[Candidate], budget: Budget) -> tuple[Candidate, ...]:
    def cost(candidate: Candidate) -> tuple[float, int, int]:
        sizes = candidate.sizes
        return -candidate.smallest_share, sizes.total_params, sizes.macs

    def beaten(candidate: Candidate) -> bool:
        own = cost(candidate)
        return any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for other in map(cost, found)
        )

    def rank(candidate: Candidate) -> tuple[bool, tuple[float, int, int]]:
        spent = budget.bytes(candidate.sizes.active_params)
        return spent < _SPENT * budget.active_bytes, cost(candidate)

    ranked = sorted(found, key=rank)
    return tuple(replace(candidate, best=not beaten(candidate)) for candidate in ranked)


def _impossible(
    budget: Budget, smallest: Sequence[int], reasons: Sequence[SigmaBranchError]
) -> SigmaBranchError:
    if not smallest:
        return reasons[-1]
    return ConfigError(
        f"no tree of this depth has paths of at most {budget.active_bytes:,} bytes within the "
        f"other limits: the smallest path has {min(smallest):,}; raise the budget, lower the bits, "
        "or cut earlier"
    )
