"""Dense network → branched network, and its relatives that share the same cuts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.backbones import Backbone, as_backbone
from sigmabranch.conversion.budget import plan_budget
from sigmabranch.conversion.calibrate import stream
from sigmabranch.conversion.growth import Growth, Progress
from sigmabranch.conversion.propose import Proposal
from sigmabranch.conversion.record import ConversionRecord, ConversionSpec, Split
from sigmabranch.conversion.shards import Loader, Shards
from sigmabranch.errors import ConfigError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.tree import TreeSpec

# Branches make batches of ever new sizes, for which timing algorithms anew does not pay; and the
# statistics deserve full float32.
_reproducible = torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False)


@_reproducible
@torch.no_grad()
def convert(
    dense: nn.Module | Backbone,
    loader: Loader,
    tree: TreeSpec | Proposal | None = None,
    *,
    budget: int | str | None = None,
    spec: ConversionSpec | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    shards: Shards = Shards(),
) -> SigmaBranchNet:
    """Branch a dense network (phases 0 to 5).

    Args:
        dense: the network. Where it may be cut is found by its family's adapter or by following its
            forward; a :class:`~sigmabranch.backbones.Backbone` says it instead. It is read, never
            changed. Of a network that is frozen as a whole the copies can be trained again.
        loader: (inputs, labels) batches without augmentation; read several times. Inputs alone will
            do, unless classes are clustered.
        tree: the tree, or what :func:`~sigmabranch.conversion.propose_tree` proposes, which the
            record then keeps; two levels and four leaves if None.
        budget: bytes of one path's parameters, such as ``"12MB"``, or ``"40%"`` of the dense; cuts
            and widths are then solved for it (:func:`~sigmabranch.conversion.plan_budget`).
        spec: how to choose clusters and channels; the paper's way if None.
        device: where to calibrate; the dense network's device if None.
        progress: called with (what, samples done, samples in all).
        shards: the processes that work together; each is given the same loader, which must yield
            the same batches in each.

    Returns:
        The branched network in eval mode on ``device``; ``net.record`` explains every decision.

    Raises:
        UnsupportedOperation: channels cannot be followed through an operation of the network.
        ConfigError: the tree does not fit the network.
        ConversionError: too few samples, or a copy that differs from the masked dense network.
        NumericError: NaN or infinity in a latent or an activation.
    """
    proposal = tree if isinstance(tree, Proposal) else None
    spec, tree = spec or ConversionSpec(), _tree(tree)
    backbone = _backbone(dense, loader)
    if budget is not None:
        tree = plan_budget(backbone, _first(backbone.model, loader), budget, tree).tree
    growth = Growth(backbone, loader, tree, spec, device, shards, progress)
    growth.record.proposal = proposal.to_dict() if proposal else None
    growth.slim_trunk()
    for depth in range(tree.depth):
        nodes = growth.nodes_at(depth)
        growth.add_routers(nodes)
        if spec.projection == "pca":
            growth.align(nodes)
        growth.cluster(nodes)
        growth.select(nodes)
        growth.add_children(nodes)
        growth.fit_norms(depth + 1)
        growth.reestimate(depth + 1)
    return growth.finished()


@_reproducible
@torch.no_grad()
def rebuild(
    dense: nn.Module | Backbone,
    record: ConversionRecord | Mapping[str, Any],
    loader: Loader,
    *,
    device: torch.device | str | None = None,
) -> SigmaBranchNet:
    """Build the network that a record describes, without choosing anything anew.

    Args:
        dense: the network that was converted.
        record: of the conversion, or its JSON form, such as ``net.record``.
        loader: the calibration data; batch norms are re-estimated on it where the record says so.
        device: as for :func:`convert`.

    Raises:
        ConfigError: the record belongs to a network of another shape.
    """
    if not isinstance(record, ConversionRecord):
        record = ConversionRecord.from_dict(record)
    tree, spec = record.tree, record.conversion
    growth = Growth(_backbone(dense, loader), loader, tree, spec, device, Shards(), None)
    if growth.record.source != record.source:
        raise ConfigError("the record belongs to a dense network with other tensors: pass that one")
    growth.record = copy.deepcopy(record)
    if () in record.nodes:
        growth.slim_trunk()
        return growth.single_path(growth.record.nodes[()])
    growth.build()
    return growth.finished()


def _tree(tree: TreeSpec | Proposal | None) -> TreeSpec:
    return tree.tree if isinstance(tree, Proposal) else tree or TreeSpec()


def _backbone(dense: nn.Module | Backbone, loader: Loader) -> Backbone:
    """Where ``dense`` may be cut; its forward is followed with the loader's first input."""
    if isinstance(dense, Backbone):
        return dense
    return as_backbone(dense, _first(dense, loader))


def _first(model: nn.Module, loader: Loader) -> Tensor:
    """The loader's first input, where the model is."""
    return next(stream(loader, 1, next(model.parameters()).device))[0]


@torch.no_grad()
def blueprint(
    dense: nn.Module | Backbone, example: Tensor, tree: TreeSpec | None = None
) -> SigmaBranchNet:
    """A branched network of the right shapes with meaningless weights, made without data.

    Every branch holds channels chosen at random and no router has been clustered: good for counting
    and for dry runs.

    Args:
        dense: the network to be branched.
        example: one input, (1, ...); the smallest legal size is enough.
        tree: as for :func:`convert`.
    """
    tree = tree or TreeSpec()
    spec = ConversionSpec(norm_samples=0, channels="random")
    loader = [(example, torch.zeros(len(example), dtype=torch.int64))]
    growth = Growth(_backbone(dense, loader), loader, tree, spec, None, Shards(), None)
    growth.verified = False
    for node in tree.inner:
        branches = len(tree.children(node))
        growth.record.splits[node] = Split(
            gate_weight=[[0.0] * tree.projection_dim] * branches,
            gate_bias=[0.0] * branches,
            sizes=[0] * branches,
            margin=0.0,
            objective=0.0,
            centroid_cosine=1.0,
        )
    for depth in range(tree.depth):
        growth.select(growth.nodes_at(depth))
    growth.build()
    return growth.finished()


@_reproducible
@torch.no_grad()
def single_path(
    dense: nn.Module | Backbone,
    loader: Loader,
    tree: TreeSpec | None = None,
    *,
    spec: ConversionSpec | None = None,
    device: torch.device | str | None = None,
) -> SigmaBranchNet:
    """One path without routers: the control that shows what routing is worth.

    It has the widths of ``tree`` and the channels that are strongest on average over all samples;
    planes, checks and fitted layer norms are as in :func:`convert`, and all batch norms are
    re-estimated together.

    Returns:
        A network whose tree is the trunk alone, in eval mode on ``device``; ``net.record`` names
        the tree that gave the widths, and the channels.

    Raises:
        UnsupportedOperation, ConfigError, ConversionError, NumericError: as for :func:`convert`.
    """
    spec, tree = spec or ConversionSpec(), tree or TreeSpec()
    growth = Growth(_backbone(dense, loader), loader, tree, spec, device, Shards(), None)
    growth.slim_trunk()
    return growth.single_path(growth.average_channels())
