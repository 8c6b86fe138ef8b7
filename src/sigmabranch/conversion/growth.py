"""A tree in the making, one level at a time (paper, section III-C).

Per level: project the features at every inner node, cluster the latents, turn the centroids into
the router, measure which channels of the dense network each cluster uses, copy those channels into
the children, check the copy against the masked dense network, and re-estimate the children's batch
norms before anything below them is measured.

Shapes: B batch, N samples, C channels, D latent length, K clusters, V classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.backbones import Backbone
from sigmabranch.conversion.calibrate import (
    ChannelSums,
    Moments,
    batch_norms,
    reestimate_norms,
    saw_data,
    stream,
)
from sigmabranch.conversion.cluster import spherical_kmeans
from sigmabranch.conversion.cut import Cutter
from sigmabranch.conversion.record import ConversionRecord, ConversionSpec, NodeChannels, Split
from sigmabranch.conversion.select import (
    Selection,
    select_at_random,
    select_by_activation,
    select_evenly,
)
from sigmabranch.conversion.shards import Loader, Shards
from sigmabranch.coupling import SlicePlan, fingerprint, trace
from sigmabranch.errors import ConfigError, ConversionError, DataError
from sigmabranch.net import SigmaBranchNet, split_trunk, take
from sigmabranch.routing import Router
from sigmabranch.tree import NodeId, TreeSpec, node_key

Progress = Callable[[str, int, int], None]


class Growth:
    """A tree in the making: the decisions (``record``) and the modules built from them."""

    def __init__(
        self,
        backbone: Backbone,
        loader: Loader,
        tree: TreeSpec,
        spec: ConversionSpec,
        device: torch.device | str | None,
        shards: Shards,
        progress: Progress | None,
    ) -> None:
        device = torch.device(device or next(backbone.model.parameters()).device)
        self.backbone = replace(backbone, model=copy.deepcopy(backbone.model).eval().to(device))
        self.loader, self.tree, self.spec = loader, tree, spec
        self.device, self.shards, self.progress = device, shards, progress
        self.levels = backbone.levels(tree.depth, tree.cuts)
        self.trunk = self.backbone.section(self.levels.trunk)
        self.until, self.rest = split_trunk(self.trunk, tree.decide_after)
        self.example = next(stream(loader, 2, device))[0]
        self.backbone.check(self.example)
        watched = (*self.levels.outputs(), self.backbone.head[-1], *self.backbone.whole)
        coupling = trace(self.backbone.model, self.example[:1], watch=watched)
        self.cutter = Cutter(self.backbone, self.levels, coupling)
        source_widths = [len(coupling.output_axis(end).units) for end in self.levels.outputs()[1:]]
        self.record = ConversionRecord(
            tree=tree,
            conversion=spec,
            source=fingerprint(self.backbone.model.state_dict()),
            widths=tree.level_widths(source_widths),
        )
        self.specializers: dict[NodeId, nn.Module] = {}
        self.routers: dict[NodeId, Router] = {}
        self.heads: dict[NodeId, nn.Module] = {}
        self.plans: dict[NodeId, SlicePlan] = {(): self.cutter.plan([], self.levels.trunk)}
        self.verified = True  # false only for networks whose weights mean nothing

    def nodes_at(self, depth: int) -> list[NodeId]:
        """The inner nodes at that depth."""
        return [node for node in self.tree.inner if len(node) == depth]

    def slim_trunk(self) -> None:
        """Take channels out of the trunk where the tree says so, before anything reads it."""
        if self.tree.trunk_share is None:
            return
        example = self.example if self.verified else None
        self.trunk, self.plans[()] = self.cutter.trunk(self.tree.trunk_share, example)
        self.until, self.rest = split_trunk(self.trunk, self.tree.decide_after)
        if not self.spec.norm_samples:
            return

        def run() -> None:
            samples = min(self.spec.samples, self.spec.norm_samples)
            for x, _ in self.stream("batch norms of the trunk", samples):
                if len(x) > 1:  # a batch norm cannot learn from one sample
                    self.trunk(x)

        reestimate_norms([self.trunk], run, self.shards)

    def build(self) -> None:
        """Make every module from a complete record."""
        self.slim_trunk()
        for depth in range(self.tree.depth):
            self.add_routers(self.nodes_at(depth))
            self.add_children(self.nodes_at(depth))
            self.reestimate(depth + 1)

    # Routers and clusters (phases 1 and 3).

    def add_routers(self, nodes: Sequence[NodeId]) -> None:
        """A random projection for each node; its gate too, once the split is known."""
        for node in nodes:
            channels = self._router_channels(node)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed(node))
                router = Router(channels, copy.deepcopy(self.backbone.pool), self.tree)
            self.routers[node] = router.eval().to(self.device)
            if node in self.record.splits:
                self._set_gate(node)

    def _router_channels(self, node: NodeId) -> int:
        if node and self.tree.decide_after is None:
            return len(self.record.nodes[node][-1].kept)
        channels = self.backbone.pool(self.until(self.example)).shape[1]
        if not channels:
            raise ConfigError(
                f"tree decide_after={self.tree.decide_after!r} leaves routers no channel to read: "
                "choose a later module"
            )
        return channels

    def align(self, nodes: Sequence[NodeId]) -> None:
        """Turn the nodes' random projections to the principal axes of what they read.

        The mean goes into the bias. Beyond as many axes as there are channels, rows stay random.
        """
        moments = {node: Moments(self.routers[node].channels, self.device) for node in nodes}
        for x, y in self.stream(f"principal axes of level {len(nodes[0])}", self.spec.samples):
            for node, seen, _ in self._arrivals(x, y, len(nodes[0])):
                moments[node].add(self.backbone.pool(seen))
        for node in nodes:
            mean_C, axis_CC = moments[node].axes(self.shards, node_key(node))
            linear = self.routers[node].linear
            kept = axis_CC[: len(linear.weight)].to(linear.weight)
            linear.weight[: len(kept)] = kept
            linear.bias[: len(kept)] = -kept @ mean_C.to(kept)

    def cluster(self, nodes: Sequence[NodeId]) -> None:
        """Collect the latents at the nodes and split each node's samples in two."""
        latents: dict[NodeId, list[Tensor]] = {node: [] for node in nodes}
        labels: dict[NodeId, list[Tensor]] = {node: [] for node in nodes}
        samples = torch.zeros((), dtype=torch.int64)
        none_0D = torch.empty(0, self.tree.projection_dim, device=self.device)
        for x, y in self.stream(f"latents of level {len(nodes[0])}", self.spec.samples):
            samples += len(x)
            for node in nodes:  # which not every batch reaches
                latents[node].append(none_0D)
                labels[node].append(y[:0])
            for node, seen, rows in self._arrivals(x, y, len(nodes[0])):
                latents[node][-1] = self.routers[node].latent(seen)
                labels[node][-1] = y[rows]
        self.record.samples = int(self.shards.sum(samples))
        for node in nodes:
            latent_ND = self.shards.gather(latents[node])
            label_N = self.shards.gather(labels[node])
            self.record.splits[node] = self._agreed(self._split(node, latent_ND, label_N))
            if self.spec.projection == "pca":
                linear = self.routers[node].linear
                self.record.splits[node].projection_weight = linear.weight.tolist()
                self.record.splits[node].projection_bias = linear.bias.tolist()
            self._set_gate(node)

    def _agreed(self, split: Split) -> Split:
        """Process 0's router, in case the machines' arithmetic differs in the last bit."""
        first = self.shards.first
        return replace(
            split,
            gate_weight=first(torch.tensor(split.gate_weight)).tolist(),
            gate_bias=first(torch.tensor(split.gate_bias)).tolist(),
        )

    def _split(self, node: NodeId, latent_ND: Tensor, label_N: Tensor) -> Split:
        cluster = partial(
            spherical_kmeans,
            restarts=self.spec.restarts,
            centred=self.spec.centred,
            seed=self._seed(node),
        )
        if self.spec.clusters == "latents":
            return Split.of(cluster(latent_ND, balanced=self.spec.balanced))
        mean_VD, seen_V = self._class_means(latent_ND, label_N)
        if int(seen_V.sum()) < 2:
            raise ConversionError(
                f"node {node_key(node)} holds one class only, so classes cannot split it: use a "
                "smaller tree or clusters=latents"
            )
        clusters = cluster(mean_VD[seen_V], balanced=True)
        class_branch_V = (mean_VD @ clusters.centroid.T + clusters.offset).argmax(1)
        sizes = torch.bincount(class_branch_V[label_N], minlength=2)
        return replace(
            Split.of(clusters), sizes=sizes.tolist(), class_branch=class_branch_V.tolist()
        )

    def _class_means(self, latent_ND: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
        """Mean latent per class, (V, D) float64, and which classes were seen, (V,) bool."""
        classes = int(label_N.max()) + 1 if not self.record.splits else len(self._class_table())
        size_V = torch.bincount(label_N, minlength=classes)
        sum_VD = torch.zeros(classes, latent_ND.shape[1], dtype=torch.float64, device=self.device)
        sum_VD.index_add_(0, label_N, latent_ND.double())
        return sum_VD / size_V.clamp(min=1)[:, None], size_V > 0

    def _class_table(self) -> list[int]:
        table = self.record.splits[()].class_branch
        assert table is not None
        return table

    def _set_gate(self, node: NodeId) -> None:
        split, gate = self.record.splits[node], self.routers[node].gate
        if split.projection_weight is not None:
            linear = self.routers[node].linear
            linear.weight.copy_(torch.tensor(split.projection_weight))
            linear.bias.copy_(torch.tensor(split.projection_bias))
        gate.weight.copy_(torch.tensor(split.gate_weight))
        gate.bias.copy_(torch.tensor(split.gate_bias))

    # Channels (phases 2 and 4).

    def select(self, nodes: Sequence[NodeId]) -> None:
        """Choose every child's channels from the dense activations of its cluster."""
        means = self._channel_means(nodes) if self.spec.channels == "activation" else {}
        for node in nodes:
            for stages in means.get(node, {}).items():
                self.record.splits[node].channel_mean[stages[0]] = stages[1].tolist()
            first = len(node) + 1
            chosen = {
                level: self._selections(node, level, means)
                for level in range(first, self._deepest(node) + 1)
            }
            for branch in (0, 1):
                child = (*node, branch)
                is_leaf = child in self.tree.leaves
                self.record.nodes[child] = [
                    self.channels(
                        level,
                        chosen[level][branch],
                        with_head=is_leaf and level == self.tree.depth,
                    )
                    for level in self.tree.levels_of(child)
                ]

    def _deepest(self, node: NodeId) -> int:
        return max(self.tree.levels_of((*node, branch))[-1] for branch in (0, 1))

    def _channel_means(self, nodes: Sequence[NodeId]) -> dict[NodeId, dict[str, Tensor]]:
        """Mean pooled activation of each source channel over each cluster of each node."""
        depth, deepest = len(nodes[0]), max(map(self._deepest, nodes))
        sums = {
            (node, level): self.channel_sums(level)
            for node in nodes
            for level in range(depth + 1, self._deepest(node) + 1)
        }
        for x, y in self.stream(f"activations below level {depth}", self.spec.samples):
            pooled = self.dense_activations(x, depth + 1, deepest)
            for node, seen, rows in self._arrivals(x, y, depth):
                branch = self._branch(node, seen, y[rows])
                for level in range(depth + 1, self._deepest(node) + 1):
                    sums[node, level].add(pooled[level][rows], branch)
        outputs = self.levels.outputs()
        means: dict[NodeId, dict[str, Tensor]] = {node: {} for node in nodes}
        for (node, level), total in sums.items():
            means[node][outputs[level]] = total.mean(self.shards, outputs[level])
        return means

    def channel_sums(self, level: int, clusters: int = 2) -> ChannelSums:
        """Nothing yet of the activations behind that level."""
        return ChannelSums(len(self.cutter.unit_of_channel(level)), self.device, clusters)

    def dense_activations(self, x: Tensor, first: int, last: int) -> dict[int, Tensor]:
        """Pooled (B, C) output of the dense network after each of the levels first..last."""
        pooled, feature = {}, x
        for level, paths in enumerate((self.levels.trunk, *self.levels.levels[:last])):
            for module in self.backbone.modules(paths):
                feature = module(feature)
            if level >= first:
                pooled[level] = self.backbone.pool(feature)
        return pooled

    def _selections(
        self, node: NodeId, level: int, means: dict[NodeId, dict[str, Tensor]]
    ) -> list[Selection]:
        """Both branches' units of one level."""
        width = self.units_kept(level)
        units = int(self.cutter.unit_of_channel(level).max()) + 1
        if self.spec.channels == "random":
            generator = torch.Generator().manual_seed(self._seed(node) + level)
            return select_at_random(units, width, generator)
        if self.spec.channels == "uniform":
            return select_evenly(units, width)
        mean_KU = self.unit_means(level, means[node][self.levels.outputs()[level]])
        return select_by_activation(mean_KU, width, self.spec.shared_fraction)

    def units_kept(self, level: int) -> int:
        """How many units a node of that level keeps; a unit is one channel or several tied ones."""
        unit_C = self.cutter.unit_of_channel(level)
        units = int(unit_C.max()) + 1
        return max(1, self.record.widths[level - 1] * units // len(unit_C))

    def unit_means(self, level: int, mean_KC: Tensor) -> Tensor:
        """Means per unit (K, U) from means per channel (K, C)."""
        unit_C = self.cutter.unit_of_channel(level).to(mean_KC.device)
        units = int(unit_C.max()) + 1
        sum_KU = mean_KC.new_zeros(len(mean_KC), units).index_add_(1, unit_C, mean_KC)
        return sum_KU / torch.bincount(unit_C, minlength=units)

    def channels(self, level: int, selection: Selection, *, with_head: bool) -> NodeChannels:
        """Units to channels of the dense network, with the inner channels of the same level."""
        unit_C = self.cutter.unit_of_channel(level)
        paths = self.levels.levels[level - 1] + (self.backbone.head if with_head else ())
        return NodeChannels(
            stage=self.levels.outputs()[level],
            shared=_positions(unit_C, selection.shared),
            specific=_positions(unit_C, selection.specific),
            kept=_positions(unit_C, selection.kept),
            inner=self.cutter.inner(paths, self.record.widths[level - 1] / len(unit_C)),
        )

    # Modules (phases 0, 2, 4 and 5).

    def add_children(self, nodes: Sequence[NodeId]) -> None:
        """Copy the chosen channels into the children of ``nodes`` and check the copies."""
        for node in nodes:
            for branch in (0, 1):
                self._add_specializer((*node, branch))

    def _add_specializer(self, child: NodeId) -> None:
        lineage = [
            channels
            for length in range(1, len(child) + 1)
            for channels in self.record.nodes[child[:length]]
        ]
        section, head, plan = self.cut(lineage, self.tree.levels_of(child))
        self.specializers[child], self.plans[child] = section, plan
        if child in self.tree.leaves:
            self.heads[child] = head

    def cut(
        self, lineage: Sequence[NodeChannels], levels: Sequence[int]
    ) -> tuple[nn.Module, nn.Module, SlicePlan]:
        """A specializer for ``levels`` and the head that would follow it, checked, with its plan.

        Args:
            lineage: the channels chosen from level 1 down to the last of ``levels``.
            levels: which levels' stages the specializer runs.
        """
        paths = [path for level in levels for path in self.levels.levels[level - 1]]
        plan = self.cutter.plan(lineage, (*paths, *self.backbone.head))
        section = self.backbone.section(paths, plan).eval()
        head = self.backbone.pooled_head(plan).eval()
        error = 0.0
        if self.verified:
            error = self.cutter.verify(section, lineage, levels, self.example)
        if self.verified and levels[-1] == self.tree.depth:
            error = max(error, self.cutter.verify_head(head[1:], lineage, self.pooled_example))
        for channels in lineage[-len(levels) :]:
            channels.max_error = error
        return section, head, plan

    @cached_property
    def pooled_example(self) -> Tensor:
        """What the dense network's head sees of the example."""
        return self.dense_activations(self.example, self.tree.depth, self.tree.depth)[
            self.tree.depth
        ]

    def reestimate(self, depth: int) -> None:
        """Re-estimate the batch norms of the nodes at ``depth`` on their own samples."""
        if not self.spec.norm_samples:
            return
        nodes = [node for node in self.tree.specializers if len(node) == depth]

        def run() -> None:
            samples = min(self.spec.samples, self.spec.norm_samples * len(nodes))
            for x, y in self.stream(f"batch norms of level {depth}", samples):
                for node, feature, rows in self._entries(self.until(x), y, depth):
                    if len(rows) > 1:  # a batch norm cannot learn from one sample
                        output = self.specializers[node](feature)
                        if node in self.heads:
                            self.heads[node](output)

        modules = {node: [self.specializers[node]] for node in nodes}
        for node in self.heads.keys() & modules.keys():
            modules[node].append(self.heads[node])
        reestimate_norms(chain.from_iterable(modules.values()), run, self.shards)
        for node, parts in modules.items():
            for channels in self.record.nodes[node]:
                channels.norm_reestimated = any(map(saw_data, batch_norms(parts)))

    def finished(self) -> SigmaBranchNet:
        """The branched network, with everything that was decided."""
        return SigmaBranchNet(
            tree=self.tree,
            trunk=self.trunk,
            specializers=self.specializers,
            routers=self.routers,
            heads=self.heads,
            plans=self.plans,
            source=self.backbone.source,
            record=self.record.to_dict(),
        ).eval()

    # Walking the tree built so far.

    def _entries(self, early: Any, y: Tensor, depth: int) -> Iterator[tuple[NodeId, Any, Tensor]]:
        """Which samples reach which node at ``depth``: (node, its input, rows of the batch).

        The root's input is ``early``, the batch behind the first part of the trunk.
        """
        root: NodeId = ()
        rows_B = torch.arange(len(y), device=y.device)
        frontier = [(root, take(early, rows_B), rows_B)]  # a copy: the trunk may work in place
        for _ in range(depth):
            frontier = [
                entry
                for node, feature, rows in frontier
                if node in self.tree.inner
                for entry in self._sent_on(node, feature, early, y, rows)
            ]
        yield from frontier

    def _arrivals(self, x: Tensor, y: Tensor, depth: int) -> Iterator[tuple[NodeId, Any, Tensor]]:
        """Which samples reach which inner node at ``depth``: (node, what it decides by, rows)."""
        early = self.until(x)
        for node, feature, rows in self._entries(early, y, depth):
            if node in self.tree.inner:
                yield node, self._read(self._run(node, feature), early, rows), rows

    def _sent_on(
        self, node: NodeId, feature: Any, early: Any, y: Tensor, rows: Tensor
    ) -> Iterator[tuple[NodeId, Any, Tensor]]:
        feature = self._run(node, feature)
        branch_B = self._branch(node, self._read(feature, early, rows), y[rows])
        for branch in (0, 1):
            chosen = (branch_B == branch).nonzero().flatten()
            if len(chosen):
                yield (*node, branch), take(feature, chosen), rows[chosen]

    def _run(self, node: NodeId, feature: Any) -> Any:
        return (self.specializers[node] if node else self.rest)(feature)

    def _read(self, output: Any, early: Any, rows: Tensor) -> Any:
        """What a node's router reads: the node's output, or the early feature of its samples."""
        return output if self.tree.decide_after is None else take(early, rows)

    def _branch(self, node: NodeId, seen: Any, label_B: Tensor) -> Tensor:
        """The branch each sample belongs to: by its class where classes were clustered."""
        class_branch = self.record.splits[node].class_branch
        if class_branch is None:
            return self.routers[node](seen).argmax(-1)
        table_V = torch.tensor(class_branch, device=self.device)
        if int(label_B.max()) >= len(table_V):
            raise DataError(f"label {int(label_B.max())} was not among the calibration classes")
        return table_V[label_B]

    def stream(self, what: str, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the calibration data, with its progress told."""
        done, own = 0, -(-samples // self.shards.world)
        for x, y in stream(self.loader, samples, self.device, self.shards):
            yield x, y
            done += len(x)
            if self.progress is not None:
                self.progress(what, min(done, own), own)

    def _seed(self, node: NodeId) -> int:
        """A seed of its own for every node."""
        number = int("1" + "".join(map(str, node)), 2)
        return self.spec.seed * 100_003 + number


def _positions(unit_C: Tensor, units: Sequence[int]) -> list[int]:
    chosen_C = torch.isin(unit_C.cpu(), torch.tensor(units, dtype=torch.int64))
    return chosen_C.nonzero().flatten().tolist()
