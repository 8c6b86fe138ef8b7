"""Late upcycling: train one path, copy it into the leaves, let each leaf learn its own samples.

In the first part of fine-tuning all leaves are one set of tensors, so a step costs what one path
costs and every sample trains all of it. Then the path is copied into every leaf, routers learn
which classes or clusters belong to which leaf and are frozen, and each sample trains only the nodes
that it passes. After Komatsuzaki et al., "Sparse Upcycling" (ICLR 2023), but for whole paths, and
late: a leaf that sees 1/L of the data should begin where all of the data led.

Shapes: N samples, C channels, V classes.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from sigmabranch.conversion import Shards
from sigmabranch.conversion.calibrate import has_labels
from sigmabranch.conversion.cluster import spherical_kmeans
from sigmabranch.data import Share, derive_seed
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.training.grouping import class_leaves
from sigmabranch.training.recipe import FinetuneRecipe
from sigmabranch.training.routers import fit_router, scores
from sigmabranch.tree import NodeId, node_key

# The samples that pass each inner node, and the branch of each of them.
Targets: TypeAlias = dict[NodeId, tuple[Tensor, Tensor]]

# Enough to train routers of a few thousand parameters.
SAMPLES = 50_000


def unite(net: SigmaBranchNet) -> None:
    """Make all leaves one path, that of the first leaf; nothing is decided until :func:`divide`.

    Raises:
        ConfigError: the branches have different channels.
    """
    _check_channels(net)
    first: dict[tuple[int, str], nn.Module] = {}
    for node in net.tree.sharing:
        parts = _modules_of(net.shared[node_key(node)])
        for name, module in parts.items():
            parts[name] = first.setdefault((-1 - len(node), name), module)
    for node in net.tree.specializers:
        parts = _modules_of(net.specializer(node))
        for name, module in parts.items():
            # What gathers its input has the same name at every level; all else is named once.
            level = len(node) if name == "gathered" else 0
            parts[name] = first.setdefault((level, name), module)
    for leaf in net.tree.leaves:
        net.heads[node_key(leaf)] = net.head(net.tree.leaves[0])
    net.united = True


def divide(net: SigmaBranchNet) -> dict[nn.Parameter, nn.Parameter]:
    """Give every node its own copy of the one path again; what siblings share stays shared.

    Returns:
        Each new parameter → the one that it is a copy of.
    """
    origin: dict[nn.Parameter, nn.Parameter] = {}
    taken: set[nn.Module] = set()

    def copied(module: nn.Module, shared: Mapping[int, nn.Module]) -> nn.Module:
        if module not in taken:
            taken.add(module)
            return module
        copy_of = copy.deepcopy(module, dict(shared))
        origin.update(zip(copy_of.parameters(), module.parameters(), strict=True))
        return copy_of

    # What a node's children share in the united network → what they share from now on.
    shared: dict[NodeId, dict[int, nn.Module]] = {}
    for node in net.tree.sharing:
        parts = _modules_of(net.shared[node_key(node)])
        shared[node] = {}
        for name, part in parts.items():
            parts[name] = shared[node][id(part)] = copied(part, {})
    for node in net.tree.specializers:
        parts = _modules_of(net.specializer(node))
        for name, part in parts.items():
            parts[name] = copied(part, shared.get(node[:-1], {}))
    for leaf in net.tree.leaves:
        net.heads[node_key(leaf)] = copied(net.head(leaf), shared.get(leaf[:-1], {}))
    net.united = False
    return origin


def _modules_of(holder: nn.Module) -> dict[str, nn.Module]:
    """The modules that a container holds, to be changed in place."""
    return cast(dict[str, nn.Module], holder._modules)


def _check_channels(net: SigmaBranchNet) -> None:
    if net.tree.sharing and len(set(map(len, net.tree.leaves))) > 1:
        raise ConfigError(
            "late upcycling cannot share tensors among siblings that run different stages: "
            "set tree tied=0 and delta=0, or give all leaves the same depth"
        )
    known: dict[tuple[str, int], Tensor] = {}
    for node, plan in net.plans.items():
        for name, axes in plan.keep.items():
            for axis, kept in axes.items():
                if not torch.equal(known.setdefault((name, axis), kept), kept):
                    raise ConfigError(
                        f"late upcycling starts from one path, but node {node_key(node)} has other "
                        f"channels of {name} than its siblings: convert with channels=average, or "
                        "set upcycle=0"
                    )


class Upcycling:
    """The turn from one path to leaves (:class:`~sigmabranch.training.turn.Turn`).

    Args:
        recipe: when, and what the routers learn.
        teacher: whose confusions tell which classes belong together; the path's own if None.

    Attributes:
        share: of the training that is done by then.
        done: whether the network has been divided.
    """

    def __init__(self, recipe: FinetuneRecipe, teacher: nn.Module | None) -> None:
        self.share, self.groups, self.teacher = recipe.upcycle, recipe.groups, teacher
        self.done = False
        self._learning: list[nn.Parameter] = []
        self._rates: dict[nn.Dropout, float] = {}

    def prepare(self, model: nn.Module, *, done: bool) -> None:
        """Freeze the routers; unite the leaves, or see to it that they are apart."""
        assert isinstance(model, SigmaBranchNet)
        self._learning += [p for p in model.routers.parameters() if p.requires_grad]
        for parameter in model.routers.parameters():
            parameter.requires_grad_(False)
        # In training mode dropout would send most samples to leaves that they never see in use.
        for dropout in _dropouts(model):
            self._rates.setdefault(dropout, dropout.p)
            dropout.p = 0.0
        if done and model.united:
            divide(model)
        elif not done and not model.united:
            unite(model)
        self.done = done

    def make(
        self, model: nn.Module, batches: Iterable[Share], shards: Shards, seed: int
    ) -> dict[nn.Parameter, nn.Parameter]:
        """Train the routers on the path's features, and divide it."""
        assert isinstance(model, SigmaBranchNet)
        pooled, class_N, confusion_VV = self._look(model, batches, shards)
        if len(class_N) < len(model.tree.leaves):
            raise DataError(
                f"{len(class_N)} samples are too few for {len(model.tree.leaves)} leaves: "
                "train on more, or choose fewer leaves"
            )
        if self.groups == "confusions":
            leaf_V = class_leaves(confusion_VV, model.tree, derive_seed(seed, 0)).to(class_N.device)
            targets = _class_targets(model, leaf_V[class_N])
        else:
            targets = _cluster_targets(model, pooled, derive_seed(seed, 0))
        _fit_routers(model, pooled, targets, derive_seed(seed, 1))
        for parameter in model.routers.parameters():
            parameter.data.copy_(shards.first(parameter.detach()))
        self.done = True
        return divide(model)

    def release(self, model: nn.Module) -> None:
        """Let the routers learn again, those that did before."""
        del model
        for parameter in self._learning:
            parameter.requires_grad_(True)
        self._learning.clear()
        for dropout, rate in self._rates.items():
            dropout.p = rate
        self._rates.clear()

    @torch.no_grad()
    def _look(
        self, net: SigmaBranchNet, batches: Iterable[Share], shards: Shards
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Pooled features of each depth (N, C), classes (N,), and how these are answered (V, V).

        Where there are no labels, a sample's class is what the teacher says, or else the path.
        """
        parts: defaultdict[str, list[Tensor]] = defaultdict(list)
        seen = 0
        for share in batches:
            logits_BV, reads = _run_path(net, share.x)
            for depth, read_BC in enumerate(reads):
                parts[str(depth)].append(read_BC)
            if self.teacher is not None:
                logits_BV = self.teacher(share.x)
            answer_BV = logits_BV.float().softmax(dim=1)
            parts["answer"].append(answer_BV)
            parts["class"].append(share.y if has_labels(share.y) else answer_BV.argmax(1))
            seen += share.total
            if seen >= SAMPLES:
                break
        found = {name: shards.gather(rows) for name, rows in parts.items()}
        answer_NV, class_N = found["answer"], found["class"]
        confusion_VV = answer_NV.new_zeros(answer_NV.shape[1], answer_NV.shape[1])
        confusion_VV.index_add_(0, class_N, answer_NV)
        confusion_VV /= class_N.bincount(minlength=len(confusion_VV)).clamp(min=1)[:, None]
        return [found[str(depth)] for depth in range(net.tree.depth)], class_N, confusion_VV


def _dropouts(net: SigmaBranchNet) -> list[nn.Dropout]:
    return [module for module in net.routers.modules() if isinstance(module, nn.Dropout)]


def _run_path(net: SigmaBranchNet, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of the one path, and what a router of each depth would read of it, pooled."""
    leaf = max(net.tree.leaves, key=len)
    until, rest = net.trunk_parts()
    feature = until(x)
    reads = [_pool(net, leaf[:0])(feature)] * len(leaf) if net.early else []
    feature = rest(feature)
    for depth in range(len(leaf)):
        if not net.early:
            reads.append(_pool(net, leaf[:depth])(feature))
        feature = net.specializer(leaf[: depth + 1])(feature)
    return net.head(leaf)(feature), [read_BC.float() for read_BC in reads]


def _pool(net: SigmaBranchNet, node: NodeId) -> nn.Module:
    return net.router(node).projection[0]


def _class_targets(net: SigmaBranchNet, leaf_N: Tensor) -> Targets:
    """Every inner node's samples and their branches, where each sample's leaf is given."""
    targets = {}
    for node in net.tree.inner:
        branch_L = torch.full((len(net.tree.leaves),), -1)
        for child in net.tree.children(node):
            branch_L[list(net.tree.leaves_under(child))] = child[-1]
        branch_N = branch_L.to(leaf_N.device)[leaf_N]
        rows = (branch_N >= 0).nonzero().flatten()
        targets[node] = rows, branch_N[rows]
    return targets


def _cluster_targets(net: SigmaBranchNet, pooled: Sequence[Tensor], seed: int) -> Targets:
    """The same by spherical k-means of each node's samples, from the root on."""
    targets: Targets = {}
    arrived: dict[NodeId, Tensor] = {(): torch.arange(len(pooled[0]), device=pooled[0].device)}
    for number, node in enumerate(net.tree.inner):
        rows, children = arrived[node], net.tree.children(node)
        clusters = spherical_kmeans(
            pooled[len(node)][rows],
            len(children),
            centred=True,
            balanced=len(children) == 2,
            seed=derive_seed(seed, number),
        )
        targets[node] = rows, clusters.assignment
        arrived |= {child: rows[clusters.assignment == child[-1]] for child in children}
    return targets


def _fit_routers(
    net: SigmaBranchNet, pooled: Sequence[Tensor], targets: Targets, seed: int
) -> None:
    """Train each router on its own samples, and see that every leaf gets some."""
    arrived: dict[NodeId, Tensor] = {(): torch.arange(len(pooled[0]), device=pooled[0].device)}
    for number, node in enumerate(net.tree.inner):
        (rows, branch), router, pooled_NC = targets[node], net.router(node), pooled[len(node)]
        missing = set(range(len(net.tree.children(node)))) - set(branch.unique().tolist())
        if missing:
            raise DataError(
                f"late upcycling found no samples for branch {min(missing)} of node "
                f"{node_key(node)} among {len(pooled_NC)}: train on more, or choose fewer leaves"
            )
        fit_router(router, pooled_NC[rows], branch, derive_seed(seed, number))
        here = arrived[node]
        chosen = scores(router, pooled_NC[here]).argmax(1)
        for child in net.tree.children(node):
            arrived[child] = here[chosen == child[-1]]
            if not len(arrived[child]):
                raise DataError(
                    f"the router of node {node_key(node)} sends no sample to branch {child[-1]}: "
                    "choose fewer leaves, or other finetune.groups"
                )
