"""HRank: remove the filters whose maps have low rank (Lin et al., CVPR 2020, 2002.10179).

Shapes: B batch, C filters, H, W a map's sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sigmabranch.conversion import Shards
from sigmabranch.conversion.shards import Loader
from sigmabranch.coupling import CouplingMap, evaluating
from sigmabranch.errors import ConfigError
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.filters import (
    FilterGroup,
    Kept,
    convolutions,
    coupled_groups,
    is_shortcut,
    single_groups,
    stage_of,
)
from sigmabranch.peers.layout import Layout
from sigmabranch.peers.masking import MaskedNet, MaskingObjective
from sigmabranch.peers.pruning import FilterPruning, kept_per_group, positions_of_best
from sigmabranch.peers.system import Trained, check_choices, share
from sigmabranch.tasks import Task

#: Rates of the stem and of each stage, by the parameter reduction they are known under.
PUBLISHED: Mapping[int, tuple[float, ...]] = {62: (0.2, 0.8, 0.8, 0.55, 0.45)}
# Samples that go through the network at once while ranks are taken.
_PASS = 32
# Share of a progressive training by the end of which all is masked: the rest is for mending, before
# the learning rate has fallen too far. (The authors begin their schedule anew at every block.)
_MASKING = 0.6
# cuSOLVER decomposes a batch at once up to this side, larger matrices one by one.
_BATCHED_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class HRank(FilterPruning):
    """Pruning by the mean rank of post-ReLU maps, at rates set by hand.

    Attributes:
        rates: published setting of layer rates; 62 is the only one whose rates are known.
        rate: one rate for all layers instead.
        mode: ``"oneshot"`` removes all at once and fine-tunes, as the authors' later HRankPlus
            does; ``"progressive"`` masks block after block in equal parts of the first 60 % of the
            same training.
        convention: ``"official"`` removes what the authors' code masks: filters of every
            convolution, its shortcuts' too, and what reads them inside a block. Each convolution
            that writes to a residual stream loses other filters, so streams keep their width, the
            last stage's output included. ``"physical"`` is ours: all that writes to one stream is
            pruned jointly, and the stream is narrowed. ``"literal"`` is the published count, in
            which a convolution's outputs shrink, but neither its batch norm nor the next layer's
            inputs. It can be counted, not run.
        samples: calibration images over which ranks are averaged.
    """

    name: ClassVar[str] = "hrank"
    summary: ClassVar[str] = "static: filters whose feature maps have low rank removed"
    sized_by: ClassVar[tuple[str, ...]] = ("rate", "rates")

    rates: int = 62
    rate: float | None = None
    mode: Literal["progressive", "oneshot"] = "oneshot"
    convention: Literal["official", "physical", "literal"] = "official"
    samples: int = 500

    def __post_init__(self) -> None:
        if self.rate is not None:
            share("hrank rate", self.rate)
        elif self.rates not in PUBLISHED:
            raise ConfigError(
                f"hrank layer rates of the setting {self.rates} are not published (of 44 and 76 "
                f"only results are): choose rates={', '.join(map(str, PUBLISHED))} or set rate"
            )
        check_choices(self, "mode", "convention")
        if self.samples < 1:
            raise ConfigError(f"hrank samples must be at least 1, got {self.samples}")

    def groups(self, model: nn.Module, coupling: CouplingMap) -> list[FilterGroup]:
        """What is removed together under the convention."""
        if self.convention == "literal":
            return [FilterGroup(convs=(conv,), scattered="conv") for conv in convolutions(model)]
        if self.convention == "official":
            return single_groups(model, coupling)
        return coupled_groups(model, coupling)

    def remaining(self, group: FilterGroup, size: int) -> int:
        """How many of ``size`` filters stay.

        The authors' masks round down what goes, their counts what stays.
        """
        # A stream that the stem writes to is the first stage's.
        rate = self._rate(stage_of(group.convs[-1]))
        return size - int(size * rate) if self.convention == "official" else int(size * (1 - rate))

    def check(self, task: Task) -> None:
        """Refuse networks that the published rates do not fit, and what every pruning refuses."""
        stages = stage_of(convolutions(self.layout(task).model)[-1])
        known = len(PUBLISHED.get(self.rates, ())) - 1
        if self.rate is None and stages != known:
            raise ConfigError(
                f"the published rates of hrank are for {known} stages, and the network of "
                f"{task.name} has {stages}: set rate"
            )
        super().check(task)

    def details(self, network: nn.Module, task: Task) -> dict[str, Any]:
        """Counts of filters, and what the literal convention counts."""
        counted = super().details(network, task)
        if self.convention == "literal":
            counted["literal"] = (
                "a layer's inputs and batch norm are counted as if the layers before were whole: "
                "no network that one would run"
            )
        return counted

    def run(self, bench: Bench) -> Trained:
        """Take ranks on the source network, remove at once or bit by bit, train."""
        if self.convention == "literal":
            raise ConfigError(
                "hrank convention literal is a way of counting, not a network: run with "
                "convention=official or convention=physical"
            )
        self.check(bench.task)
        layout, dense = self.layout(bench.task), bench.dense()
        kept = self.chosen(dense, layout, bench.calibration(), bench.chain.engine.shards)
        if self.mode == "oneshot":
            network = layout.cut(dense, kept)
            bench.train(network)
        else:
            network = self._masked_bit_by_bit(bench, dense, layout, kept)
        return Trained(
            network=network.eval(),
            recipe=bench.recipe,
            epochs=bench.epochs,
            notes=kept_per_group(kept),
        )

    def chosen(
        self, network: nn.Module, layout: Layout, batches: Loader, shards: Shards = Shards()
    ) -> dict[str, Tensor]:
        """Group name → positions of the filters that stay, by rank, nuclear norm, position."""
        counts = self.counts(layout)
        maps = {conv: _map_of(network, conv) for group in layout.groups for conv in group.convs}
        inputs = (x for x, _ in shards.own(batches, self.samples))
        scores = map_scores(network, inputs, sorted(set(maps.values())), shards)
        result = {}
        for group in layout.groups:
            # A block's last convolution and its shortcut share one map; it counts once.
            paths = dict.fromkeys(maps[conv] for conv in group.convs)
            rank_C, nuclear_C = torch.stack([scores[path] for path in paths]).mean(0)
            order_C = nuclear_C.argsort(stable=True)
            order_C = order_C[rank_C[order_C].argsort(stable=True)]
            result[group.name] = positions_of_best(order_C, counts[group.name])
        return result

    def _masked_bit_by_bit(
        self, bench: Bench, dense: nn.Module, layout: Layout, kept: Kept
    ) -> nn.Module:
        """Mask the stem, then block after block; a stream's filters go with its first block."""
        owners = list(dict.fromkeys(_owner(conv) for conv in _unbranched(dense)))
        net = MaskedNet(dense, layout.groups)

        def due(turn: int) -> dict[str, Tensor]:
            """What is not yet masked: ranks taken again by a resumed run may differ a little."""
            whole = {name: len(kept[name]) < len(found) for name, found in net.kept().items()}
            return {n: kept[n] for n in kept if whole[n] and owners.index(_owner(n)) <= turn}

        objective = MaskingObjective(
            net,
            bench.recipe,
            periods=round(len(owners) / _MASKING),
            choose=due,
            teacher=bench.teacher(bench.recipe),
        )
        bench.train(net, objective)
        net.mask(due(len(owners)))  # a training of few steps ends before the last
        return layout.cut(net.network, net.kept())

    def _rate(self, stage: int) -> float:
        return PUBLISHED[self.rates][stage] if self.rate is None else self.rate


def map_scores(
    network: nn.Module,
    inputs: Iterable[Tensor],
    paths: Sequence[str],
    shards: Shards = Shards(),
) -> dict[str, Tensor]:
    """Mean rank and mean nuclear norm of the maps that modules put out.

    Args:
        network: put into eval mode for the while.
        inputs: this process's batches, (B, ...).
        paths: of modules that return (B, C, H, W).
        shards: the processes that divide the batches; all get the same scores.

    Returns:
        By path: (2, C) float64 on the CPU, ranks first.
    """
    sums: dict[str, Tensor] = {}

    def add(path: str, module: nn.Module, args: Any, map_BCHW: Tensor) -> None:
        score_2C = torch.stack(_rank_and_norm(map_BCHW)).sum(1)
        sums[path] = sums[path] + score_2C if path in sums else score_2C

    device, samples = next(network.parameters()).device, 0
    with ExitStack() as stack:
        for context in (evaluating(network), torch.no_grad()):
            stack.enter_context(context)
        for path in paths:
            hook = network.get_submodule(path).register_forward_hook(partial(add, path))
            stack.callback(hook.remove)
        for batch in inputs:
            for x in batch.to(device).split(_PASS):
                network(x)
                samples += len(x)
    total = shards.sum(torch.tensor(samples))
    return {path: shards.sum(sums[path]) / total for path in paths}


def _rank_and_norm(map_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Rank, as ``torch.linalg.matrix_rank`` has it, and nuclear norm of each map: (B, C) fp64."""
    sides = map_BCHW.shape[-2:]
    if max(sides) > _BATCHED_SIDE:
        map_BCHW = map_BCHW.cpu()
    values = torch.linalg.svdvals(map_BCHW.float())
    largest = values.amax(-1, keepdim=True)
    rank_BC = (values > largest * max(sides) * torch.finfo(values.dtype).eps).sum(-1)
    return rank_BC.double().cpu(), values.double().sum(-1).cpu()


def _owner(conv: str) -> str:
    """Path of the block that a convolution belongs to, empty for the stem's."""
    return conv.removesuffix(".downsample.0") if is_shortcut(conv) else conv.rpartition(".")[0]


def _unbranched(network: nn.Module) -> list[str]:
    return [conv for conv in convolutions(network) if not is_shortcut(conv)]


def _map_of(network: nn.Module, conv: str) -> str:
    """Path of the ReLU whose output shows a filter; behind the addition for a block's last."""
    if is_shortcut(conv):
        block = _owner(conv)
        conv = [other for other in _unbranched(network) if _owner(other) == block][-1]
    owner, dot, leaf = conv.rpartition(".")
    return owner + dot + leaf.replace("conv", "act")
