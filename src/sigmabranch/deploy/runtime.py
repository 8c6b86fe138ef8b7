"""One input at a time through a package, reading only its path, within a byte budget."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from sigmabranch.backbones import Backbone
from sigmabranch.deploy.checks import checked_branch, checked_input, checked_logits
from sigmabranch.deploy.closing import Closing
from sigmabranch.deploy.engines import Engine, find_engine
from sigmabranch.deploy.loader import Loader
from sigmabranch.deploy.package import Package, child
from sigmabranch.deploy.planner import Planner
from sigmabranch.deploy.prior import LeafPrior, Prior
from sigmabranch.deploy.program import Program
from sigmabranch.deploy.residency import Residency
from sigmabranch.deploy.segment import Segment
from sigmabranch.deploy.storage import NodeFile, Throttle
from sigmabranch.deploy.stream import STICKINESS, StreamFilter
from sigmabranch.deploy.stream_leaves import StreamLeaves
from sigmabranch.deploy.trace import Trace, milliseconds
from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.sizes import byte_count


class Prediction(NamedTuple):
    """What the network says about one input.

    Attributes:
        logits: (V,) float32.
        leaf: key of the leaf that said it; ``"root"`` of a dense network.
        trace: what it cost.
    """

    logits: Tensor
    leaf: str
    trace: Trace


class StreamPrediction(Prediction):
    """What the network says about one input in the light of those of the stream before it.

    Attributes:
        logits: (V,) float32 whose softmax is the filtered answer.
        raw_logits: (V,) float32, what it says of the input alone.
    """

    raw_logits: Tensor

    def __new__(cls, logits: Tensor, leaf: str, trace: Trace, raw_logits: Tensor) -> Self:
        """A prediction of three fields, and beside them the raw logits."""
        made = super().__new__(cls, logits, leaf, trace)
        made.raw_logits = raw_logits
        return made


class Runtime(Closing):
    """A package that is open for predictions; make it with :meth:`open`, close it after use.

    One that is dropped without that is closed when Python collects it.

    Predictions may come from several threads; they are made one after the other. A process that was
    forked opens the package anew.
    """

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        budget: int | str | None = None,
        skeleton: nn.Module | Backbone | None = None,
        engine: str = "eager",
        prefetch: bool = True,
        direct: bool = True,
        bytes_per_second: int | str | None = None,
        stream: bool = False,
        stickiness: float = STICKINESS,
    ) -> Self:
        """Open a package.

        Args:
            folder: written by :func:`~sigmabranch.deploy.package.pack`.
            budget: bytes for weights, such as ``"42MB"``, those on their way included; everything
                fits if None.
            skeleton: a dense network of the same shape, where this library cannot build it.
            engine: ``"eager"``, which runs anywhere and computes a block as soon as it is there, or
                ``"aoti"``, which computes faster, node by node, once it has compiled each shape of
                node (:mod:`~sigmabranch.deploy.engines.aoti`).
            prefetch: read the likeliest branch while its router is not decided yet; what the
                router then does not choose is read in vain.
            direct: read around the page cache where the file system can.
            bytes_per_second: read no faster than this, such as ``"100MB"``.
            stream: inputs come from one stream, in order: what those before showed changes answers
                and what is read ahead (:mod:`~sigmabranch.deploy.stream`). The groups of classes
                are those of the package's ``class_share``, or each class is one.
            stickiness: probability that the next input is of the same group, in [0, 1).

        Raises:
            CheckpointError: no package, or a damaged one.
            ConfigError: a budget too small to run at all (the message names the least), an
                unknown engine, or one that cannot work here, or a stickiness outside [0, 1).
        """
        rate = None if bytes_per_second is None else float(byte_count(bytes_per_second))
        package = Package(folder)
        filtering = StreamFilter.of(package, stickiness) if stream else None
        made = find_engine(engine)(package.skeleton(skeleton))
        return cls(package, made, budget, prefetch, direct, Throttle(rate), filtering)

    def __init__(
        self,
        package: Package,
        engine: Engine,
        budget: int | str | None,
        prefetch: bool,
        direct: bool,
        throttle: Throttle,
        stream: StreamFilter | None,
    ) -> None:
        super().__init__()
        self.package = package
        self._engine = engine
        self._program = Program(package, whole_nodes=engine.whole_nodes)
        segments = self._program.segments
        everything = sum(segment.bytes for segment in segments)
        self.budget = everything if budget is None else byte_count(budget)
        self._residency = Residency(segments, self.budget, self._program.needs)
        self._stream = stream
        prior: Prior = LeafPrior(package.leaves, package.usage)
        if stream is not None and package.class_share and len(package.leaves) > 1:
            prior = StreamLeaves(package.leaves, stream)
        self._planner = Planner(self._program, prior, self._residency, prefetch=prefetch)
        self._lock = threading.Lock()
        with ExitStack() as closing:
            opened = {}
            for key, node in package.nodes.items():
                opened[key] = NodeFile(package.folder / node.file, direct=direct)
                closing.callback(opened[key].close)
            self._loader = Loader(self._residency, opened, throttle)
            closing.callback(self._residency.forget)
            closing.callback(self._loader.join)
            closing.callback(self._residency.close)
            # So that a runtime which is dropped ends too; nothing here may hold the runtime itself.
            self._closing = weakref.finalize(self, _close, os.getpid(), closing.pop_all())
            self._closing.atexit = False  # a read under way would delay the program's end

    def __call__(self, x: Tensor) -> Tensor:
        """(1, V) logits of one input: the drop-in replacement for the network."""
        return self.predict(x).logits[None]

    def predict(self, x: Tensor) -> Prediction:
        """Run one input; with ``stream=True`` those of a stream in its order.

        Args:
            x: float32 of the package's input shape, with or without a batch axis of one.

        Returns:
            With ``stream=True`` a :class:`StreamPrediction`.

        Raises:
            DataError: an input of another shape or dtype, or with NaN or infinity.
            StorageError: weights could not be read, or are not those that were packed. The runtime
                remains usable: the next input tries again.
            CheckpointError: the package describes what cannot be run.
            NumericError: NaN or infinite logits, or such a router.
            ConfigError: another process opened the runtime.

        What raises leaves the belief about a stream as it was.
        """
        self.check_here()
        x = checked_input(x, self.package.input_shape)
        with self._lock:
            began = time.perf_counter()
            self._residency.read()
            trace = Trace()
            try:
                logits = raw = self._walk(x, trace)
                if self._stream is not None:
                    logits = self._stream.update(checked_logits(raw))
            finally:
                self._planner.bytes_per_second = self._loader.bytes_per_second
                self._planner.ended(trace.leaf or None)
            trace.total_ms = 1e3 * (time.perf_counter() - began)
            self._account(trace)
        if self._stream is not None:
            return StreamPrediction(logits, trace.leaf, trace, raw)
        return Prediction(checked_logits(logits), trace.leaf, trace)

    def reset(self) -> None:
        """Forget what a stream has shown, as at a cut; weights in memory stay.

        Raises:
            ConfigError: the package was not opened with ``stream=True``.
        """
        if self._stream is None:
            raise ConfigError("there is no stream to reset: open the package with stream=True")
        self.check_here()
        with self._lock:
            self._stream.reset()
            self._planner.ended(None)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of weights that were ever in memory or on their way at once."""
        return self._residency.slots.peak

    def forget(self, keep: int | str = 0) -> None:
        """Drop the weights in memory, as if other work had needed it.

        Args:
            keep: bytes of those that run first, which stay if they are there.
        """
        self.check_here()
        with self._lock:
            self._residency.forget(byte_count(keep) if keep else 0)

    def close(self) -> None:
        """End the loader and close the files; a second time does nothing."""
        self._closing()

    def _walk(self, x: Tensor, trace: Trace) -> Tensor:
        """Run the segments of the path in order; each router extends it."""
        route, feature = ["root"], x
        self._planner.known(route)
        for segment in self._program.steps(route):
            out = self._run(segment, feature, trace)
            if self._program.is_router(segment):
                route.append(child(route[-1], checked_branch(out)))
                self._planner.known(route)
            else:
                feature = out
        trace.leaf = route[-1]
        return feature[0].clone()

    def _run(self, segment: Segment, feature: Any, trace: Trace) -> Any:
        with ExitStack() as held:
            tensors: dict[str, Tensor] = {}
            for part in (*self._program.needs.get(segment, ()), segment):
                entry = trace.node(part.node)
                entry.bytes += part.bytes
                with milliseconds(entry, "wait_ms"):
                    tensors |= self._residency.acquire(part)
                held.callback(self._residency.release, part)
            began = time.perf_counter()
            with milliseconds(entry, "compute_ms"):
                out = self._computed(segment, tensors, feature)
            self._planner.ran(segment, time.perf_counter() - began)
            return out

    def _computed(self, segment: Segment, tensors: Mapping[str, Tensor], feature: Any) -> Any:
        try:
            return self._engine.run(segment, tensors, feature)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"node {segment.node} of {self.package.folder} cannot be run: {reason}; if the "
                "package was altered, pack the network again"
            ) from error

    def _account(self, trace: Trace) -> None:
        """What was read since the input came, and what for."""
        read = self._residency.read()
        trace.bytes_read = sum(read.values())
        for entry in trace.nodes:
            for segment in self._program.of(entry.node):
                entry.hit_bytes += segment.bytes if segment not in read else 0
        route = {entry.node for entry in trace.nodes}
        trace.wasted_bytes = sum(n for segment, n in read.items() if segment.node not in route)


def _close(process: int, opened: ExitStack) -> None:
    """Close what a process has opened; a fork, which has no thread to end, leaves it alone."""
    if os.getpid() == process:
        opened.close()
