"""Claim: many threads or processes on one package get right answers, and memory does not grow.

A small network with random weights is packed, and written as ONNX nodes. Six threads of one process
then share a runtime, or three processes open the folder each by itself; every answer is compared
with the network's own. Growth is what a process's memory gains after a tenth as many predictions to
warm up, the most of all processes. The engine aoti is left out where there is no C++ compiler, and
by ``--quick``.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmarks.harness import parser, publish_parts
from torch import Tensor

from sigmabranch.conversion import blueprint
from sigmabranch.deploy import Runtime, pack
from sigmabranch.deploy.export import export_net
from sigmabranch.net import SigmaBranchNet
from sigmabranch.tasks import find_task
from sigmabranch.tasks.counting import example
from sigmabranch.tree import node_key

SETTINGS = (
    "model.layers=[1,1,1]",
    "model.planes=[4,8,16]",
    "model.strides=[1,2,1]",
    "model.stem_width=8",
)
ONNX = "onnx"
INPUTS = 64
#: Processes, and threads in each.
WAYS = ((1, 6), (3, 1))


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked, and the right answers.

    Shapes: N inputs, V classes.
    """

    folder: Path
    engine: str
    x_N: Tensor
    logits_NV: Tensor
    leaves: Sequence[str]

    def opened(self) -> Any:
        """What predicts."""
        if self.engine == ONNX:
            from sigmabranch.deploy.onnx_path import OnnxPath  # noqa: PLC0415 (loads ONNX Runtime)

            return OnnxPath(self.folder)
        return Runtime.open(self.folder, engine=self.engine)

    def wrong(self, runtime: Any, start: int, count: int) -> int:
        """How many of so many answers differ from the network's."""
        return sum(not self._is_right(runtime, number) for number in range(start, start + count))

    def _is_right(self, runtime: Any, number: int) -> bool:
        number %= INPUTS
        logits, leaf, _ = runtime.predict(self.x_N[number])
        expected = self.logits_NV[number]
        return leaf == self.leaves[number] and torch.allclose(logits, expected, 1e-3, 1e-4)


def network() -> tuple[SigmaBranchNet, Tensor]:
    """A branched network with random weights, and inputs for it."""
    torch.manual_seed(0)
    task = find_task("digits-resnet").with_settings(SETTINGS)
    net = blueprint(task.model.build(), example(task), task.tree).eval()
    for name, value in net.state_dict().items():
        if value.ndim > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif value.is_floating_point() and name.endswith(("bias", "running_mean")):
            value.normal_(0, 0.1)
        elif value.is_floating_point():
            value.uniform_(0.5, 1.5)
    # Of different brightness, so that they take different leaves.
    x = torch.randn(INPUTS, *example(task).shape[1:]) + 3 * torch.randn(INPUTS, 1, 1, 1)
    return net, x


def serve(case: Case, threads: int, count: int) -> tuple[int, int]:
    """Wrong answers among ``count`` a thread, and the bytes that this process has grown by."""
    torch.set_num_threads(1)
    with case.opened() as runtime, ThreadPoolExecutor(threads) as pool:

        def ask(each: int) -> int:
            starts = range(0, threads * each, each)
            return sum(pool.map(lambda start: case.wrong(runtime, start, each), starts))

        wrong = ask(-(-count // 10))
        before = resident()
        wrong += ask(count)
        return wrong, resident() - before


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    return psutil.Process().memory_info().rss


def measured(case: Case, count: int) -> Iterator[dict[str, Any]]:
    """One row a way of asking."""
    for processes, threads in WAYS:
        share = partial(serve, case, threads)
        each = -(-count // (processes * threads))  # of a thread
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            found = [*pool.map(share, [each] * processes)]
        yield {
            "engine": case.engine,
            "processes": processes,
            "threads": threads,
            "leaves": len({*case.leaves}),
            "predictions": each * threads * processes,
            "wrong": sum(wrong for wrong, _ in found),
            "growth_mb": max(grown for _, grown in found) / 1e6,
        }


def main() -> None:
    options = parser(__doc__, "serving")
    options.add_argument("--predictions", type=int, metavar="N", help="10,000; 600 with --quick")
    options.add_argument("--engine", action="append", choices=("eager", ONNX, "aoti"))
    options.add_argument("--quick", action="store_true", help="few predictions, nothing compiled")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    given = options.parse_args()
    given.predictions = given.predictions or (600 if given.quick else 10_000)
    compiles = shutil.which(os.environ.get("CXX", "g++")) is not None and not given.quick
    engines = given.engine or ["eager", ONNX, *(["aoti"] if compiles else [])]
    net, x = network()
    with torch.no_grad(), tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"  # of compiled bodies
        hard = net.hard(x)
        leaves = [node_key(net.tree.leaves[leaf]) for leaf in hard.leaf]
        package, nodes = Path(name, "package"), Path(name, "nodes")
        pack(net, package, x[:1])
        if ONNX in engines:
            export_net(net, nodes, x[:2], format="onnx-nodes")
        rows = []
        for engine in engines:
            folder = nodes if engine == ONNX else package
            case = Case(folder, engine, x, hard.logits, leaves)
            rows += measured(case, given.predictions)
    publish_parts(given, {"rows": rows})


if __name__ == "__main__":
    main()
