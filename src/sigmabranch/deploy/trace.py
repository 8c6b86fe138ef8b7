"""What one prediction cost: bytes, waiting, computing, and where."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class NodeTrace:
    """One node's share of a prediction.

    Attributes:
        node: its key.
        bytes: of its blocks that were run.
        hit_bytes: of those that were in memory before the input came.
        wait_ms: how long computing stood still for them.
        compute_ms: how long they were computed.
    """

    node: str
    bytes: int = 0
    hit_bytes: int = 0
    wait_ms: float = 0.0
    compute_ms: float = 0.0


@dataclass(slots=True)
class Trace:
    """One prediction.

    Attributes:
        leaf: where it ended.
        total_ms: from input to logits.
        bytes_read: from storage while it lasted.
        wasted_bytes: of those, what was guessed and not needed.
        nodes: along the path, root first.
    """

    leaf: str = ""
    total_ms: float = 0.0
    bytes_read: int = 0
    wasted_bytes: int = 0
    nodes: list[NodeTrace] = field(default_factory=list)

    @property
    def wait_ms(self) -> float:
        """How long computing stood still for weights."""
        return sum(node.wait_ms for node in self.nodes)

    @property
    def compute_ms(self) -> float:
        """How long was computed."""
        return sum(node.compute_ms for node in self.nodes)

    @property
    def hit_bytes(self) -> int:
        """Bytes on the path that were in memory before the input came."""
        return sum(node.hit_bytes for node in self.nodes)

    def node(self, key: str) -> NodeTrace:
        """The entry of a node, made when it is first asked for."""
        for entry in self.nodes:
            if entry.node == key:
                return entry
        self.nodes.append(NodeTrace(key))
        return self.nodes[-1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        sums = {"wait_ms": self.wait_ms, "compute_ms": self.compute_ms, "hit_bytes": self.hit_bytes}
        return asdict(self) | sums


@contextmanager
def milliseconds(entry: NodeTrace, name: str) -> Iterator[None]:
    """Add the time that the block takes to a field of ``entry``."""
    began = time.perf_counter()
    try:
        yield
    finally:
        setattr(entry, name, getattr(entry, name) + 1e3 * (time.perf_counter() - began))
