"""A package: a folder that a device reads node by node.

``manifest.json`` holds the tree and every node's file and block table; ``NODE.safetensors`` holds a
node's weights as :mod:`sigmabranch.deploy.stored` lays them out, batch norms folded.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from sigmabranch import files
from sigmabranch.archive import (
    MANIFEST,
    check_file,
    check_free,
    checked_entry,
    read_sealed,
)
from sigmabranch.backbones import Backbone, as_backbone
from sigmabranch.deploy.blocks import Block, Node, folded_nodes, folded_skeleton, node_parts
from sigmabranch.deploy.stored import StoredBlock, layout
from sigmabranch.errors import CheckpointError, ConfigError, ConversionError, SigmaBranchError
from sigmabranch.fields import from_fields
from sigmabranch.net import SigmaBranchNet
from sigmabranch.saving import dense_skeleton, net_skeleton
from sigmabranch.seals import json_bytes, sealed
from sigmabranch.tree import TreeSpec, is_shared

FORMAT, SCHEMA = "sigmabranch-package", 1
# Folding rounds anew; a wrong fold is off by far more.
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredNode:
    """One node's file.

    Attributes:
        key: ``"root"``, ``"0"``, ``"0-1"``, …; ``"shared"``, ``"0-shared"``, … for what the
            children of a node share
        file: name in the package's folder.
        bytes: length of the file.
        sha256: of the file.
        decides_after: see :class:`~sigmabranch.deploy.blocks.Node`.
        folded: batch norms that are part of the module before them.
        blocks: in order of storage and of execution; a router comes last.
    """

    key: str
    file: str
    bytes: int
    sha256: str
    decides_after: int
    folded: tuple[tuple[str, str], ...]
    blocks: tuple[StoredBlock, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {
            "key": self.key,
            "file": self.file,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "decides_after": self.decides_after,
            "folded": [list(pair) for pair in self.folded],
            "blocks": [block.to_dict() for block in self.blocks],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> StoredNode:
        """Inverse of :meth:`to_dict`; what no package has raises :class:`ConfigError`."""
        blocks = tuple(map(StoredBlock.from_dict, value["blocks"]))
        node = from_fields(cls, "node", {**value, "blocks": blocks})
        if not blocks or not 0 <= node.decides_after <= len(blocks):
            raise ConfigError(f"node {node.key} has no such blocks")
        ends = (blocks[0].offset, *(block.offset + block.bytes for block in blocks))
        if ends != (*(block.offset for block in blocks), node.bytes):
            raise ConfigError(f"the blocks of node {node.key} are not its file")
        return node

    @property
    def weight_bytes(self) -> int:
        """What running the node reads: its blocks."""
        return sum(block.bytes for block in self.blocks)


@torch.no_grad()
def pack(
    model: SigmaBranchNet | nn.Module | Backbone,
    folder: Path | str,
    example: Tensor,
    *,
    usage: Mapping[str, float] | None = None,
    class_share: Sequence[Sequence[float]] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Package:
    """Write a branched or a dense network as a package.

    Args:
        model: a branched network, or a dense one of a known family, to be streamed as one node.
        folder: receives the package; a crash leaves the one that was there, or this.
        example: (N, ...) float32 inputs, of which the first counts; its shape is kept, and the
            folded network is checked on it.
        usage: leaf → share of the inputs that take it (from an evaluation), a first guess at what
            to keep and to prefetch; leaves that are not named take none.
        class_share: for each class, the share of its inputs that take each leaf (an evaluation's
            ``class_leaf_share``), which a stream's answers are filtered with; of a dense network,
            that belong to each of any groups of classes.
        notes: anything JSON-able to keep, such as the task.

    Returns:
        The package, opened.

    Raises:
        ConfigError: a usage of something else than leaves, or that is no share; a class share that
            is no table of classes by leaves.
        ConversionError: a network that is not its parts in a row, or that folding its batch norms
            changes, or modules whose stored names would be the same.
        CheckpointError: the folder cannot be written, or holds something else.
    """
    check_free(folder, format=FORMAT, schema=SCHEMA)
    example = example[:1]
    if not isinstance(model, SigmaBranchNet):
        model = as_backbone(model, example)
        model.check(example)
    nodes = folded_nodes(model)
    leaves = _leaves([node.key for node in nodes])
    usage = _checked_usage(usage or {}, leaves)
    classes, macs = _checked(model, nodes, example)
    share = _checked_class_share(class_share or (), classes, leaves)
    contents, stored = {}, []
    for node in nodes:
        name = f"{node.key}.safetensors"
        contents[name], blocks = layout(node.blocks, macs)
        stored.append(
            StoredNode(
                key=node.key,
                file=name,
                bytes=len(contents[name]),
                sha256=hashlib.sha256(contents[name]).hexdigest(),
                decides_after=node.decides_after,
                folded=node.folded,
                blocks=blocks,
            )
        )
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "network": _described(model),
        "input": list(example.shape[1:]),
        "classes": classes,
        "usage": usage,
        "notes": dict(notes or {}),
        "nodes": [node.to_dict() for node in stored],
    }
    if share:
        manifest["class_share"] = share
    contents[MANIFEST] = json_bytes(sealed(manifest))
    files.write_together(Path(folder), contents)
    return Package(Path(folder))


def _described(model: SigmaBranchNet | Backbone) -> dict[str, Any]:
    if isinstance(model, SigmaBranchNet):
        return {"kind": "branched", **model.described()}
    return {"kind": "dense", "source": model.source}


def _checked(
    model: SigmaBranchNet | Backbone, nodes: list[Node], example: Tensor
) -> tuple[int, dict[Block, int]]:
    """Compare every node with its original on one feature.

    Returns:
        The number of classes, and the multiply-adds of each block.
    """
    outputs: dict[str, Any] = {}
    seen: Any = None
    macs: dict[Block, int] = {}
    macs.update((block, 0) for node in nodes if is_shared(node.key) for block in node.blocks)
    own = [node for node in nodes if not is_shared(node.key)]
    for node, (body, _) in zip(own, node_parts(model).values(), strict=True):
        found = feature = example if node.key == "root" else outputs[parent(node.key)]
        expected = outputs[node.key] = body.eval()(feature)
        for number, block in enumerate(node.body, start=1):
            found, macs[block] = _counted(block, found)
            if number == node.decides_after:
                seen = found
        if node.router is not None:
            _, macs[node.router] = _counted(node.router, seen)
        _check_same(node.key, found, expected)
    return int(expected.shape[-1]), macs


def _counted(block: Block, feature: Any) -> tuple[Any, int]:
    """What a block makes of a copy of a feature, and the multiply-adds that it takes."""
    copied = tree_map(lambda tensor: tensor.clone(), feature)
    with FlopCounterMode(display=False) as counter:
        out = block.module(copied)
    return out, counter.get_total_flops() // 2


def _check_same(key: str, found: Any, expected: Any) -> None:
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        error = (one - other).abs().max() / other.abs().max().clamp(min=1e-30)
        if not error <= _TOLERANCE:
            raise ConversionError(
                f"node {key} changes by {error:.1e} when its batch norms are folded: "
                "please report this network"
            )


class Package:
    """An opened package; nothing but its manifest has been read.

    Args:
        folder: written by :func:`pack`.

    Attributes:
        folder: as given.
        nodes: key → :class:`StoredNode`, root first.
        input_shape: of one input, without the batch.
        classes: length of the logits.
        usage: leaf → share of the inputs; empty if it was not measured.
        class_share: a row a class: the share of its inputs in each leaf, of a dense network in each
            group of classes; empty if it was not measured.
        notes: as given to :func:`pack`.

    Raises:
        CheckpointError: no package, another schema, a damaged manifest, a file that is missing, of
            another length or outside the folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        manifest = self._manifest()
        self.network: Mapping[str, Any] = checked_entry(manifest, "network", dict, self.folder)
        self.classes = checked_entry(manifest, "classes", int, self.folder)
        self.notes: Mapping[str, Any] = checked_entry(manifest, "notes", dict, self.folder)
        shape = checked_entry(manifest, "input", list, self.folder)
        usage = checked_entry(manifest, "usage", dict, self.folder)
        stored = checked_entry(manifest, "nodes", list, self.folder)
        with self._damage_named():
            self.input_shape = _checked_shape(shape)
            self.nodes = {node.key: node for node in map(StoredNode.from_dict, stored)}
            self._check_tree([node["key"] for node in stored])
            self.usage: Mapping[str, float] = _checked_usage(usage, self.leaves)
            share = manifest.get("class_share", [])
            self.class_share = _checked_class_share(share, self.classes, self.leaves)
        for node in self.nodes.values():
            self._check_file(node, read=False)

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{self.folder} holds no package: {MANIFEST} is missing")
        return read_sealed(
            self.folder,
            format=FORMAT,
            schema=SCHEMA,
            stranger=f"{path} belongs to no package: make one with sigmabranch pack",
            always=True,
        )

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (SigmaBranchError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = str(error) if isinstance(error, SigmaBranchError) else repr(error)
            raise CheckpointError(f"{self.folder / MANIFEST} is damaged: {reason}") from error

    def _check_tree(self, keys: Sequence[str]) -> None:
        """Raise :class:`ConfigError` unless these are the nodes of the network's tree, in order."""
        expected: tuple[str, ...] = ("root",)
        if self.network.get("kind") == "branched":
            expected = TreeSpec.from_dict(self.network["tree"]).keys
        if tuple(keys) != expected:
            raise ConfigError("its nodes are not those of its tree")

    def verify(self) -> None:
        """Read every file and compare its SHA-256; blocks are checked anew whenever they are read.

        Raises:
            CheckpointError: a file that differs.
        """
        for node in self.nodes.values():
            self._check_file(node, read=True)

    def _check_file(self, node: StoredNode, *, read: bool) -> None:
        expected = {"bytes": node.bytes, "sha256": node.sha256}
        check_file(self.folder, node.file, expected, read=read)

    def skeleton(self, skeleton: nn.Module | Backbone | None = None) -> list[Node]:
        """The nodes' modules without values (meta device), to be run on the stored tensors.

        Args:
            skeleton: a dense network of the same shape, where this library cannot build it.

        Raises:
            CheckpointError: the modules and the stored tensors do not fit together.
        """
        make = net_skeleton if self.network.get("kind") == "branched" else dense_skeleton
        model = make(self.network, self.folder, skeleton)
        with self._damage_named():
            nodes = folded_skeleton(model, {key: n.folded for key, n in self.nodes.items()})
        for node in nodes:
            self._check_fit(node)
        return nodes

    def _check_fit(self, node: Node) -> None:
        stored = self.nodes[node.key]
        if stored.decides_after != node.decides_after or len(stored.blocks) != len(node.blocks):
            raise CheckpointError(
                f"node {node.key} in {self.folder} is not that of the network that it describes: "
                "use the version that wrote it"
            )
        for block, found in zip(node.blocks, stored.blocks, strict=True):
            forms = {
                n: (tuple(tensor.shape), tensor.dtype) for n, tensor in block.tensors().items()
            }
            if found.name != block.name or {t.name: t.form for t in found.tensors} != forms:
                raise CheckpointError(
                    f"block {block.name} of node {node.key} in {self.folder} is of another shape "
                    "than the network that it describes: use the version that wrote it"
                )

    @property
    def leaves(self) -> tuple[str, ...]:
        """Nodes without children."""
        return _leaves(self.nodes)

    def path(self, leaf: str) -> tuple[StoredNode, ...]:
        """The nodes from the root to ``leaf``, with what each shares with its siblings."""
        passed = set(ancestry(leaf))
        return tuple(
            node
            for key, node in self.nodes.items()
            if key in passed or (is_shared(key) and parent(key) in passed)
        )

    def path_bytes(self, leaf: str) -> int:
        """What a prediction reads that ends in ``leaf``, with nothing in memory."""
        return sum(node.weight_bytes for node in self.path(leaf))


def parent(key: str) -> str:
    """The node above a node, or above those that share something."""
    return key.rpartition("-")[0] or "root"


def child(key: str, branch: int) -> str:
    """The node below a node."""
    return str(branch) if key == "root" else f"{key}-{branch}"


def ancestry(key: str) -> tuple[str, ...]:
    """The nodes from the root to ``key``."""
    return (key,) if key == "root" else (*ancestry(parent(key)), key)


def _leaves(keys: Iterable[str]) -> tuple[str, ...]:
    keys = tuple(keys)
    parents = {parent(key) for key in keys if key != "root"}
    return tuple(key for key in keys if key not in parents and not is_shared(key))


def _checked_shape(shape: Sequence[Any]) -> tuple[int, ...]:
    """The shape, unless it is none (:class:`ConfigError`)."""
    if not all(type(length) is int and length > 0 for length in shape):
        raise ConfigError(f"an input cannot be of shape {shape}")
    return tuple(shape)


def _checked_usage(usage: Mapping[str, Any], leaves: Sequence[str]) -> dict[str, float]:
    """The share of each leaf; :class:`ConfigError` for other nodes or what is no share."""
    for leaf, share in usage.items():
        if leaf not in leaves:
            raise ConfigError(f"usage names {leaf!r}: the leaves are {', '.join(leaves)}")
        if not isinstance(share, int | float) or not 0 <= share <= sys.float_info.max:
            raise ConfigError(f"the usage of leaf {leaf} must be a share of inputs, got {share!r}")
    return dict(usage)


def _checked_class_share(
    rows: Sequence[Sequence[Any]], classes: int, leaves: Sequence[str]
) -> list[list[float]]:
    """A row a class; :class:`ConfigError` for another table or what is no share."""
    if not rows:
        return []
    table = [[*row] for row in rows]
    groups = len(table[0]) if len(leaves) == 1 else len(leaves)
    if len(table) != classes or not groups or {len(row) for row in table} != {groups}:
        kind = "groups" if len(leaves) == 1 else f"{groups} leaves"
        raise ConfigError(f"a class share must be a table of {classes} classes by {kind}")
    for value in (value for row in table for value in row):
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"a class share must be a share of inputs, got {value!r}")
    return table
