"""Loading networks: a skeleton without memory takes its shapes from the plans, then its weights.

Neither the dense checkpoint nor any code from the file is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sigmabranch import files
from sigmabranch.archive import fill, read_manifest, write_archive
from sigmabranch.backbones import as_backbone, build
from sigmabranch.coupling import SlicePlan
from sigmabranch.errors import CheckpointError
from sigmabranch.net import RECORD, SigmaBranchNet
from sigmabranch.routing import Router
from sigmabranch.tree import NodeId, TreeSpec, node_key


def save_dense(
    model: nn.Module, folder: Path | str, notes: Mapping[str, Any] | None = None
) -> None:
    """Write a dense network into ``folder``, in the same form as :meth:`SigmaBranchNet.save`."""
    described = {"kind": "dense", "source": as_backbone(model).source, "notes": dict(notes or {})}
    write_archive(folder, model.state_dict(), described)


def load_net(folder: Path | str, skeleton: nn.Module | None = None) -> SigmaBranchNet:
    """Read a branched network back, in eval mode on the CPU.

    Args:
        folder: written by :meth:`SigmaBranchNet.save`.
        skeleton: a dense network of the same shape (weights do not matter), needed only for a
            network of the user's own that this library cannot build by itself.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind, schema or shape.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, "branched")
    tree = TreeSpec.from_dict(manifest["tree"])
    plans = {_node(tree, key): SlicePlan.from_dict(p) for key, p in manifest["plans"].items()}
    channels = {_node(tree, key): count for key, count in manifest["router_channels"].items()}
    net = _skeleton(_dense_skeleton(manifest, skeleton, folder), tree, plans, channels)
    net.source, net.record = manifest["source"], files.read_json(folder / RECORD)
    fill(net, folder)
    return net.eval()


def load_dense(folder: Path | str) -> nn.Module:
    """Read a dense network back, in eval mode on the CPU; raises as :func:`load_net` does."""
    folder = Path(folder)
    model = _dense_skeleton(read_manifest(folder, "dense"), None, folder)
    fill(model, folder)
    return model.eval()


def _dense_skeleton(
    manifest: Mapping[str, Any], skeleton: nn.Module | None, folder: Path
) -> nn.Module:
    if skeleton is not None:
        return skeleton.to("meta")
    if manifest["source"] is None:
        raise CheckpointError(
            f"{folder} was made from a network of your own: pass one of the same shape as skeleton"
        )
    with torch.device("meta"):
        return build(manifest["source"])


def _skeleton(
    dense: nn.Module,
    tree: TreeSpec,
    plans: Mapping[NodeId, SlicePlan],
    router_channels: Mapping[NodeId, int],
) -> SigmaBranchNet:
    """A branched network of the right shapes, without values."""
    backbone = as_backbone(dense)
    levels = backbone.levels(tree.depth, tree.cuts)
    specializers, heads = {}, {}
    for node in tree.specializers:
        paths = [path for level in tree.levels_of(node) for path in levels.levels[level - 1]]
        specializers[node] = backbone.section(paths, plans[node])
        if node in tree.leaves:
            heads[node] = backbone.pooled_head(plans[node])
    with torch.device("meta"):
        routers = {
            node: Router(router_channels[node], copy.deepcopy(backbone.pool), tree)
            for node in tree.inner
        }
    return SigmaBranchNet(
        tree=tree,
        trunk=backbone.section(levels.trunk),
        specializers=specializers,
        routers=routers,
        heads=heads,
        plans=plans,
        source=None,
        record={},
    )


def _node(tree: TreeSpec, key: str) -> NodeId:
    for node in ((), *tree.specializers):
        if node_key(node) == key:
            return node
    raise CheckpointError(f"the manifest plans a node {key!r} that its tree does not have")
