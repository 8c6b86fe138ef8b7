"""A tree in the making, one level at a time (paper, section III-C).

Per level: project the features at every inner node, cluster the latents, turn the centroids into
the router, measure which channels of the dense network each cluster uses, copy those channels into
the children, check the copy against the masked dense network, and re-estimate the children's batch
norms before anything below them is measured.

Shapes: B batch, N samples, C channels, D latent length, K clusters, V classes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    has_labels,
    reestimate_norms,
    saw_data,
    stream,
)
from sigmabranch.conversion.choice import ChannelChoice
from sigmabranch.conversion.partition import split_classes, split_latents
from sigmabranch.conversion.record import ConversionRecord, ConversionSpec, NodeChannels, Split
from sigmabranch.conversion.refit import NormFit, cut_norms, listening
from sigmabranch.conversion.shards import Loader, Shards
from sigmabranch.conversion.walk import Walk
from sigmabranch.coupling import SlicePlan, fingerprint, trace
from sigmabranch.errors import ConfigError, ConversionError, DataError
from sigmabranch.net import SigmaBranchNet, split_trunk
from sigmabranch.routing import Router
from sigmabranch.shared import tie
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
        tree.check_branched()
        device = torch.device(device or next(backbone.model.parameters()).device)
        self.backbone = replace(backbone, model=_trainable(backbone.model).eval().to(device))
        _check_pairs(tree, spec)
        self.loader, self.tree, self.spec = loader, tree, spec
        self.device, self.shards, self.progress = device, shards, progress
        self.levels = backbone.levels(tree.depth, tree.cuts)
        self.trunk = self.backbone.section(self.levels.trunk)
        self.walk = Walk(tree, self.trunk)
        self.example, labels = next(stream(loader, 2, device))
        if spec.clusters == "classes" and not has_labels(labels):
            raise DataError(
                "clusters=classes needs labels: yield (inputs, labels), or set clusters=latents"
            )
        backbone.check(self.example.to(next(backbone.model.parameters()).device))
        watched = (*self.levels.outputs(), self.backbone.head[-1], *self.backbone.whole)
        coupling = trace(self.backbone.model, self.example[:1], watch=watched)
        self.choice = ChannelChoice(self.backbone, self.levels, coupling, tree, spec)
        self.cutter = self.choice.cutter
        self.record = ConversionRecord(
            tree=tree,
            conversion=spec,
            source=fingerprint(self.backbone.model.state_dict()),
            widths=self.choice.widths,
            shares=self.choice.shares,
        )
        self._check_pool()
        self.heads: dict[NodeId, nn.Module] = {}
        self.plans: dict[NodeId, SlicePlan] = {(): self.cutter.plan([], self.levels.trunk)}
        self.verified = True  # false only for networks whose weights mean nothing

    def _check_pool(self) -> None:
        """Refuse a pool that does not see the channels that are cut."""
        seen = self.choice.activations(self.example, 0, self.tree.depth)
        for level, end in enumerate(self.levels.outputs()):
            channels = len(self.cutter.unit_of_channel(level))
            if seen[end].shape[1:] != (channels,):
                raise ConversionError(
                    f"the pool makes {tuple(seen[end].shape[1:])} of the output of {end}, which "
                    f"has {channels} channels: describe the network with a Backbone of its own"
                )

    def nodes_at(self, depth: int) -> list[NodeId]:
        """The inner nodes at that depth."""
        return [node for node in self.tree.inner if len(node) == depth]

    def slim_trunk(self) -> None:
        """Take channels out of the trunk where the tree says so, before anything reads it."""
        if self.tree.trunk_share is None:
            return
        example = self.example if self.verified else None
        self.trunk, self.plans[()] = self.cutter.trunk(self.tree.trunk_share, example)
        self.walk = Walk(self.tree, self.trunk)
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
            self.fit_norms(depth + 1)
            self.reestimate(depth + 1)

    # Routers and clusters (phases 1 and 3).

    def add_routers(self, nodes: Sequence[NodeId]) -> None:
        """A random projection for each node; its gate too, once the split is known."""
        for node in nodes:
            channels = self._router_channels(node)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self._seed(node))
                router = Router(
                    channels,
                    copy.deepcopy(self.backbone.pool),
                    self.tree,
                    branches=len(self.tree.children(node)),
                )
            self.walk.routers[node] = router.eval().to(self.device)
            if node in self.record.splits:
                self._set_gate(node)

    def _router_channels(self, node: NodeId) -> int:
        if node and self.tree.decide_after is None:
            return len(self.record.nodes[node][-1].kept)
        channels = self.backbone.pool(self.walk.until(self.example)).shape[1]
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
        moments = {node: Moments(self.walk.routers[node].channels, self.device) for node in nodes}
        for x, y in self.stream(f"principal axes of level {len(nodes[0])}", self.spec.samples):
            for node, seen, _ in self.walk.arrivals(x, y, len(nodes[0])):
                moments[node].add(self.backbone.pool(seen))
        for node in nodes:
            mean_C, axis_CC = moments[node].axes(self.shards, node_key(node))
            linear = self.walk.routers[node].linear
            kept = axis_CC[: len(linear.weight)].to(linear.weight)
            linear.weight[: len(kept)] = kept
            linear.bias[: len(kept)] = -kept @ mean_C.to(kept)

    def cluster(self, nodes: Sequence[NodeId]) -> None:
        """Collect the latents at the nodes and split each node's samples among its branches."""
        latents: dict[NodeId, list[Tensor]] = {node: [] for node in nodes}
        labels: dict[NodeId, list[Tensor]] = {node: [] for node in nodes}
        samples = torch.zeros((), dtype=torch.int64)
        none_0D = torch.empty(0, self.tree.projection_dim, device=self.device)
        for x, y in self.stream(f"latents of level {len(nodes[0])}", self.spec.samples):
            samples += len(x)
            for node in nodes:  # which not every batch reaches
                latents[node].append(none_0D)
                labels[node].append(y[:0])
            for node, seen, rows in self.walk.arrivals(x, y, len(nodes[0])):
                latents[node][-1] = self.walk.routers[node].latent(seen)
                labels[node][-1] = y[rows]
        self.record.samples = int(self.shards.sum(samples))
        for node in nodes:
            latent_ND = self.shards.gather(latents[node])
            label_N = self.shards.gather(labels[node])
            self.record.splits[node] = self._agreed(self._split(node, latent_ND, label_N))
            if self.spec.projection == "pca":
                linear = self.walk.routers[node].linear
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
        if self.spec.clusters == "latents":
            branches = len(self.tree.children(node))
            return split_latents(latent_ND, branches, self.spec, self._seed(node))
        root = self.record.splits.get(())
        known = len(root.class_branch or ()) if root else int(label_N.max()) + 1
        return split_classes(latent_ND, label_N, known, self.spec, self._seed(node))

    def _set_gate(self, node: NodeId) -> None:
        split, gate = self.record.splits[node], self.walk.routers[node].gate
        if split.class_branch is not None:
            table_V = torch.tensor(split.class_branch, device=self.device)
            self.walk.class_branch_V[node] = table_V
        if split.projection_weight is not None:
            linear = self.walk.routers[node].linear
            linear.weight.copy_(torch.tensor(split.projection_weight))
            linear.bias.copy_(torch.tensor(split.projection_bias))
        gate.weight.copy_(torch.tensor(split.gate_weight))
        gate.bias.copy_(torch.tensor(split.gate_bias))

    # Channels (phases 2 and 4).

    def select(self, nodes: Sequence[NodeId]) -> None:
        """Choose every child's channels from the dense activations of its cluster, or of all."""
        if self.spec.channels == "average":
            for node in nodes:
                for child in self.tree.children(node):
                    levels = self.tree.levels_of(child)
                    self.record.nodes[child] = [self._average[level - 1] for level in levels]
            return
        means = self._channel_means(nodes) if self.spec.channels == "activation" else {}
        for node in nodes:
            mean = means.get(node, {})
            for stage in mean.keys() & set(self.levels.outputs()):
                self.record.splits[node].channel_mean[stage] = mean[stage].tolist()
            children = self.tree.children(node)
            chosen = self.choice.for_children(
                len(children),
                range(len(node) + 1, self._deepest(node) + 1),
                mean,
                self.record.nodes[node][-1].kept if node else None,
                partial(_generator, self._seed(node)),
            )
            for child, stages in zip(children, chosen, strict=True):
                self.record.nodes[child] = stages[: len(self.tree.levels_of(child))]

    def _deepest(self, node: NodeId) -> int:
        return max(self.tree.levels_of(child)[-1] for child in self.tree.children(node))

    def _channel_means(self, nodes: Sequence[NodeId]) -> dict[NodeId, dict[str, Tensor]]:
        """What the source channels of all levels below do in each cluster of each node."""
        depth, deepest = len(nodes[0]), max(map(self._deepest, nodes))
        sums = {
            node: self._channel_sums(depth + 1, self._deepest(node), len(self.tree.children(node)))
            for node in nodes
        }
        for x, y in self.stream(f"activations below level {depth}", self.spec.samples):
            found = self.choice.activations(x, depth + 1, deepest)
            for node, seen, rows in self.walk.arrivals(x, y, depth):
                branch_B = self.walk.branch(node, seen, y[rows])
                for name, total in sums[node].items():
                    total.add(found[name][rows], branch_B)
        return {node: self._means(sums[node]) for node in nodes}

    def _channel_sums(self, first: int, last: int, clusters: int) -> dict[str, ChannelSums]:
        """Nothing yet of what is measured of those levels."""
        sizes = self.choice.measured(first, last)
        return {name: ChannelSums(size, self.device, clusters) for name, size in sizes.items()}

    def _means(self, sums: Mapping[str, ChannelSums]) -> dict[str, Tensor]:
        return {name: total.mean(self.shards, name) for name, total in sums.items()}

    @cached_property
    def _average(self) -> list[NodeChannels]:
        return self.average_channels()

    def average_channels(self) -> list[NodeChannels]:
        """The channels of every level that do most over all samples."""
        sums = self._channel_sums(1, self.tree.depth, clusters=1)
        for x, _ in self.stream("activations", self.spec.samples):
            everyone = torch.zeros(len(x), dtype=torch.int64, device=self.device)
            found = self.choice.activations(x, 1, self.tree.depth)
            for name, total in sums.items():
                total.add(found[name], everyone)
        return self.choice.on_average(self._means(sums))

    # Modules (phases 0, 2, 4 and 5).

    def add_children(self, nodes: Sequence[NodeId]) -> None:
        """Copy the chosen channels into the children of ``nodes`` and check the copies."""
        for node in nodes:
            for child in self.tree.children(node):
                self._add_specializer(child)

    def _add_specializer(self, child: NodeId) -> None:
        lineage = [
            channels
            for length in range(1, len(child) + 1)
            for channels in self.record.nodes[child[:length]]
        ]
        section, head, plan = self.cut(lineage, self.tree.levels_of(child))
        self.walk.specializers[child], self.plans[child] = section, plan
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
        gather = self.cutter.gather(lineage, levels[0])
        plan = self.cutter.plan(lineage, (*paths, *self.backbone.head), gather)
        section = self.backbone.specializer(paths, plan).eval()
        head = self.backbone.pooled_head(plan).eval()
        error = 0.0
        if self.verified:
            body = section if gather is None else section[1:]
            error = self.cutter.verify(body, lineage, levels, self.example)
        if self.verified and levels[-1] == self.tree.depth:
            error = max(error, self.cutter.verify_head(head[1:], lineage, self.head_example))
        for channels in lineage[-len(levels) :]:
            channels.max_error = error
        return section, head, plan

    @cached_property
    def head_example(self) -> Tensor:
        """What the dense network's head is given for the example."""
        feature: Any = self.example
        for module in self.backbone.modules(self.backbone.chain):
            feature = module(feature)
        return self.backbone.head_pool(feature)

    def reestimate(self, depth: int) -> None:
        """Re-estimate the batch norms of the nodes at ``depth`` on their own samples."""
        if not self.spec.norm_samples:
            return
        nodes = [node for node in self.tree.specializers if len(node) == depth]

        def run() -> None:
            samples = min(self.spec.samples, self.spec.norm_samples * len(nodes))
            for x, y in self.stream(f"batch norms of level {depth}", samples):
                for node, feature, rows in self.walk.entries(x, y, depth):
                    if len(rows) > 1:  # a batch norm cannot learn from one sample
                        output = self.walk.specializers[node](feature)
                        if node in self.heads:
                            self.heads[node](output)

        modules = {node: [self.walk.specializers[node]] for node in nodes}
        for node in self.heads.keys() & modules.keys():
            modules[node].append(self.heads[node])
        reestimate_norms(chain.from_iterable(modules.values()), run, self.shards)
        for node, parts in modules.items():
            for channels in self.record.nodes[node]:
                channels.norm_reestimated = any(map(saw_data, batch_norms(parts)))

    def fit_norms(self, depth: int) -> None:
        """Fit the layer norms that lost channels, for the nodes at ``depth``, on their samples."""
        fits = {
            node: self._cut_norms(
                self.tree.levels_of(node),
                self.walk.specializers[node],
                self.heads.get(node),
                self.plans[node],
            )
            for node in self.tree.specializers
            if len(node) == depth
        }

        def reaching(x: Tensor, y: Tensor) -> dict[NodeId, Tensor]:
            return {node: rows for node, _, rows in self.walk.entries(x, y, depth)}

        self._fit(f"layer norms of level {depth}", fits, reaching)

    def fit_path(self, section: nn.Module, head: nn.Module, plan: SlicePlan) -> None:
        """The same for one path from the trunk to its head, which all samples take."""
        fits = self._cut_norms(range(1, self.tree.depth + 1), section, head, plan)
        self._fit("layer norms", {(): fits}, lambda x, _: {(): torch.arange(len(x)).to(x.device)})

    def _fit(
        self,
        what: str,
        fits: Mapping[NodeId, Sequence[NormFit]],
        reaching: Callable[[Tensor, Tensor], Mapping[NodeId, Tensor]],
    ) -> None:
        """Fit the norms of every node on the rows of each batch that reach it."""
        paths = [fit.path for fit in chain.from_iterable(fits.values())]
        most = self.spec.norm_samples
        if self.spec.affine_samples is not None:
            most = self.spec.affine_samples
        if not paths or not most:
            return
        for x, y in self.stream(what, min(self.spec.samples, most)):
            with listening(self.backbone, paths, partial(_count, fits, reaching(x, y))):
                self.backbone.model(x)
        for fit in chain.from_iterable(fits.values()):
            fit.finished(self.shards)

    def _cut_norms(
        self, levels: Sequence[int], section: nn.Module, head: nn.Module | None, plan: SlicePlan
    ) -> list[NormFit]:
        paths = [path for level in levels for path in self.levels.levels[level - 1]]
        found = cut_norms(self.backbone, paths, section, plan)
        if head is not None:
            found += cut_norms(self.backbone, self.backbone.head, head, plan)
        return found

    def finished(self) -> SigmaBranchNet:
        """The branched network, with everything that was decided.

        Raises:
            ConversionError: siblings cannot share what the tree says.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.spec.seed)
            shared = tie(self.tree, self.walk.specializers, self.heads)
        if shared and self.verified:
            self._check_tied()
        return SigmaBranchNet(
            tree=self.tree,
            trunk=self.trunk,
            specializers=self.walk.specializers,
            routers=self.walk.routers,
            heads=self.heads,
            plans=self.plans,
            source=self.backbone.source,
            record=self.record.to_dict(),
            shared=shared,
        ).eval()

    def single_path(self, lineage: Sequence[NodeChannels]) -> SigmaBranchNet:
        """The trunk and one specializer with its head, as a tree whose trunk is its only leaf."""
        everything = range(1, self.tree.depth + 1)
        section, head, plan = self.cut(lineage, everything)
        self.fit_path(section, head, plan)

        def run() -> None:
            for x, _ in self.stream("batch norms", min(self.spec.samples, self.spec.norm_samples)):
                if len(x) > 1:  # a batch norm cannot learn from one sample
                    head(section(self.trunk(x)))

        if self.spec.norm_samples:
            reestimate_norms([section, head], run, self.shards)
        self.record.nodes[()] = list(lineage)
        by = self.levels.levels[0][0] if plan.gather else None
        whole = replace(self.plans[()].then(plan), gather=plan.gather, gathered_by=by)
        return SigmaBranchNet(
            tree=TreeSpec.unbranched(),
            trunk=nn.Sequential(OrderedDict(**self.trunk._modules, **section._modules)),
            specializers={},
            routers={},
            heads={(): head},
            plans={(): whole},
            source=self.backbone.source,
            record=self.record.to_dict(),
        ).eval()

    def _check_tied(self) -> None:
        """Run everything once: a network's own code may look into layers that are tied now."""
        until, rest = split_trunk(self.trunk, self.tree.decide_after)
        features: dict[NodeId, Any] = {(): rest(until(self.example))}
        try:
            for node in self.tree.specializers:
                features[node] = self.walk.specializers[node](features[node[:-1]])
                if node in self.heads:
                    self.heads[node](features[node])
        except AttributeError as error:
            raise ConversionError(
                f"a module reads a layer that siblings share ({error}): set tree tied and delta "
                "to 0"
            ) from error

    def stream(self, what: str, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the calibration data, with its progress told."""
        done, own = 0, -(-samples // self.shards.world)
        for x, y in stream(self.loader, samples, self.device, self.shards):
            yield x, y
            done += len(x)
            if self.progress is not None:
                self.progress(what, min(done, own), own)

    def _seed(self, node: NodeId) -> int:
        """A seed of its own for every node.

        A path of branches 0 and 1 is read as a binary number; any other with the digits that the
        tree needs, and as a negative one.
        """
        is_binary = max(node, default=0) < 2
        base, number = 2 if is_binary else self.tree.most_branches, 1
        for branch in node:
            number = base * number + branch
        number = number if is_binary else -number
        return self.spec.seed * 100_003 + number


def _trainable(model: nn.Module) -> nn.Module:
    """A copy; of a network that is frozen as a whole, as a teacher is, one that can learn."""
    model = copy.deepcopy(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return model


def _generator(seed: int, level: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + level)


def _count(
    fits: Mapping[NodeId, Sequence[NormFit]],
    rows: Mapping[NodeId, Tensor],
    path: str,
    given: Tensor,
    returned: Tensor,
) -> None:
    """Count what one dense norm did with each node's rows of the batch."""
    for node, chosen in rows.items():
        for fit in fits[node]:
            if fit.path == path:
                fit.add(given[chosen], returned[chosen])


def _check_pairs(tree: TreeSpec, spec: ConversionSpec) -> None:
    """Refuse to halve the samples of a node with more than two branches."""
    if (spec.balanced or spec.clusters == "classes") and tree.most_branches > 2:
        setting = "balanced=true" if spec.balanced else "clusters=classes"
        raise ConfigError(
            f"conversion {setting} halves the samples, but a node of the tree has "
            f"{tree.most_branches} branches: use clusters=latents without it, or a binary tree"
        )
