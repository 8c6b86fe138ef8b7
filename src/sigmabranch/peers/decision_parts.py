"""Where a DecisioNet's modules come from: the authors' own topology, or a branched network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from sigmabranch.backbones import (
    Backbone,
    Levels,
    ModelSpec,
    ResNetSpec,
    WideResNetSpec,
    as_backbone,
)
from sigmabranch.errors import ConfigError
from sigmabranch.measure import count_parameters
from sigmabranch.net import SigmaBranchNet
from sigmabranch.peers.decision_net import DecisionNode, Parts
from sigmabranch.tree import TreeSpec

Split: TypeAlias = Literal["early", "late"]


def one_path(
    spec: ModelSpec, *, depth: int, split: Split, width: float
) -> tuple[ModelSpec, Levels]:
    """The network that is one path of the authors' topology, and where it branches.

    Args:
        spec: the dense network; up to the first split the path is as wide.
        depth: how often it splits.
        split: after the first stage and each one that follows, or before the last ones.
        width: share of the channels that each split leaves.

    Raises:
        ConfigError: too few stages, or a network whose stages cannot be narrowed.
    """
    with torch.device("meta"):
        backbone = as_backbone(spec.build())
    levels = backbone.levels(depth)  # refuses what has too few stages for either split
    if split == "early":
        levels = backbone.levels(depth, backbone.stages[1 : 1 + depth])
    starts = [backbone.chain.index(level[0]) for level in levels.levels]
    splits = [
        sum(start <= backbone.chain.index(stage) for start in starts) for stage in backbone.stages
    ]
    return _narrowed(spec, [width**count for count in splits]), levels


def path_params(spec: ModelSpec, levels: Levels, blank: Tensor) -> int:
    """Parameters of one path with its decision nodes, counted without making it.

    Args:
        spec, levels: as :func:`one_path` gives them.
        blank: one input, (1, ...).
    """
    with torch.device("meta"):
        backbone = as_backbone(spec.build())
    *deciding, _ = _channels(backbone, levels, blank)
    return count_parameters([backbone.model]) + sum(channels + 1 for channels in deciding)


def own_parts(tree: TreeSpec, spec: ModelSpec, levels: Levels, blank: Tensor) -> Parts:
    """Parts of the authors' topology, each cut from a fresh network that is one path.

    Args:
        tree: as deep as there are levels.
        spec, levels, blank: as for :func:`path_params`.
    """
    fresh = {node: as_backbone(spec.build()) for node in ((), *tree.specializers)}
    channels = _channels(fresh[()], levels, blank)
    return Parts(
        trunk=fresh[()].section(levels.trunk),
        specializers={
            node: fresh[node].section(levels.levels[len(node) - 1]) for node in tree.specializers
        },
        nodes={node: DecisionNode(channels[len(node)], fresh[node].pool) for node in tree.inner},
        heads={
            leaf: nn.Sequential(fresh[leaf].pool, *fresh[leaf].section(fresh[leaf].head))
            for leaf in tree.leaves
        },
    )


def tree_parts(net: SigmaBranchNet) -> Parts:
    """All of a branched network but its routers, for which decision nodes stand in.

    Raises:
        ConfigError: its siblings share tensors.
    """
    tree = net.tree
    if tree.sharing:
        raise ConfigError(
            "the siblings of a DecisioNet share no tensors: set tree.tied and tree.delta to 0"
        )
    return Parts(
        trunk=net.trunk,
        specializers={node: net.specializer(node) for node in tree.specializers},
        nodes={
            node: DecisionNode(net.router(node).channels, net.router(node).projection[0])
            for node in tree.inner
        },
        heads={leaf: net.head(leaf) for leaf in tree.leaves},
    )


def redrawn(net: SigmaBranchNet) -> SigmaBranchNet:
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


def _narrowed(spec: ModelSpec, factors: Sequence[float]) -> ModelSpec:
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
