"""Claim: a hard-routed training step costs what one path costs, not what all leaves cost.

A step is loss and gradients on one batch, as in ``soft_step``. Each system lives in a process of
its own, so that two builds can run side by side: with ``--base`` the dense and the soft step are
those of another checkout (``git worktree add ../base COMMIT``). They take turns, a step each. The
leaves are used evenly. Peak memory is what one step adds to a process that has made none.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from benchmarks.inputs import batch

from sigmabranch.conversion import blueprint
from sigmabranch.net import SigmaBranchNet
from sigmabranch.tasks import find_task
from sigmabranch.tasks.counting import example
from sigmabranch.training import BranchedObjective, DenseObjective

HERE = Path(__file__).resolve().parents[1]
SYSTEMS = ("dense", "soft", "routed")


class Worker:
    """One system in a process of its own; a line to it makes it take one step."""

    def __init__(self, system: str, build: Path, options: argparse.Namespace) -> None:
        path = os.pathsep.join([str(build / "src"), str(HERE)])
        command = [sys.executable, "-m", "benchmarks.routed_step", "--worker", system]
        command += ["--task", options.task, "--batch", str(options.batch)]
        command += ["--threads", str(options.threads)]
        self._process = subprocess.Popen(
            command,
            cwd=HERE,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.peak = self._read()

    def step(self) -> float:
        """Seconds of one step."""
        assert self._process.stdin is not None
        print("step", file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _read(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self._process.wait()}")
        return float(line)


def serve(options: argparse.Namespace) -> None:
    """Be a worker: print the bytes of the first step, then the seconds of each one asked for."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    task = find_task(options.task)
    model = task.model.build()
    objective = DenseObjective(task.dense)
    if options.worker != "dense":
        model = blueprint(model, example(task), task.tree)
        objective = BranchedObjective(task.finetune)
    model.to(memory_format=torch.channels_last).train()
    x, y = batch(task, options.batch, torch.device("cpu"))
    x = x.contiguous(memory_format=torch.channels_last)
    if options.worker == "routed":
        from sigmabranch.training import RoutedObjective  # noqa: PLC0415 - the base has none

        use_evenly(model, x)
        objective = RoutedObjective(task.finetune, None, len(task.tree.leaves))
        objective.turn.prepare(model, done=True)
    entry = getattr(model, objective.entry)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        objective(entry, x, y, 0.0).loss.backward()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)


@torch.no_grad()
def use_evenly(net: SigmaBranchNet, x: torch.Tensor) -> None:
    """Random routers, shifted so that every branch gets its part of ``x``."""
    from sigmabranch.training.routers import even_bias, scores  # noqa: PLC0415 - likewise

    arrived = {(): net.trunk(x)}
    for node in net.tree.inner:
        router, children = net.router(node).eval(), net.tree.children(node)
        router.gate.reset_parameters()
        pooled = router.projection[0](arrived[node])
        even = torch.full((len(children),), 1 / len(children))
        router.gate.bias += even_bias(scores(router, pooled), even)
        branch = scores(router, pooled).argmax(1)
        for child in children:
            arrived[child] = net.specializer(child)(arrived[node][branch == child[-1]])


def main() -> None:
    from benchmarks.harness import parser, publish  # noqa: PLC0415 - not for workers of the base

    options = parser(__doc__, "routed_step", rounds=25)
    options.add_argument("--task", default="cifar100-small")
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--base", type=Path, help="checkout of the build to compare with")
    options.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.worker:
        serve(options)
        return
    builds = {name: options.base or HERE for name in SYSTEMS} | {"routed": HERE}
    workers = {name: Worker(name, build.resolve(), options) for name, build in builds.items()}
    seconds = {name: [] for name in SYSTEMS}
    for number in range(options.rounds + 2):
        for name, worker in workers.items():
            taken = worker.step()
            if number >= 2:
                seconds[name].append(taken)
    for worker in workers.values():
        worker.close()

    def ratio(name: str, to: str) -> float:
        pairs = zip(seconds[name], seconds[to], strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    publish(
        options,
        [
            {
                "system": name,
                "build": "base" if options.base and name != "routed" else "this",
                "ms": 1e3 * statistics.median(seconds[name]),
                "to_dense": ratio(name, "dense"),
                "to_soft": ratio(name, "soft"),
                "peak_mb": workers[name].peak / 2**20,
            }
            for name in SYSTEMS
        ],
    )


if __name__ == "__main__":
    main()
