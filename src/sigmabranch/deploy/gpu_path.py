"""One path on a GPU whose memory need not hold it: weights come over the bus, ahead of their use.

Weights wait in page-locked memory of the host. Every stretch of a path has a fixed place on the
GPU, the same for siblings, so that computing it is a CUDA graph that is recorded once. Places that
do not fit beside each other overlap; a copy then waits for what was computed there before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import filterfalse
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sigmabranch.backbones import Backbone
from sigmabranch.deploy.checks import checked_input, checked_logits
from sigmabranch.deploy.engines import EagerEngine
from sigmabranch.deploy.package import Package, ancestry, child
from sigmabranch.deploy.program import Program
from sigmabranch.deploy.segment import Segment
from sigmabranch.errors import ConfigError
from sigmabranch.sizes import byte_count
from sigmabranch.tree import is_shared

# What cuDNN and cuBLAS want their operands to begin at.
_ALIGN = 256
# cuDNN tries its kernels at the first run and allocates at the second.
_WARM_UP_RUNS = 3
_DIFFERENT = "nodes of one level differ in shape or number of branches: use the Runtime"

Layout: TypeAlias = Mapping[str, tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]]


class Place(NamedTuple):
    """Where a stretch lies in a ring of memory.

    Attributes:
        offset: in bytes.
        after: the last stretch before it, or, if there is none, the last of the input before, whose
            memory it takes; None if its memory is its own.
    """

    offset: int
    after: int | None


def ring(sizes: Sequence[int], room: int) -> list[Place]:
    """Places for stretches that are filled and used in this order, again and again.

    Args:
        sizes: in bytes.
        room: bytes of the ring; at least the largest size.
    """
    begins, position = [], 0
    for size in sizes:
        position = 0 if position + size > room else position
        begins.append(position)
        position += size
    spans = [(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]
    places = []
    for number, (begin, end) in enumerate(spans):
        shared = [
            other
            for other, (start, stop) in enumerate(spans)
            if start < end and begin < stop and other != number
        ]
        before = [other for other in shared if other < number]
        last = max(before or shared, default=None)
        places.append(Place(begin, last))
    return places


def siblings_in_order(package: Package, program: Program) -> list[dict[str, Segment]]:
    """The stretches of a path in order, each by the node that it may belong to.

    Raises:
        ConfigError: leaves at several levels, or nodes of one level with different stretches.
    """
    by_depth: dict[int, list[str]] = {}
    for key in filterfalse(is_shared, package.nodes):
        by_depth.setdefault(len(ancestry(key)), []).append(key)
    for keys in by_depth.values():
        if len({tuple(map(program.is_router, program.of(key))) for key in keys}) > 1:
            raise ConfigError(_DIFFERENT)
    levels = []
    for segment in list(program.steps(list(ancestry(package.leaves[0])))):
        place = program.of(segment.node).index(segment)
        nodes = by_depth[len(ancestry(segment.node))]
        levels.append({key: program.of(key)[place] for key in nodes})
    return levels


class GpuPrediction(NamedTuple):
    """What the network says about one input.

    Attributes:
        logits: (V,) float32, on the CPU.
        leaf: key of the leaf that said it; ``"root"`` of a dense network.
        copied_bytes: weights that came over the bus.
        total_ms: from the input on the CPU to the logits on the CPU.
    """

    logits: Tensor
    leaf: str
    copied_bytes: int
    total_ms: float


class GpuPath:
    """A package that is open for predictions on a GPU.

    Args:
        folder: written by :func:`~sigmabranch.deploy.package.pack`.
        budget: bytes of GPU memory for weights, such as ``"300MB"``; a whole path if None.
        resident: bytes of them for weights that stay: those of the trunk that run first.
        dtype: of weights and features; routers compute in float32, and a decision that nearly ties
            may differ from the CPU's.
        skeleton: a dense network of the same shape, where this library cannot build it.

    Attributes:
        package: what is run.
        budget: bytes of GPU memory that weights take.

    Raises:
        CheckpointError: no package, or a damaged one.
        ConfigError: no GPU, a budget too small to run at all (the message names the least), or
            nodes of one level that differ in shape.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        budget: int | str | None = None,
        resident: int | str = 0,
        dtype: torch.dtype = torch.bfloat16,
        skeleton: nn.Module | Backbone | None = None,
    ) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("no GPU is there: use the Runtime, which needs none")
        self.package = Package(folder)
        self._program = Program(self.package)
        self._engine = EagerEngine(self.package.skeleton(skeleton))
        self._dtype = dtype
        self._levels = siblings_in_order(self.package, self._program)
        self._layouts: list[Layout] = []
        self._hosts: dict[Segment, Tensor] = {}
        self._load()
        self._sizes = [_length(layout) for layout in self._layouts]
        stays = byte_count(resident) if resident else 0
        self._resident = self._count_within(stays)
        self._copies, self._computing = torch.cuda.Stream(), torch.cuda.Stream()
        self._arrived = [torch.cuda.Event() for _ in self._sizes]
        self._done = [torch.cuda.Event() for _ in self._sizes]
        self._memory, self._after = self._placed(None if budget is None else byte_count(budget))
        self._input = torch.zeros(1, *self.package.input_shape, dtype=dtype, device="cuda")
        if self._input.ndim == 4:
            self._input = self._input.contiguous(memory_format=torch.channels_last)
        self._record()

    @torch.inference_mode()
    def predict(self, x: Tensor) -> GpuPrediction:
        """Run one input.

        Args:
            x: float32 of the package's input shape, with or without a batch axis of one.

        Raises:
            DataError: an input of another shape or dtype, or with NaN or infinity.
            NumericError: NaN or infinite logits.
        """
        x = checked_input(x, self.package.input_shape, ("cpu", "cuda"))
        began = time.perf_counter()
        route, copied, copied_bytes = ["root"], self._resident, 0
        with torch.cuda.stream(self._computing):
            self._input.copy_(x, non_blocking=True)
        for number, siblings in enumerate(self._levels):
            while self._may_copy(copied, number, route):
                segment = self._levels[copied][route[_depth(self._levels[copied])]]
                copied_bytes += self._copy(copied, segment)
                copied += 1
            with torch.cuda.stream(self._computing):
                if number >= self._resident:
                    self._computing.wait_event(self._arrived[number])
                self._graphs[number].replay()
                self._done[number].record(self._computing)
                if self._program.is_router(siblings[route[_depth(siblings)]]):
                    route.append(child(route[-1], int(self._outputs[number])))
        with torch.cuda.stream(self._computing):
            logits = self._outputs[-1][0].float().cpu()
        total_ms = 1e3 * (time.perf_counter() - began)
        return GpuPrediction(checked_logits(logits), route[-1], copied_bytes, total_ms)

    def _load(self) -> None:
        """Bring all weights into page-locked memory, as they will lie on the GPU."""
        contents = {
            key: memoryview(bytearray((self.package.folder / node.file).read_bytes()))
            for key, node in self.package.nodes.items()
        }
        for siblings in self._levels:
            layouts = []
            for segment in siblings.values():
                is_router = self._program.is_router(segment)
                dtype = torch.float32 if is_router else self._dtype
                tensors = {
                    name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                    for name, tensor in self._stored(segment, contents).items()
                }
                layouts.append(_layout(tensors))
                host = torch.empty(_length(layouts[-1]), dtype=torch.uint8, pin_memory=True)
                for name, view in _views(host, layouts[-1]).items():
                    view.copy_(tensors[name])
                self._hosts[segment] = host
            if any(layout != layouts[0] for layout in layouts):
                raise ConfigError(_DIFFERENT)
            self._layouts.append(layouts[0])

    def _stored(self, segment: Segment, contents: Mapping[str, memoryview]) -> dict[str, Tensor]:
        """A stretch's tensors, with what it shares with its siblings beside them."""
        tensors: dict[str, Tensor] = {}
        for part in (*self._program.needs.get(segment, ()), segment):
            memory = contents[part.node][part.offset : part.offset + part.bytes]
            tensors |= part.tensors(memory)
        return tensors

    def _count_within(self, stays: int) -> int:
        """How many of the trunk's first stretches fit into ``stays`` bytes."""
        total = 0
        for number, (size, siblings) in enumerate(zip(self._sizes, self._levels, strict=True)):
            total += size
            if total > stays or "root" not in siblings:
                return number
        return len(self._sizes)

    def _placed(self, budget: int | None) -> tuple[list[Tensor], list[int | None]]:
        """Memory of each stretch, and what must have run before it is filled."""
        kept = sum(self._sizes[: self._resident])
        moving = self._sizes[self._resident :]
        least = kept + max(moving, default=0)
        self.budget = sum(self._sizes) if budget is None else min(budget, sum(self._sizes))
        if self.budget < least:
            raise ConfigError(f"a budget of {budget} bytes is too small: at least {least}")
        arena = torch.empty(self.budget, dtype=torch.uint8, device="cuda")
        places = [Place(sum(self._sizes[:number]), None) for number in range(self._resident)]
        places += [
            Place(
                kept + place.offset, None if place.after is None else place.after + self._resident
            )
            for place in ring(moving, self.budget - kept)
        ]
        memory = [
            arena[place.offset : place.offset + size]
            for place, size in zip(places, self._sizes, strict=True)
        ]
        for number in range(self._resident):
            memory[number].copy_(self._hosts[self._levels[number]["root"]])
        return memory, [place.after for place in places]

    def _record(self) -> None:
        """Record what computes each stretch."""
        self._graphs, self._outputs = [], []
        pool = torch.cuda.graph_pool_handle()
        feature: Any = self._input
        for number, siblings in enumerate(self._levels):
            segment = next(iter(siblings.values()))
            step = self._step(segment, _views(self._memory[number], self._layouts[number]))
            torch.cuda.synchronize()
            with torch.cuda.stream(self._computing):
                for _ in range(_WARM_UP_RUNS):
                    step(feature)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._computing):
                out = step(feature)
            self._graphs.append(graph)
            self._outputs.append(out)
            if not self._program.is_router(segment):
                feature = out

    def _step(self, segment: Segment, tensors: Mapping[str, Tensor]) -> Any:
        if not self._program.is_router(segment):
            return lambda feature: self._engine.run(segment, tensors, feature)

        @torch.inference_mode()
        def decide(feature: Any) -> Tensor:
            wide = tree_map(lambda value: value.float(), feature)
            return self._engine.run(segment, tensors, wide).argmax()

        return decide

    def _may_copy(self, number: int, running: int, route: Sequence[str]) -> bool:
        """Whether it is known what comes there, and the one before has been told to run."""
        if number == len(self._levels) or _depth(self._levels[number]) >= len(route):
            return False
        after = self._after[number]
        return after is None or after < running or after > number

    def _copy(self, number: int, segment: Segment) -> int:
        after = self._after[number]
        with torch.cuda.stream(self._copies):
            # What ran here for the input before must be over even where nothing else shares it.
            self._copies.wait_event(self._done[number])
            if after is not None:
                self._copies.wait_event(self._done[after])
            self._memory[number].copy_(self._hosts[segment], non_blocking=True)
            self._arrived[number].record(self._copies)
        return self._sizes[number]


def _depth(siblings: Mapping[str, Segment]) -> int:
    return len(ancestry(next(iter(siblings)))) - 1


def _layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Tensors one after the other, each as it is strided."""
    layout, offset = {}, 0
    for name, tensor in tensors.items():
        layout[name] = (tensor.dtype, offset, tuple(tensor.shape), tensor.stride())
        offset += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
    return layout


def _length(layout: Layout) -> int:
    dtype, offset, shape, _ = list(layout.values())[-1]
    return offset + -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGN) * _ALIGN


def _views(memory: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors in a stretch of memory, without a copy."""

    def views() -> Iterator[tuple[str, Tensor]]:
        for name, (dtype, offset, shape, stride) in layout.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            flat = memory[offset : offset + size].view(dtype)
            yield name, flat.as_strided(shape, stride)

    return dict(views())
