"""Claim: a filtered prior is worth points on streams, to trees and paths alike.

A stream shows one group of classes for a while (the classes that mostly take one leaf of the tree;
runs of geometric length), each input drawn from the held-out samples of a class of the group; the
shuffled stream holds the same inputs in random order. A tree is packed, and a single path of its
widths without routers, which is told the tree's groups; both are read over slow storage within one
budget, which holds a path of the tree and a fifth more.

streams   accuracy, bytes and milliseconds an input, without and with the filter
routing   accuracy if the filter's leaves had a say in the routing as well: w times log p(leaf) is
          added to the routers' log-probability of each leaf

    python -m benchmarks.stream                                     digits under noise; a minute
    python -m benchmarks.stream --folder runs/compare/seed0 --data data/cifar100 --noise 0

``--folder`` is that of ``sigmabranch run TASK --control single-path`` or of one seed of
``sigmabranch compare``; what it holds is not trained again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import parser, publish_parts
from torch import Tensor, nn

from sigmabranch.deploy import Package, Runtime, StreamFilter, pack
from sigmabranch.deploy.stream import STICKINESS
from sigmabranch.deploy.stream_leaves import StreamLeaves
from sigmabranch.files import read_json
from sigmabranch.measure import evaluate
from sigmabranch.net import SigmaBranchNet
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.catalog import find_system
from sigmabranch.tasks import Chain, Task, find_task, ordered

TREE, PATH = "tree", "single path"
CALIBRATION = 5000  # training samples that say which leaf each class takes
ROOM = 1.2  # times the longest path of the tree
WEIGHTS = (0.0, 0.25, 0.5, 1.0)
# Leaves that are groups of classes, after so few epochs that noisy digits are hard.
SMALL = (
    "conversion.clusters=classes", "conversion.samples=512", "finetune.class_target=true",
    "finetune.resp_prior=false", "finetune.resp_weight=1", "dense.epochs=6", "finetune.epochs=4",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class System:
    """A package, and what a runtime needs to open it."""

    name: str
    package: Package
    model: nn.Module
    budget: int

    def open(self, **options: Any) -> Runtime:
        skeleton = None if isinstance(self.model, SigmaBranchNet) else self.model
        return Runtime.open(self.package.folder, skeleton=skeleton, budget=self.budget, **options)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Inputs in an order: (N, ...) float32, and their labels."""

    order: str
    x: Tensor
    y: Tensor


def main() -> None:
    options = parser(__doc__, "stream")
    options.add_argument("--folder", type=Path, help="of trained networks; trains digits without")
    options.add_argument("--data", type=Path, help="folder of the data set, if it is not embedded")
    options.add_argument("--inputs", type=int, default=500, help="of a stream")
    options.add_argument("--run", type=float, default=30.0, help="inputs in a row from one group")
    options.add_argument("--stickiness", type=float, default=STICKINESS)
    options.add_argument("--noise", type=float, default=0.5, help="added to normalised inputs")
    options.add_argument("--bandwidth", default="50MB", help="of the storage, a second")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        chain = opened(options.folder or work / "networks", options.data)
        systems = packed(chain, work)
        share_VL = torch.tensor(systems[0].package.class_share)
        streams = both_orders(chain, share_VL, options.inputs, options.run, options.noise)
        parts = {
            "streams": list(measured(systems, streams, options.stickiness, options.bandwidth)),
            "routing": list(routed(systems[0], streams, options.stickiness)),
        }
    publish_parts(options, parts)


def opened(folder: Path, data: Path | None) -> Chain:
    """The networks of a folder, or digits that are to be trained into it."""
    described = folder / "task.json"
    if not described.exists():
        task = find_task("digits-resnet").with_settings(SMALL)
        return Chain(task, folder, device="cpu")
    notes = read_json(described)
    return Chain(Task.from_dict(notes["task"]), folder, data=data, seed=notes["seed"], device="cpu")


def packed(chain: Chain, work: Path) -> list[System]:
    """The tree and the single path, with the tree's groups of classes."""
    tree, row = chain.branched(), chain.folder / "rows" / "single-path"
    path = find_system("single-path").run(Bench(chain=chain, folder=row)).network
    calibration = chain.dataset.limit(train=CALIBRATION).train
    share = evaluate(tree, ordered(calibration))["class_leaf_share"]
    example = next(iter(chain.dataset.test.batches(torch.tensor([0]), 1)))[0]
    models: Mapping[str, nn.Module] = {TREE: tree, PATH: path}
    packages = {
        name: pack(model, work / name, example, class_share=share) for name, model in models.items()
    }
    paths = [packages[TREE].path_bytes(leaf) for leaf in packages[TREE].leaves]
    budget = int(ROOM * max(paths))
    return [
        System(name=name, package=packages[name], model=models[name], budget=budget)
        for name in models
    ]


def both_orders(
    chain: Chain, share_VL: Tensor, inputs: int, run: float, noise: float
) -> list[Stream]:
    """Samples in runs of one group of classes, and the same ones shuffled."""
    draw = torch.Generator().manual_seed(chain.seed)
    test = chain.dataset.test
    group_V = share_VL.argmax(1)
    index = in_runs(test.labels.cpu(), group_V, inputs, run, draw)
    x, y = next(iter(test.batches(index, inputs)))
    x = x + noise * torch.randn(x.shape, generator=draw)
    order = torch.randperm(inputs, generator=draw)
    return [
        Stream(order="in runs", x=x, y=y),
        Stream(order="shuffled", x=x[order], y=y[order]),
    ]


def in_runs(
    labels_N: Tensor, group_V: Tensor, inputs: int, run: float, draw: torch.Generator
) -> Tensor:
    """Positions of samples: runs of geometric length, groups as often as they have classes."""
    chosen: list[int] = []
    group = -1
    for _ in range(inputs):
        if group < 0 or torch.rand((), generator=draw) < 1 / run:
            group = int(group_V[torch.randint(len(group_V), (), generator=draw)])
        classes = (group_V == group).nonzero().flatten()
        wanted = classes[torch.randint(len(classes), (), generator=draw)]
        samples = (labels_N == wanted).nonzero().flatten()
        chosen.append(int(samples[torch.randint(len(samples), (), generator=draw)]))
    return torch.tensor(chosen)


def measured(
    systems: Sequence[System], streams: Sequence[Stream], stickiness: float, bandwidth: str
) -> Iterator[dict[str, Any]]:
    """What each system answers and reads, with and without the filter."""
    for stream in streams:
        for system in systems:
            for filtered in (False, True):
                options = {"stream": filtered, "stickiness": stickiness}
                with system.open(bytes_per_second=bandwidth, **options) as runtime:
                    found = [runtime.predict(x) for x in stream.x]
                answers = torch.stack([one.logits for one in found]).argmax(1)
                traces = [one.trace for one in found]
                yield {
                    "order": stream.order,
                    "system": system.name,
                    "filter": filtered,
                    "top1": 100 * (answers == stream.y).double().mean().item(),
                    "kb_read": sum(trace.bytes_read for trace in traces) / len(traces) / 1e3,
                    "kb_wasted": sum(trace.wasted_bytes for trace in traces) / len(traces) / 1e3,
                    "wait_ms": sum(trace.wait_ms for trace in traces) / len(traces),
                    "compute_ms": sum(trace.compute_ms for trace in traces) / len(traces),
                }


def routed(
    system: System, streams: Sequence[Stream], stickiness: float
) -> Iterator[dict[str, Any]]:
    """The tree's accuracy if what is expected of the stream had a say in the routing."""
    assert isinstance(system.model, SigmaBranchNet)
    for stream in streams:
        with torch.no_grad():
            soft = system.model.soft(stream.x)
        logits_NLV = soft.logits
        for weight in WEIGHTS:
            belief = StreamFilter.of(system.package, stickiness)
            leaves = StreamLeaves(system.package.leaves, belief)
            right = raw_right = changed = 0
            for log_prob_L, logits_LV, y in zip(soft.log_prob, logits_NLV, stream.y, strict=True):
                nodes = leaves.nodes()
                expected_L = torch.tensor([nodes[leaf] for leaf in system.package.leaves])
                leaf = int((log_prob_L + weight * expected_L.log()).argmax())
                changed += leaf != int(log_prob_L.argmax())
                raw_right += int(logits_LV[leaf].argmax() == y)
                right += int(belief.update(logits_LV[leaf]).argmax() == y)
            count = len(stream.y)
            yield {
                "order": stream.order,
                "prior_weight": weight,
                "routes_changed": 100 * changed / count,
                "top1_raw": 100 * raw_right / count,
                "top1_filtered": 100 * right / count,
            }


if __name__ == "__main__":
    main()
