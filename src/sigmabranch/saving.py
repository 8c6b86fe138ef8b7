"""Loading networks: a skeleton without memory takes its shapes from the plans, then its weights.

Neither the dense checkpoint nor any code from the file is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sigmabranch import files
from sigmabranch.archive import MANIFEST, fill, read_manifest, write_archive
from sigmabranch.backbones import OWN, Backbone, build, rebuilt, source_of
from sigmabranch.coupling import SlicePlan
from sigmabranch.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    SigmaBranchError,
)
from sigmabranch.net import RECORD, SigmaBranchNet
from sigmabranch.routing import Router
from sigmabranch.shared import tie
from sigmabranch.tree import NodeId, TreeSpec, node_key

# What building a network raises where a manifest asks for one that cannot be.
_MISFITS = (
    *(ConfigError, ConversionError),
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


def save_dense(
    model: nn.Module, folder: Path | str, notes: Mapping[str, Any] | None = None
) -> None:
    """Write a dense network into ``folder``, in the same form as :meth:`SigmaBranchNet.save`."""
    described = {"kind": "dense", "source": source_of(model), "notes": dict(notes or {})}
    write_archive(folder, model.state_dict(), described)


def load(folder: Path | str, skeleton: nn.Module | Backbone | None = None) -> Any:
    """Read a saved network back, in eval mode on the CPU.

    Args:
        folder: written by :meth:`SigmaBranchNet.save` or :func:`save_dense`.
        skeleton: a dense network of the same shape, as it was given to ``convert`` (it is read,
            never changed, and its weights do not matter); needed only for a network of the user's
            own that this library cannot build by itself.

    Returns:
        A :class:`SigmaBranchNet`, or the dense network that was saved, an ``nn.Module``.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind, schema or shape.
    """
    manifest = read_manifest(folder)
    kind = str(manifest.get("kind"))
    if kind not in _READERS:
        raise CheckpointError(
            f"{folder} holds a network of kind {kind!r}, this version reads "
            f"{' and '.join(_READERS)}: use the version that wrote it"
        )
    return _READERS[kind](manifest, Path(folder), skeleton)


def load_net(folder: Path | str, skeleton: nn.Module | Backbone | None = None) -> SigmaBranchNet:
    """As :func:`load`, and refuses a dense network."""
    return _read_net(read_manifest(folder, "branched"), Path(folder), skeleton)


def load_dense(folder: Path | str, skeleton: nn.Module | Backbone | None = None) -> nn.Module:
    """As :func:`load`, and refuses all but dense networks."""
    return _read_dense(read_manifest(folder, "dense"), Path(folder), skeleton)


def _read_net(
    manifest: Mapping[str, Any], folder: Path, skeleton: nn.Module | Backbone | None
) -> SigmaBranchNet:
    net = net_skeleton(manifest, folder, skeleton)
    net.record = files.read_json(folder / RECORD)
    fill(net, folder)
    return net.eval()


def _read_dense(
    manifest: Mapping[str, Any], folder: Path, skeleton: nn.Module | Backbone | None
) -> nn.Module:
    if skeleton is None:
        _refuse_unknown(manifest, folder)
        with _described(folder), torch.device("meta"):
            model = build(manifest["source"])
    else:
        model = skeleton.model if isinstance(skeleton, Backbone) else skeleton
        model = copy.deepcopy(model).to("meta")
    fill(model, folder)
    return model.eval()


_READERS = {"branched": _read_net, "dense": _read_dense}


@contextmanager
def _described(folder: Path) -> Iterator[None]:
    """Building from a manifest: whatever does not fit together is the manifest's fault."""
    try:
        yield
    except _MISFITS as error:
        reason = str(error) if isinstance(error, SigmaBranchError) else repr(error)
        raise CheckpointError(
            f"{folder / MANIFEST} does not describe this network: {reason}"
        ) from error


def net_skeleton(
    manifest: Mapping[str, Any], folder: Path, skeleton: nn.Module | Backbone | None = None
) -> SigmaBranchNet:
    """A branched network without values (meta device), as the manifest in ``folder`` describes it.

    Raises:
        CheckpointError: the manifest does not describe a network, or only its owner can build it.
    """
    backbone = dense_skeleton(manifest, folder, skeleton)
    with _described(folder):
        tree = TreeSpec.from_dict(manifest["tree"])
        plans = {_node(tree, key): SlicePlan.from_dict(p) for key, p in manifest["plans"].items()}
        channels = {_node(tree, key): count for key, count in manifest["router_channels"].items()}
        net = _skeleton(backbone, tree, plans, channels)
        net.source = manifest["source"]
    return net


def dense_skeleton(
    manifest: Mapping[str, Any], folder: Path, skeleton: nn.Module | Backbone | None = None
) -> Backbone:
    """A dense network without values (meta device); raises as :func:`net_skeleton` does."""
    if skeleton is None:
        _refuse_unknown(manifest, folder)
    with _described(folder):
        return rebuilt(manifest.get("source"), skeleton)


def _refuse_unknown(manifest: Mapping[str, Any], folder: Path) -> None:
    with _described(folder):
        builder = (manifest.get("source") or {}).get("builder", OWN)
    if builder == OWN:
        raise CheckpointError(
            f"{folder} was made from a network of your own: pass one of the same shape "
            "as skeleton: sb.load(folder, skeleton=…)"
        )


def _skeleton(
    backbone: Backbone,
    tree: TreeSpec,
    plans: Mapping[NodeId, SlicePlan],
    router_channels: Mapping[NodeId, int],
) -> SigmaBranchNet:
    """A branched network of the right shapes, without values."""
    levels = backbone.levels(tree.depth, tree.cuts)
    specializers = {}
    for node in tree.specializers:
        paths = [path for level in tree.levels_of(node) for path in levels.levels[level - 1]]
        specializers[node] = backbone.specializer(paths, plans[node])
    heads = {leaf: backbone.pooled_head(plans[leaf]) for leaf in tree.leaves}
    with torch.device("meta"):
        routers = {
            node: Router(
                router_channels[node],
                copy.deepcopy(backbone.pool),
                tree,
                branches=len(tree.children(node)),
            )
            for node in tree.inner
        }
    return SigmaBranchNet(
        tree=tree,
        trunk=backbone.section(levels.trunk, plans[()]),
        specializers=specializers,
        routers=routers,
        heads=heads,
        plans=plans,
        source=None,
        record={},
        shared=tie(tree, specializers, heads),
    )


def _node(tree: TreeSpec, key: str) -> NodeId:
    for node in ((), *tree.specializers):
        if node_key(node) == key:
            return node
    raise CheckpointError(f"the manifest plans a node {key!r} that its tree does not have")
