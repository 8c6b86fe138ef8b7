"""How long one input takes, always beside a reference on the same machine at the same moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sigmabranch.coupling import evaluating

WARMUP, ROUNDS = 5, 40


def latency(model: nn.Module, reference: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Median time of a forward pass at batch 1 on one thread of the CPU, the networks taking turns.

    Weights are in memory: this is the time of arithmetic and overhead, not of streaming.

    Args:
        model: what is timed, on the CPU.
        reference: what it is timed against, on the CPU.
        inputs: (N, ...), one for each turn, round and round.

    Returns:
        ``ms``, ``reference_ms`` and their ``ratio``, medians of :data:`ROUNDS` turns.
    """
    times: dict[str, list[float]] = {"ms": [], "reference_ms": []}
    runs: dict[str, Callable[[Tensor], Any]] = {"ms": model, "reference_ms": reference}
    with _one_thread(), torch.no_grad(), evaluating(model, reference):
        for turn in range(WARMUP + ROUNDS):
            x = inputs[turn % len(inputs)][None]
            for name, run in runs.items():
                began = time.perf_counter()
                run(x)
                if turn >= WARMUP:
                    times[name].append(1e3 * (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["ms"] / medians["reference_ms"]}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several wait for each other; on a machine that others use too, for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
