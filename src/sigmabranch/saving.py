"""Networks on disk: a folder with a manifest, one safetensors file and the conversion record.

The manifest names every file with its size and SHA-256 and is written last. Loading builds the
skeleton without memory (meta device), gives it its shapes from the slice plans, and fills it: no
pickle, no dense checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from sigmabranch import files
from sigmabranch.backbones import as_backbone, build
from sigmabranch.coupling import SlicePlan
from sigmabranch.errors import CheckpointError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.routing import Router
from sigmabranch.tree import NodeId, TreeSpec, node_key

SCHEMA = 1
_MANIFEST, _WEIGHTS, _RECORD = "manifest.json", "weights.safetensors", "record.json"


def save_net(net: SigmaBranchNet, folder: Path | str, notes: Mapping[str, Any] | None = None) -> None:
    """Write a branched network into ``folder``, each file atomically and the manifest last.

    Args:
        net: the network; its weights are stored in their own dtype.
        folder: created if absent.
        notes: anything JSON-able to keep beside it, such as the task it was made for.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    files.write_json(folder / _RECORD, net.record)
    described = {
        "kind": "branched",
        "source": net.source,
        "tree": net.tree.to_dict(),
        "plans": {node_key(node): plan.to_dict() for node, plan in net.plans.items()},
        "router_channels": {node_key(node): net.router(node).channels for node in net.tree.inner},
    }
    _write(net, folder, described, notes, (_WEIGHTS, _RECORD))


def save_dense(
    model: nn.Module, folder: Path | str, notes: Mapping[str, Any] | None = None
) -> None:
    """Write a dense network into ``folder``, in the same form as :func:`save_net`."""
    described = {"kind": "dense", "source": as_backbone(model).source}
    _write(model, Path(folder), described, notes, (_WEIGHTS,))


def load_net(folder: Path | str, skeleton: nn.Module | None = None) -> SigmaBranchNet:
    """Read a branched network back, in eval mode on the CPU.

    Args:
        folder: written by :func:`save_net`.
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
    net.source, net.record = manifest["source"], files.read_json(folder / _RECORD)
    _fill(net, folder)
    return net.eval()


def load_dense(folder: Path | str) -> nn.Module:
    """Read a dense network back, in eval mode on the CPU; raises as :func:`load_net` does."""
    folder = Path(folder)
    model = _dense_skeleton(read_manifest(folder, "dense"), None, folder)
    _fill(model, folder)
    return model.eval()


def read_manifest(folder: Path | str, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a saved network, after checking every file that it names.

    Raises:
        CheckpointError: missing or damaged files, another schema, or not of ``kind``.
    """
    folder = Path(folder)
    if not (folder / _MANIFEST).is_file():
        raise CheckpointError(f"{folder} holds no saved network: {_MANIFEST} is missing")
    manifest = files.read_json(folder / _MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != "sigmabranch":
        raise CheckpointError(f"{folder / _MANIFEST} was not written by sigmabranch")
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{folder} has schema {manifest.get('schema')}, this version reads {SCHEMA}: "
            "use the version that wrote it"
        )
    if kind is not None and manifest.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a {manifest.get('kind')} network, need a {kind} one")
    for name, expected in manifest["files"].items():
        _check_file(folder, name, expected)
    return manifest


def _check_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    path = folder / name
    if Path(name).name != name:
        raise CheckpointError(f"{folder / _MANIFEST} names {name!r} outside its own folder")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: copy the whole folder again")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: {size} bytes instead of {expected['bytes']}; copy it again"
        )
    if files.sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs; copy it again")


def _write(
    model: nn.Module,
    folder: Path,
    described: dict[str, Any],
    notes: Mapping[str, Any] | None,
    names: tuple[str, ...],
) -> None:
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with files.atomic_write(folder / _WEIGHTS) as temporary:
        temporary.write_bytes(safetensors.torch.save(state))
    manifest = {
        "format": "sigmabranch",
        "schema": SCHEMA,
        **described,
        "notes": dict(notes or {}),
        "files": {
            name: {
                "bytes": (folder / name).stat().st_size,
                "sha256": files.sha256(folder / name),
            }
            for name in names
        },
    }
    files.write_json(folder / _MANIFEST, manifest)


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


def _fill(model: nn.Module, folder: Path) -> None:
    try:
        state = safetensors.torch.load_file(folder / _WEIGHTS)
        model.load_state_dict(state, assign=True)
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder / _WEIGHTS} does not fit its manifest: {reason}") from error


def _node(tree: TreeSpec, key: str) -> NodeId:
    for node in ((), *tree.specializers):
        if node_key(node) == key:
            return node
    raise CheckpointError(f"the manifest plans a node {key!r} that its tree does not have")
