"""A package: a folder that a device reads node by node.

``manifest.json`` holds the tree and every node's file and block table; ``NODE.safetensors`` holds a
node's weights as :mod:`sigmabranch.deploy.stored` lays them out, batch norms folded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from sigmabranch import files
from sigmabranch.archive import MANIFEST, check_file, check_schema
from sigmabranch.backbones import Backbone, as_backbone
from sigmabranch.deploy.blocks import Block, Node, folded_nodes, folded_skeleton, node_parts
from sigmabranch.deploy.stored import StoredBlock, layout
from sigmabranch.errors import CheckpointError, ConversionError, SigmaBranchError
from sigmabranch.net import SigmaBranchNet
from sigmabranch.saving import dense_skeleton, net_skeleton

FORMAT, SCHEMA = "sigmabranch-package", 1
# Folding rounds anew; a wrong fold is off by far more.
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredNode:
    """One node's file.

    Attributes:
        key: ``"root"``, ``"0"``, ``"0-1"``, …
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
        """Inverse of :meth:`to_dict`."""
        return cls(
            **{
                **value,
                "folded": tuple((producer, norm) for producer, norm in value["folded"]),
                "blocks": tuple(map(StoredBlock.from_dict, value["blocks"])),
            }
        )

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
    notes: Mapping[str, Any] | None = None,
) -> Package:
    """Write a branched or a dense network as a package.

    Args:
        model: a branched network, or a dense one of a known family, to be streamed as one node.
        folder: receives the package; each file is replaced atomically, the manifest last.
        example: (1, ...) float32 input; its shape is kept, and the folded network is checked on it.
        usage: leaf → share of the inputs that take it (from an evaluation), a first guess at what
            to keep and to prefetch.
        notes: anything JSON-able to keep, such as the task.

    Returns:
        The package, opened.

    Raises:
        ConversionError: a network that is not its parts in a row, or that folding its batch norms
            changes.
        CheckpointError: the folder cannot be written.
    """
    if not isinstance(model, SigmaBranchNet):
        model = as_backbone(model, example)
        model.check(example)
    nodes = folded_nodes(model)
    classes, macs = _checked(model, nodes, example)
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
        "usage": dict(usage or {}),
        "notes": dict(notes or {}),
        "nodes": [node.to_dict() for node in stored],
    }
    manifest["sha256"] = _own_hash(manifest)
    contents[MANIFEST] = files.json_bytes(manifest)
    with ExitStack() as stack:
        for name in reversed(contents):  # replaced in the reverse of this order
            stack.enter_context(files.atomic_write(Path(folder) / name)).write_bytes(contents[name])
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
    seen, macs = None, {}
    for node, (body, _) in zip(nodes, node_parts(model).values(), strict=True):
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
        notes: as given to :func:`pack`.

    Raises:
        CheckpointError: no package, another schema, a damaged manifest, a file that is missing, of
            another length or outside the folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        manifest = self._manifest()
        with self._damage_named():
            self.network: Mapping[str, Any] = manifest["network"]
            self.input_shape = tuple(manifest["input"])
            self.classes = int(manifest["classes"])
            self.usage: Mapping[str, float] = manifest["usage"]
            self.notes: Mapping[str, Any] = manifest["notes"]
            self.nodes = {node.key: node for node in map(StoredNode.from_dict, manifest["nodes"])}
        for node in self.nodes.values():
            self._check_place(node)

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{self.folder} holds no package: {MANIFEST} is missing")
        manifest = files.read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise CheckpointError(f"{path} belongs to no package: make one with sigmabranch pack")
        check_schema(manifest, self.folder, SCHEMA)
        if manifest.pop("sha256", None) != _own_hash(manifest):
            raise CheckpointError(f"{path} is damaged: its SHA-256 differs; copy it again")
        return manifest

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (SigmaBranchError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = str(error) if isinstance(error, SigmaBranchError) else repr(error)
            raise CheckpointError(f"{self.folder / MANIFEST} is damaged: {reason}") from error

    def _check_place(self, node: StoredNode) -> None:
        self._check_file(node, read=False)
        if node.blocks and node.blocks[-1].offset + node.blocks[-1].bytes > node.bytes:
            raise CheckpointError(
                f"{self.folder / node.file} is shorter than its block table: copy it again"
            )

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
            folded = {key: node.folded for key, node in self.nodes.items()}
            nodes = folded_skeleton(model, folded)
        for node in nodes:
            self._check_fit(node)
        return nodes

    def _check_fit(self, node: Node) -> None:
        stored = {block.name: block for block in self.nodes[node.key].blocks}
        for block in node.blocks:
            expected = {name: tuple(tensor.shape) for name, tensor in block.tensors().items()}
            found = {
                tensor.name: tuple(tensor.shape[axis] for axis in tensor.axes)
                for tensor in (stored[block.name].tensors if block.name in stored else ())
            }
            if expected != found:
                raise CheckpointError(
                    f"block {block.name} of node {node.key} in {self.folder} is of another shape "
                    "than the network that it describes: use the version that wrote it"
                )

    @property
    def leaves(self) -> tuple[str, ...]:
        """Nodes without children."""
        parents = {parent(key) for key in self.nodes if key != "root"}
        return tuple(key for key in self.nodes if key not in parents)

    def path(self, leaf: str) -> tuple[StoredNode, ...]:
        """The nodes from the root to ``leaf``."""
        return tuple(self.nodes[key] for key in ancestry(leaf))

    def path_bytes(self, leaf: str) -> int:
        """What a prediction reads that ends in ``leaf``, with nothing in memory."""
        return sum(node.weight_bytes for node in self.path(leaf))


def parent(key: str) -> str:
    """The node above a node."""
    return key.rpartition("-")[0] or "root"


def child(key: str, branch: int) -> str:
    """The node below a node."""
    return str(branch) if key == "root" else f"{key}-{branch}"


def ancestry(key: str) -> tuple[str, ...]:
    """The nodes from the root to ``key``."""
    return (key,) if key == "root" else (*ancestry(parent(key)), key)


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """Of everything in the manifest but this."""
    return hashlib.sha256(files.json_bytes(manifest)).hexdigest()
