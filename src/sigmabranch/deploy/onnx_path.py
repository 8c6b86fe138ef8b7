"""One path through a folder of ONNX nodes, run by ONNX Runtime.

What the :class:`~sigmabranch.deploy.runtime.Runtime` does with blocks, this does with nodes: those
of the path alone are read, within a byte budget, and as early as it is known that they will run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sigmabranch.archive import MANIFEST, check_file, checked_entry, read_sealed
from sigmabranch.deploy.checks import checked_branch, checked_input, checked_logits
from sigmabranch.deploy.closing import Closing
from sigmabranch.deploy.export.nodes import DECIDE, SCHEMA
from sigmabranch.deploy.onnx_graphs import check_graphs
from sigmabranch.deploy.onnx_sessions import NodeFiles, Sessions, run_session
from sigmabranch.deploy.package import ancestry, child
from sigmabranch.deploy.runtime import Prediction
from sigmabranch.deploy.storage import Throttle
from sigmabranch.deploy.trace import Trace, milliseconds
from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.fields import from_fields
from sigmabranch.sizes import byte_count
from sigmabranch.tree import TreeSpec, node_key

Array: TypeAlias = NDArray[Any]
FORMAT = "sigmabranch-onnx-nodes"


class NodeRun(NamedTuple):
    """One node's part of a path.

    Attributes:
        key: of the node, or ``"decide"``.
        inputs: by name.
        outputs: by name.
    """

    key: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


class OnnxPath(Closing):
    """Runs single inputs through the nodes that ``sigmabranch export --format onnx-nodes`` wrote.

    Where the tree decides early, the nodes of the path are read while those before them compute;
    elsewhere a node is read once its router has been asked. Predictions may come from several
    threads; they are made one after the other. A process that was forked opens the folder anew.

    Args:
        folder: holds ``manifest.json`` and the nodes.
        budget: bytes of the nodes that are open or on their way, such as ``"11MB"``; all fit if
            None.
        threads: that compute one node.
        direct: read around the page cache where the file system can.
        bytes_per_second: read no faster than this, such as ``"100MB"``.

    Attributes:
        folder: as given.
        manifest: as it was written.
        leaves: their keys, left to right.

    Raises:
        CheckpointError: no such folder, a damaged manifest, files that are missing or of another
            length, or graphs that the export does not write.
        ConfigError: a budget less than the largest node, which the message names.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        budget: int | str | None = None,
        threads: int = 1,
        direct: bool = True,
        bytes_per_second: int | str | None = None,
    ) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.folder = Path(folder)
        self.manifest = read_nodes(self.folder)
        check_graphs(self.folder, self.manifest)
        self.leaves = tuple(node_key(leaf) for leaf in self.manifest["leaves"])
        self._nodes = {key: self._files(node) for key, node in self.manifest["nodes"].items()}
        rate = None if bytes_per_second is None else float(byte_count(bytes_per_second))
        self._sessions = Sessions(
            self.folder,
            self._nodes,
            budget=None if budget is None else byte_count(budget),
            throttle=Throttle(rate),
            direct=direct,
            threads=threads,
        )

    def __call__(self, x: Array) -> tuple[Array, str]:
        """(1, ...) float32 → (logits (1, V), key of the leaf); raises as :meth:`predict`."""
        plain = isinstance(x, np.ndarray) and x.dtype == np.float32
        tensor: Any = torch.from_numpy(np.ascontiguousarray(x)) if plain else x
        prediction = self.predict(tensor)
        return prediction.logits[None].numpy(), prediction.leaf

    def predict(self, x: Tensor) -> Prediction:
        """Run one input as :meth:`Runtime.predict` does.

        Raises:
            DataError: an input of another shape or dtype, or with NaN or infinity.
            StorageError: files that cannot be read, or are not those that were written.
            NumericError: NaN or infinite logits, or such a router.
            ConfigError: the path is closed, or another process opened it.
        """
        self.check_here()
        x = checked_input(x, self.input_shape).contiguous()
        with self._lock:
            began = time.perf_counter()
            self._sessions.read()
            trace = Trace()
            *_, last = self.runs(x.numpy(force=True), trace)
            trace.leaf = last.key
            trace.total_ms = 1e3 * (time.perf_counter() - began)
            read = self._sessions.read()
        trace.bytes_read = sum(read.values())
        for entry in trace.nodes:
            entry.hit_bytes = 0 if entry.node in read else entry.bytes
        logits = torch.from_numpy(last.outputs["logits"][0])
        return Prediction(checked_logits(logits), last.key, trace)

    @property
    def budget(self) -> int:
        """Bytes that the nodes which are open or on their way may take."""
        return self._sessions.budget

    @property
    def peak_bytes(self) -> int:
        """Most bytes of nodes that ever were open or on their way at once."""
        return self._sessions.peak_bytes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input, without the batch."""
        return tuple(self.manifest["input"]["shape"][1:])

    def path_bytes(self, leaf: str) -> int:
        """Bytes of the files that a path to ``leaf`` needs."""
        keys = [*([DECIDE] if self.manifest["early"] else []), *ancestry(leaf)]
        return sum(self._nodes[key].bytes for key in keys)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(node.bytes for node in self._nodes.values())

    def forget(self) -> None:
        """Close all sessions, as if other work had needed the memory."""
        self.check_here()
        with self._lock:
            self._sessions.forget()

    def close(self) -> None:
        """End the threads that read and make sessions; a second time does nothing."""
        if self.is_here:
            with self._lock:
                self._sessions.close()

    def runs(self, x: Array, trace: Trace | None = None) -> Iterator[NodeRun]:
        """Run one input, yielding node after node of its path; for one thread at a time.

        Args:
            x: (1, ...) float32.
            trace: receives what each node cost.
        """
        trace = trace or Trace()
        tensors: Sequence[Array] = (x,)
        said: dict[str, Array] = {}
        if self.manifest["early"]:
            self._sessions.ahead([DECIDE, "root"])
            yield (run := self._run(DECIDE, tensors, trace))
            *tensors, log_prob_1IK = run.outputs.values()
            said = dict(zip(self.manifest["routers"], log_prob_1IK[0], strict=True))
        key = "root"
        self._sessions.ahead(self._certain(key, said))
        yield (run := self._run(key, tensors, trace))
        while key not in self.leaves:
            features = [value for name, value in run.outputs.items() if name != "log_prob"]
            key = self._below(key, said.get(key, run.outputs.get("log_prob")))
            self._sessions.ahead(self._certain(key, said))
            yield (run := self._run(key, features, trace))

    def _certain(self, key: str, said: Mapping[str, Array]) -> list[str]:
        """A node, and what is known to follow it."""
        keys = [key]
        while keys[-1] not in self.leaves:
            has_router = keys[-1] in self.manifest["routers"]
            if has_router and keys[-1] not in said:
                break
            keys.append(self._below(keys[-1], said.get(keys[-1])))
        return keys

    def _below(self, key: str, log_prob: Array | None) -> str:
        """The child that a router chooses; a node without one has a single child."""
        below = child(key, 0 if log_prob is None else checked_branch(log_prob))
        if below not in self._nodes:
            raise CheckpointError(
                f"{self.folder} is damaged: it has no node {below}; copy it again"
            )
        return below

    def _run(self, key: str, tensors: Sequence[Array], trace: Trace) -> NodeRun:
        node, entry = self.manifest["nodes"][key], trace.node(key)
        entry.bytes = self._nodes[key].bytes
        inputs = dict(zip(node["inputs"], tensors, strict=True))
        with milliseconds(entry, "wait_ms"):
            session = self._sessions.get(key)
        with milliseconds(entry, "compute_ms"):
            found = run_session(session, self.folder / node["file"], node["outputs"], inputs)
        return NodeRun(key, inputs, dict(zip(node["outputs"], found, strict=True)))

    def _files(self, node: Mapping[str, Any]) -> NodeFiles:
        names, listed = (node["file"], f"{node['file']}.data"), self.manifest["files"]
        return NodeFiles(
            graph=node["file"], listed={name: listed[name] for name in names if name in listed}
        )


def read_nodes(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of ONNX nodes, whose files are there in their length.

    Raises:
        CheckpointError: as for :class:`OnnxPath`.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} holds no ONNX nodes: {MANIFEST} is missing")
    stranger = f"{folder} holds no ONNX nodes: export with --format onnx-nodes"
    manifest = read_sealed(folder, format=FORMAT, schema=SCHEMA, stranger=stranger)
    for name, expected in checked_entry(manifest, "files", dict, folder).items():
        check_file(folder, name, expected, read=False)
    if "notes" in manifest:
        checked_entry(manifest, "notes", dict, folder)
    checked_entry(manifest, "early", bool, folder)
    checked_entry(manifest, "classes", int, folder)
    leaves = checked_entry(manifest, "leaves", list, folder)
    nodes = checked_entry(manifest, "nodes", dict, folder)
    try:
        from_fields(_Input, "input", manifest.get("input", {}))
        described = {key: from_fields(_Node, f"node {key}", node) for key, node in nodes.items()}
        keys, routers = _tree(leaves)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    expected = {*keys, DECIDE} if manifest["early"] else {*keys}
    if nodes.keys() != expected or manifest.get("routers") != routers:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its nodes are not its tree's")
    for key, node in described.items():
        if node.file not in manifest["files"]:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: it lists no file of node {key}")
    return manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class _Input:
    """What a manifest says of an input."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Node:
    """What a manifest says of a node."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def _tree(leaves: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Keys of the nodes, and of those that have a router, of the tree with these leaves.

    Raises:
        ConfigError, TypeError: these are no leaves.
    """
    if len(leaves) == 1:  # a network without branches, in parts
        return [*ancestry(node_key(tuple(leaves[0])))], []
    tree = TreeSpec.from_dict({"leaves": leaves})
    return [node_key(node) for node in ((), *tree.specializers)], [*map(node_key, tree.inner)]
