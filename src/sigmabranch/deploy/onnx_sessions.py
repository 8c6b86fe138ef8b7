"""ONNX Runtime sessions of nodes, made ahead of their use, within a byte budget.

ONNX Runtime makes a session of a whole file, so a node is what is read, kept and let go of. It
copies the weights while it does; what is read into is free again then. One thread reads, another
checks and makes sessions of what has been read, so that storage does not wait for that.
"""

from __future__ import annotations

import hashlib
import mmap
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sigmabranch.deploy.storage import PAGE, NodeFile, Throttle, request_bytes
from sigmabranch.errors import CheckpointError, ConfigError, MissingDependency, StorageError

try:
    import onnxruntime
except ImportError as missing:
    raise MissingDependency("onnxruntime", "deploy", "running ONNX nodes") from missing


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFiles:
    """A node on storage.

    Attributes:
        graph: name of its graph; ``graph`` + ``.data`` holds its weights.
        listed: file name → ``bytes`` and ``sha256``.
    """

    graph: str
    listed: Mapping[str, Mapping[str, Any]]

    @property
    def bytes(self) -> int:
        """What making its session reads."""
        return sum(entry["bytes"] for entry in self.listed.values())


class _Opening(NamedTuple):
    """A session on its way."""

    read: Future[dict[str, memoryview]]
    made: Future[onnxruntime.InferenceSession]

    def end(self) -> None:
        """Come to an end, for its bytes count until then."""
        for future in self:
            if not future.cancel():
                wait([future])


class Sessions:
    """Sessions by node.

    Args:
        folder: of the files.
        nodes: key → its files.
        budget: bytes of the nodes that are open or on their way; all fit if None.
        throttle: the storage's rate.
        direct: read around the page cache where the file system can.
        threads: that compute one node.

    Attributes:
        budget: in bytes.
        peak_bytes: most bytes that ever were open or on their way at once.

    Raises:
        ConfigError: a node that is larger than the budget.
    """

    def __init__(
        self,
        folder: Path,
        nodes: Mapping[str, NodeFiles],
        *,
        budget: int | None,
        throttle: Throttle,
        direct: bool,
        threads: int,
    ) -> None:
        self._folder, self._nodes = folder, nodes
        self._throttle, self._direct, self._threads = throttle, direct, threads
        least = max(node.bytes for node in nodes.values())
        self.budget = sum(node.bytes for node in nodes.values()) if budget is None else budget
        if self.budget < least:
            raise ConfigError(
                f"a budget of {budget} bytes is too small for this network: its largest node "
                f"takes {least}"
            )
        self.peak_bytes = 0
        self._closed = False
        self._read_since: dict[str, int] = {}
        self._open: OrderedDict[str, _Opening] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="sigmabranch-reads")
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="sigmabranch-makes")

    def ahead(self, keys: Sequence[str]) -> None:
        """Make the sessions of nodes that will run in this order, as far as they fit together."""
        for key in keys:
            if key not in self._open:
                self._make_room(self._nodes[key].bytes, keep=keys)
                if self._used + self._nodes[key].bytes > self.budget:
                    return
                self._begin(key)
            self._open.move_to_end(key)  # the newest is last

    def get(self, key: str) -> onnxruntime.InferenceSession:
        """A node's session, which is made, or waited for, if need be.

        Raises:
            StorageError: its files cannot be read, or are not those that were written.
            CheckpointError: ONNX Runtime makes no session of them.
            ConfigError: this is closed.
        """
        if key not in self._open:
            self._make_room(self._nodes[key].bytes, keep=())
            self._begin(key)
        try:
            return self._open[key].made.result()
        except Exception:
            del self._open[key]
            raise

    def read(self) -> dict[str, int]:
        """Bytes read for each node since the last call."""
        read, self._read_since = self._read_since, {}
        return read

    def forget(self) -> None:
        """Close all sessions."""
        self._make_room(self.budget, keep=())

    def close(self) -> None:
        """End the threads; a second time does nothing."""
        self._closed = True
        for thread in (self._reader, self._maker):
            thread.shutdown(cancel_futures=True)
        self._open.clear()

    @property
    def _used(self) -> int:
        return sum(self._nodes[key].bytes for key in self._open)

    def _begin(self, key: str) -> None:
        if self._closed:
            raise ConfigError("the runtime is closed: open it again")
        read = self._reader.submit(self._contents, key)
        self._open[key] = _Opening(read, self._maker.submit(self._made, key, read))
        self.peak_bytes = max(self.peak_bytes, self._used)

    def _make_room(self, size: int, keep: Sequence[str]) -> None:
        """Let go of what was used longest ago until there is room, sparing ``keep``."""
        for key in [key for key in self._open if key not in keep]:
            if self._used + size <= self.budget:
                return
            self._open[key].end()
            del self._open[key]

    def _contents(self, key: str) -> dict[str, memoryview]:
        """What a node's files hold."""
        node = self._nodes[key]
        contents = {
            name: self._content(name, entry["bytes"]) for name, entry in node.listed.items()
        }
        self._read_since[key] = node.bytes
        return contents

    def _content(self, name: str, size: int) -> memoryview:
        if size == 0:
            return memoryview(b"")
        memory = memoryview(mmap.mmap(-1, -(-size // PAGE) * PAGE))[:size]
        # A direct read must end at a page.
        direct = self._direct and size % PAGE == 0
        self._throttle.began()
        with closing(NodeFile(self._folder / name, direct=direct)) as file:
            for count in file.read(0, memory, request_bytes(self._throttle.bytes_per_second)):
                self._throttle.took(count)
        return memory

    def _made(self, key: str, read: Future[dict[str, memoryview]]) -> onnxruntime.InferenceSession:
        """The session of what has been read, if that is what was written."""
        node, contents = self._nodes[key], read.result()
        try:
            for name, content in contents.items():
                if hashlib.sha256(content).hexdigest() != node.listed[name]["sha256"]:
                    raise StorageError(
                        f"{self._folder / name} is damaged or has been changed: copy it again"
                    )
            return self._session(node.graph, contents)
        finally:
            contents.clear()  # which the future of the reading holds

    def _session(
        self, graph: str, contents: Mapping[str, memoryview]
    ) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        weights = {
            name: np.frombuffer(data, np.uint8)
            for name, data in contents.items()
            if data and name != graph
        }
        options.add_external_initializers_from_files_in_memory(
            [*weights], [*weights.values()], [len(data) for data in weights.values()]
        )
        try:
            return onnxruntime.InferenceSession(
                bytes(contents[graph]), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise _refused(self._folder / graph, error) from error


def run_session(
    session: onnxruntime.InferenceSession,
    path: Path,
    outputs: Sequence[str],
    inputs: Mapping[str, NDArray[Any]],
) -> list[NDArray[Any]]:
    """What a session, made of the graph at ``path``, gives.

    Raises:
        CheckpointError: ONNX Runtime fails.
    """
    try:
        return session.run(outputs, inputs)
    except Exception as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> CheckpointError:
    """What ONNX Runtime raised, which has no common class, in one line."""
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"ONNX Runtime cannot run {path}: {reason}; export it again")
