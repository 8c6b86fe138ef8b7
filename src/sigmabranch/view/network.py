"""An open package as the page shows it: what it is, what it answers, what it has read so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sigmabranch.deploy import Prediction, Runtime

LAST = 60  # inputs whose bytes are told one by one


class Network:
    """A runtime with a way to put its answers, and totals.

    Args:
        runtime: open; closing it remains the caller's.
        answer: a prediction as JSON: ``leaf``, ``top`` (``class``, ``probability``), ``trace``.
    """

    def __init__(self, runtime: Runtime, answer: Callable[[Prediction], dict[str, Any]]) -> None:
        self.runtime = runtime
        self._answer = answer
        self._inputs = self._bytes_read = 0
        self._last: deque[int] = deque(maxlen=LAST)

    def described(self) -> dict[str, Any]:
        """JSON-able: its kind, its nodes in order with their bytes, leaf usage, budget, totals."""
        package = self.runtime.package
        kind = package.network["kind"]
        return {
            "kind": "path" if kind == "branched" and len(package.leaves) == 1 else kind,
            "nodes": [
                {"node": key, "bytes": node.weight_bytes} for key, node in package.nodes.items()
            ],
            "usage": dict(package.usage),
            "budget": self.runtime.budget,
            "totals": self._totals(),
        }

    def predict(self, x: Tensor) -> dict[str, Any]:
        """The answer to one input, and the totals with it; raises what the runtime raises."""
        prediction = self.runtime.predict(x)
        self._inputs += 1
        self._bytes_read += prediction.trace.bytes_read
        self._last.append(prediction.trace.bytes_read)
        return {**self._answer(prediction), "totals": self._totals()}

    def _totals(self) -> dict[str, Any]:
        read = {"bytes_read": self._bytes_read, "last_bytes_read": list(self._last)}
        return {"inputs": self._inputs, **read}
