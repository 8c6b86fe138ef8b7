"""One row of a comparison: a trained network under the one yardstick that all share."""

from __future__ import annotations

from typing import Any

import torch

from sigmabranch.measure import (
    Dynamic,
    cost,
    evaluate_dense,
    evaluate_dynamic,
    latency,
)
from sigmabranch.net import SigmaBranchNet
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.system import System, Trained
from sigmabranch.tasks.chain import ordered


def measure_row(system: System, trained: Trained, bench: Bench) -> dict[str, Any]:
    """Cost, accuracy and latency of what ``system`` made on ``bench``.

    Returns:
        JSON-able. ``system`` (name and settings); ``epochs``, ``recipe`` (None without training),
        ``mark``; ``cost`` as :func:`~sigmabranch.measure.cost` gives it, with the test split's mean
        in ``active_params`` and ``macs`` where they depend on the input, and ``active_params_max``
        and ``macs_max``; ``active_bytes`` (``mean``, ``max``) as stored; ``accuracy`` on the test
        split, and ``held_out``, that on the held-out one where there is one; ``latency`` at batch 1
        on the CPU against the source network; ``notes``.
    """
    accuracy = _accuracy(trained, bench, "test")
    held_out = bench.chain.dataset.held_out is not None
    counted = _cost(trained, bench, accuracy)
    net = counted["net"]
    return {
        "system": system.to_dict(),
        "epochs": trained.epochs,
        "recipe": None if trained.recipe is None else trained.recipe.to_dict(),
        "mark": trained.mark,
        "cost": counted,
        "active_bytes": {
            "mean": trained.bytes_per_param * net["active_params"],
            "max": trained.bytes_per_param * net["active_params_max"],
        },
        "accuracy": accuracy,
        **({"held_out": _accuracy(trained, bench, "held-out")} if held_out else {}),
        "latency": _latency(trained, bench),
        "notes": dict(trained.notes),
    }


def _accuracy(trained: Trained, bench: Bench, split: str) -> dict[str, Any]:
    if trained.accuracy is not None:
        return dict(trained.accuracy[split])
    network, chain = trained.network.to(bench.device), bench.chain
    if isinstance(network, SigmaBranchNet):
        return chain.accuracy(network, split)
    batches, shards = ordered(chain.dataset.measured(split)), chain.engine.shards
    if isinstance(network, Dynamic):
        return evaluate_dynamic(network, batches, shards=shards)
    return evaluate_dense(network, batches, shards=shards)


def _cost(trained: Trained, bench: Bench, accuracy: dict[str, Any]) -> dict[str, Any]:
    """Counted, then with the loads that the test split was measured to have."""
    network = (trained.network if trained.counted is None else trained.counted).cpu()
    dense = bench.task.model.build().eval()
    counted = cost(network, bench.example(), dense=dense)
    net = counted["net"]
    for name in ("active_params", "macs"):
        measured = accuracy.get(name, {"mean": net[name], "max": net[name]})
        net[name], net[f"{name}_max"] = measured["mean"], measured["max"]
    reference = {"active_params": counted["dense"]["params"], "macs": counted["dense"]["macs"]}
    counted["reduction_percent"] = {
        name: 100 * (1 - net[name] / value) for name, value in reference.items()
    }
    return counted


def _latency(trained: Trained, bench: Bench) -> dict[str, float]:
    images, *_ = next(iter(ordered(bench.chain.dataset.test)))
    reference = bench.task.model.build()
    with torch.no_grad():
        return latency(trained.network.cpu(), reference, images.cpu())
