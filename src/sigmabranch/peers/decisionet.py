"""DecisioNet (Gottlieb et al., ACCV 2022): a tree whose nodes learn which classes go where.

The classes are clustered by how often the source network confuses them; each inner node is a single
linear unit that is taught its class's side. In training both children run and a gate mixes them,
by one coin per batch soft or hard; in evaluation one path runs.

Shapes: B batch, V classes, I inner nodes, L leaves.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sigmabranch.backbones import (
    Backbone,
    Levels,
    ModelSpec,
    ResNetSpec,
    WideResNetSpec,
    as_backbone,
)
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.measure import Load, module_costs
from sigmabranch.net import SigmaBranchNet, take
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.label_tree import (
    EITHER,
    LEFT,
    OFF_ITS_WAY,
    class_codes,
    confusions,
    linkage,
)
from sigmabranch.peers.system import System, Trained, share
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example, sketch
from sigmabranch.training import DenseObjective, Recipe, StepOutput
from sigmabranch.tree import NodeId, TreeSpec, node_key

# The authors' constants: the stretch of the sigmoid, so that soft gates reach 0 and 1, and how
# often a batch is gated hard.
_STRETCH, _MARGIN = 1.2, 0.1
_HARD_SHARE = 0.5
# How finely the width is solved for.
_WIDTH_STEPS = 1000


class DecisionNode(nn.Module):
    """Which way? One linear unit on the pooled feature.

    Args:
        channels: of the feature.
        pool: parameter-free module, feature → (B, channels).
    """

    def __init__(self, channels: int, pool: nn.Module) -> None:
        super().__init__()
        self.pool = copy.deepcopy(pool)
        self.unit = nn.Linear(channels, 1)

    def forward(self, feature: Any) -> Tensor:
        """Feature → (B,) float32 score; above zero means right."""
        with torch.autocast(self.unit.weight.device.type, enabled=False):
            feature = pytree.tree_map(lambda tensor: tensor.float(), feature)
            return self.unit(self.pool(feature)).squeeze(1)


def gate(score: Tensor, hard: Tensor) -> Tensor:
    """The share that goes right: [score > 0] where ``hard``, which has the gradient of the other.

    Args:
        score: any shape.
        hard: bool, broadcast against ``score``.
    """
    soft = (_STRETCH * score.sigmoid() - _MARGIN).clamp(0, 1)
    value = torch.where(hard, (score > 0).to(soft), soft).detach()
    return value + (soft - soft.detach())


class Gated(NamedTuple):
    """What training looks at.

    Attributes:
        logits: (B, V) float32, mixed over the leaves.
        gates: (B, I) float32, the share that each inner node sends right.
        codes: (V, I), see :func:`~sigmabranch.peers.label_tree.class_codes`.
    """

    logits: Tensor
    gates: Tensor
    codes: Tensor


class DecisionNet(nn.Module):
    """A trunk, decision nodes, specializers and leaf heads; a dynamic network.

    Args:
        tree: the tree's shape.
        trunk: input → feature.
        specializers: node → module, feature → feature, for every node but the root.
        nodes: inner node → its decision.
        heads: leaf → module, feature → (B, V) logits.
        codes: (V, I), the classes' sides, kept with the weights.
        example: one input, (1, ...), at which the paths are priced.
    """

    codes: Tensor
    params_L: Tensor
    macs_L: Tensor

    def __init__(
        self,
        *,
        tree: TreeSpec,
        trunk: nn.Module,
        specializers: Mapping[NodeId, nn.Module],
        nodes: Mapping[NodeId, DecisionNode],
        heads: Mapping[NodeId, nn.Module],
        codes: Tensor,
        example: Tensor,
    ) -> None:
        super().__init__()
        self.tree, self.trunk = tree, trunk
        self.specializers = _by_node(specializers)
        self.nodes = _by_node(nodes)
        self.heads = _by_node(heads)
        self.register_buffer("codes", codes)
        costs = module_costs(self, example)
        prices = [[costs[path] for path in self._line(leaf)] for leaf in tree.leaves]
        for position, name in enumerate(("params_L", "macs_L")):
            price_L = torch.tensor([sum(part[position] for part in line) for line in prices])
            self.register_buffer(name, price_L, persistent=False)

    def _line(self, leaf: NodeId) -> list[str]:
        """Paths of the modules that an input on its way to ``leaf`` runs."""
        line = ["trunk"]
        for level in range(len(leaf)):
            line += [
                f"nodes.{node_key(leaf[:level])}",
                f"specializers.{node_key(leaf[: level + 1])}",
            ]
        return [*line, f"heads.{node_key(leaf)}"]

    def forward(self, x: Tensor) -> Tensor:
        """(B, V) logits: mixed in training, of one path per input in evaluation.

        A tracer, which cannot follow decisions, sees every node once, mixed by hard gates.
        """
        if self.training or torch.jit.is_tracing():
            return self.gated(x).logits
        return self.hard(x)[0]

    def gated(self, x: Tensor) -> Gated:
        """Run every node once and mix the leaves by the gates on the way to each.

        In training scores are noisy, and one coin for all samples and nodes says whether gates are
        hard; in evaluation they are.
        """
        gates: list[Tensor] = []
        features: dict[NodeId, Any] = {(): self.trunk(x)}
        arrived: dict[NodeId, Any] = {(): 1.0}
        hard = torch.ones((), dtype=torch.bool, device=x.device)
        if self.training:
            hard = torch.rand((), device=x.device) < _HARD_SHARE
        for node in self.tree.inner:
            score_B = self.nodes[node_key(node)](features[node])
            if self.training:
                score_B = score_B + torch.randn_like(score_B)
            right_B = gate(score_B, hard)
            gates.append(right_B)
            for branch, share_B in enumerate((1 - right_B, right_B)):
                child = (*node, branch)
                arrived[child] = arrived[node] * share_B
                features[child] = self.specializers[node_key(child)](features[node])
        mixed = [
            arrived[leaf][:, None] * self.heads[node_key(leaf)](features[leaf]).float()
            for leaf in self.tree.leaves
        ]
        return Gated(torch.stack(mixed).sum(0), torch.stack(gates, dim=1), self.codes)

    def hard(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V) logits and (B,) int64 leaf of the one path that each input takes.

        A batch is split among the branches by index; a batch of one touches one path. Raises
        :class:`DataError` at an empty batch.
        """
        if not len(x):
            raise DataError("the batch is empty: give at least one input")
        rows_B = torch.arange(len(x), device=x.device)
        parts = list(self._descend((), self.trunk(x), rows_B))
        order_B = torch.cat([rows for rows, _, _ in parts]).argsort()
        logits_BV = torch.cat([logits for _, logits, _ in parts])[order_B]
        return logits_BV, torch.cat([leaf for _, _, leaf in parts])[order_B]

    def _descend(
        self, node: NodeId, feature: Any, rows: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (rows, logits, leaf) of each leaf below ``node`` that rows reach."""
        if node in self.tree.leaves:
            leaf = torch.full_like(rows, self.tree.leaves.index(node))
            yield rows, self.heads[node_key(node)](feature), leaf
            return
        right_B = self.nodes[node_key(node)](feature) > 0
        for branch, side_B in enumerate((~right_B, right_B)):
            chosen = side_B.nonzero().flatten()
            if not len(chosen):
                continue
            child = (*node, branch)
            part = feature if len(chosen) == len(rows) else take(feature, chosen)
            yield from self._descend(child, self.specializers[node_key(child)](part), rows[chosen])

    def with_load(self, x: Tensor) -> tuple[Tensor, Load]:
        """Logits (B, V) of the hard paths, and what each reads; the choices are the leaves."""
        logits_BV, leaf_B = self.hard(x)
        choice_BL = F.one_hot(leaf_B, len(self.tree.leaves)).bool()
        return logits_BV, Load(self.params_L[leaf_B], self.macs_L[leaf_B], choice_BL)

    def bounds(self) -> dict[str, dict[str, int]]:
        """Parameters and MACs of the cheapest and of the dearest path, each by itself."""
        return {
            name: {
                "active_params": int(pick(self.params_L)),
                "macs": int(pick(self.macs_L)),
            }
            for name, pick in (("least", torch.min), ("most", torch.max))
        }


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
        logits_BV, gate_BI, code_VI = model(x)
        answered: Any = partial(_given, logits_BV)
        loss, metrics, _ = super().__call__(answered, x, y, progress)
        code_BI = code_VI[y]
        on_way_BI = (code_BI != OFF_ITS_WAY).float()
        count = on_way_BI.sum().clamp(min=1)
        code_loss = ((gate_BI - code_BI).square() * on_way_BI).sum() / count
        hit_BI = ((gate_BI.detach() - code_BI).abs() <= EITHER).float() * on_way_BI
        metrics |= {"code": code_loss.detach(), "train_side": 100 * hit_BI.sum() / count}
        return StepOutput(loss + self.code_weight * code_loss, metrics)


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

    topology: Literal["own", "tree"] = "own"
    start: Literal["scratch", "source"] = "scratch"
    split: Literal["early", "late"] = "early"
    code_weight: float = 1.0
    overlap: float | None = None
    confusion: Literal["counted", "expected"] = "counted"
    depth: int = 1
    width: float = 0.5

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                choices = ", ".join(get_args(hint))
                raise ConfigError(
                    f"decisionet {name} is {getattr(self, name)!r}: choose one of {choices}"
                )
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
        """The tree must fit the network, whose stages ``"own"`` must know how to narrow."""
        if self.topology == "tree":
            sketch(task)
        else:
            self._active(task)

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
        nodes = sum(parameter.numel() for parameter in network.nodes.parameters())
        return {"leaves": len(network.tree.leaves), "node_params": nodes}

    def run(self, bench: Bench) -> Trained:
        """Cluster the classes, make the network, train it.

        A class's side is part of the checkpoint, so a resumed run never changes it.
        """
        linkage()  # refused before the source network is trained
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
        teacher = bench.dense() if recipe.distill_weight else None
        objective = DecisionObjective(recipe, self.code_weight, teacher)
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
        if self.topology == "own":
            parts = self._own_parts(task)
        else:
            parts = _tree_parts(converted or _redrawn(sketch(task)[1]))
        return DecisionNet(tree=self._tree(task), codes=codes_VI, example=example(task), **parts)

    def _own_parts(self, task: Task) -> dict[str, Any]:
        """Every node is cut from a freshly initialised network that is one path."""
        tree, (spec, levels) = self._own_tree(), self._path(task.model)
        fresh = {node: as_backbone(spec.build()) for node in ((), *tree.specializers)}
        channels = _channels(fresh[()], levels, example(task))
        return {
            "trunk": fresh[()].section(levels.trunk),
            "specializers": {
                node: fresh[node].section(levels.levels[len(node) - 1])
                for node in tree.specializers
            },
            "nodes": {
                node: DecisionNode(channels[len(node)], fresh[node].pool) for node in tree.inner
            },
            "heads": {
                leaf: nn.Sequential(fresh[leaf].pool, *fresh[leaf].section(fresh[leaf].head))
                for leaf in tree.leaves
            },
        }

    def _path(self, spec: ModelSpec) -> tuple[ModelSpec, Levels]:
        """The network that is one path, as wide as ``spec`` up to the first split."""
        with torch.device("meta"):
            backbone = as_backbone(spec.build())
        late = backbone.levels(self.depth)
        cuts = backbone.stages[1 : 1 + self.depth]
        levels = backbone.levels(self.depth, cuts) if self.split == "early" else late
        starts = [level[0] for level in levels.levels]
        splits = [
            sum(backbone.chain.index(start) <= backbone.chain.index(stage) for start in starts)
            for stage in backbone.stages
        ]
        return _narrowed(spec, [self.width**count for count in splits]), levels

    def _active(self, task: Task) -> int:
        """Parameters of one path, counted without making it."""
        spec, levels = self._path(task.model)
        with torch.device("meta"):
            backbone = as_backbone(spec.build())
        *deciding, _ = _channels(backbone, levels, example(task))
        path = sum(parameter.numel() for parameter in backbone.model.parameters())
        return path + sum(channels + 1 for channels in deciding)


def _narrowed(spec: ModelSpec, factors: list[float]) -> ModelSpec:
    """``spec`` with the width of each stage times its factor."""

    def scaled(widths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(max(1, round(w * factor)) for w, factor in zip(widths, factors, strict=True))

    if isinstance(spec, ResNetSpec):
        return replace(spec, planes=scaled(spec.planes))
    if isinstance(spec, WideResNetSpec):
        return replace(spec, widths=scaled(spec.stage_widths))
    raise ConfigError(
        f"decisionet topology=own narrows stages of ResNets and Wide ResNets, not of {spec.family}:"
        " set topology=tree"
    )


@torch.no_grad()
def _channels(backbone: Backbone, levels: Levels, blank: Tensor) -> list[int]:
    """Length of the pooled feature behind the trunk and behind each level."""
    shape = copy.deepcopy(backbone.model).to("meta").eval()
    feature, channels = blank.to("meta"), []
    for paths in (levels.trunk, *levels.levels):
        for path in paths:
            feature = shape.get_submodule(path)(feature)
        channels.append(backbone.pool(feature).shape[1])
    return channels


def _tree_parts(net: SigmaBranchNet) -> dict[str, Any]:
    """All of a branched network but its routers, for which decision nodes stand in."""
    tree = net.tree
    return {
        "trunk": net.trunk,
        "specializers": {node: net.specializer(node) for node in tree.specializers},
        "nodes": {
            node: DecisionNode(net.router(node).channels, net.router(node).projection[0])
            for node in tree.inner
        },
        "heads": {leaf: net.head(leaf) for leaf in tree.leaves},
    }


def _redrawn(net: SigmaBranchNet) -> SigmaBranchNet:
    """Fresh weights for a network cut from a fresh one, whose branches would share theirs.

    Convolutions by He's rule, linear layers by torch's; norms are already as their family starts
    them.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
    return net


def _no_codes(task: Task, tree: TreeSpec) -> Tensor:
    return torch.full((task.model.classes, len(tree.inner)), LEFT)


def _by_node(modules: Mapping[NodeId, nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({node_key(node): module for node, module in modules.items()})


def _given(value: Any, *_: Any) -> Any:
    return value
