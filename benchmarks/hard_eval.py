"""Claim: evaluating one path per input in batches costs less than the dense network.

A batch is split among the branches by index, so each leaf works on its share; at batch 1 a single
path runs. Beside it: every node once (soft), and the ratio of multiply-adds on one path. The tree
is converted from an untrained network with balanced clusters, so that all leaves have work to do.
"""

from __future__ import annotations

import torch
from benchmarks.harness import interleaved, parser, publish
from benchmarks.inputs import batch, synthetic

from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.measure import cost
from sigmabranch.measure.routes import balance
from sigmabranch.tasks import find_task, ordered
from sigmabranch.tasks.counting import example


def main() -> None:
    options = parser(__doc__, "hard_eval", rounds=15)
    options.add_argument("--task", default="cifar100-small")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    options.add_argument("--samples", type=int, default=512, help="calibration images")
    options = options.parse_args()
    task, device = find_task(options.task), options.device
    torch.manual_seed(0)
    dense = task.model.build().to(device).eval()
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=options.samples)
    net = convert(dense, ordered(synthetic(task, options.samples, device)), task.tree, spec=spec)
    counted = cost(net, example(task), dense=dense)
    macs_ratio = counted["net"]["macs"] / counted["dense"]["macs"]
    rows = []
    for size in options.batch:
        x, _ = batch(task, size, device)
        with torch.inference_mode():
            timings = interleaved(
                {
                    "dense": lambda x=x: dense(x),
                    "hard": lambda x=x: net.hard(x),
                    "soft": lambda x=x: net.soft(x),
                },
                options.rounds,
            )
            usage = torch.bincount(net.hard(x).leaf, minlength=len(net.tree.leaves))
        rows.append(
            {
                "batch": size,
                "dense_ms": 1e3 * timings.median("dense"),
                "hard_ms": 1e3 * timings.median("hard"),
                "soft_ms": 1e3 * timings.median("soft"),
                "hard_ratio": timings.ratio("hard", to="dense"),
                "soft_ratio": timings.ratio("soft", to="dense"),
                "macs_ratio": macs_ratio,
                "balance": balance(usage),
            }
        )
    publish(options, rows)


if __name__ == "__main__":
    main()
