"""Claim: a fine-tuning step on all paths costs little more than a step of the dense network.

A step is loss and gradients on one batch, with the task's own losses and shapes; the optimizer is
left out. The time ratio stands beside the ratio of multiply-adds, which it would equal if time went
into convolutions alone. Norms and activations grow more: n specializers of width/√n hold √n times
the dense stage's features. Weights are meaningless: time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.harness import interleaved, parser, publish
from benchmarks.inputs import batch
from torch import nn

from sigmabranch.conversion import blueprint
from sigmabranch.measure import cost
from sigmabranch.tasks import Task, find_task
from sigmabranch.tasks.counting import example
from sigmabranch.training import BranchedObjective, DenseObjective, Objective


def step(
    model: nn.Module, objective: Objective, precision: str, size: int, task: Task
) -> Callable[[], None]:
    """One forward and backward pass, to be called again and again."""
    device = next(model.parameters()).device
    x, y = batch(task, size, device)
    half = device.type == "cuda" and precision == "bf16"
    entry = getattr(model, objective.entry)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = objective(entry, x, y, 0.0).loss
        loss.backward()

    return run


def main() -> None:
    options = parser(__doc__, "soft_step", rounds=15)
    options.add_argument("--task", default="cifar100-small")
    options.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    options = options.parse_args()
    task = find_task(options.task)
    dense = task.model.build()
    net = blueprint(dense, example(task), task.tree)
    counted = cost(net, example(task), dense=dense)
    macs_ratio = counted["net"]["soft_macs"] / counted["dense"]["macs"]
    dense, net = (model.to(options.device).train() for model in (dense, net))
    precision = task.finetune.precision
    rows = []
    for size in options.batch:
        timings = interleaved(
            {
                "dense": step(dense, DenseObjective(task.dense), precision, size, task),
                "soft": step(net, BranchedObjective(task.finetune), precision, size, task),
            },
            options.rounds,
        )
        rows.append(
            {
                "batch": size,
                "dense_ms": 1e3 * timings.median("dense"),
                "soft_ms": 1e3 * timings.median("soft"),
                "time_ratio": timings.ratio("soft", to="dense"),
                "macs_ratio": macs_ratio,
            }
        )
    publish(options, rows)


if __name__ == "__main__":
    main()
