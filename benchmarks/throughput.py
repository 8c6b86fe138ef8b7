"""Claim: the training loop costs about what the usual one does, and its data path far less.

One epoch of dense training: this library's loop with data and augmentation on the device, and the
loop that most scripts hold: a DataLoader that augments sample by sample, the same network, loss and
optimizer, and the loss read back at every step. Both start from the same weights. ``data`` is the
epoch without the network. Inputs are synthetic.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from benchmarks.harness import interleaved, parser, publish
from benchmarks.inputs import synthetic
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as IndexedDataset

from sigmabranch.data import EpochBatches, ResidentSplit
from sigmabranch.tasks import Task, find_task
from sigmabranch.training import DenseObjective, FabricEngine, fit
from sigmabranch.training.optim import build_optimizer


@dataclass(frozen=True, slots=True)
class UsualDataset(IndexedDataset[tuple[Tensor, int]]):
    split: ResidentSplit

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.split.inputs[index].cpu(), int(self.split.labels[index])
        return (usual_image(x) if x.ndim == 3 else usual_cloud(x)), y


def usual_image(x: Tensor, pad: int = 4) -> Tensor:
    height, width = x.shape[1:]
    top, left = torch.randint(0, 2 * pad + 1, (2,)).tolist()
    x = F.pad(x, (pad,) * 4)[:, top : top + height, left : left + width]
    x = x.flip(2) if torch.rand(()) < 0.5 else x
    return (x.float() / 255 - 0.5) / 0.5


def usual_cloud(x: Tensor) -> Tensor:
    moved = x * (0.8 + 0.45 * torch.rand(())) + 0.2 * torch.rand(3) - 0.1
    dropped = torch.rand(len(x)) < 0.875 * torch.rand(())
    return torch.where(dropped[:, None], moved[0], moved)


def usual_loop(
    model: nn.Module, split: ResidentSplit, task: Task, device: torch.device
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(an epoch of training, an epoch of data alone)."""
    recipe = task.dense
    loader = DataLoader(UsualDataset(split), recipe.batch_size, shuffle=True)
    optimizer = build_optimizer(model, recipe)

    def train() -> None:
        model.train()
        for x, y in loader:
            logits = model(x.to(device))
            loss = F.cross_entropy(logits, y.to(device), label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return train, lambda: _drain(iter(loader))


def our_loop(
    model: nn.Module, split: ResidentSplit, task: Task, engine: FabricEngine
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The same of this library, its checkpoint at the end included."""
    recipe = replace(task.dense, epochs=1, precision="fp32", warmup_epochs=0.0)
    batches = EpochBatches(split, recipe.batch_size, seed=0)

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fit(model, DenseObjective(recipe), batches, recipe, folder=folder, engine=engine)

    return train, lambda: _drain(batches.epoch(0))


def _drain(batches: Iterator[object]) -> None:
    for _ in batches:
        pass


def main() -> None:
    options = parser(__doc__, "throughput", rounds=5)
    options.add_argument("--tasks", nargs="+", default=["cifar100-small", "shapes-pointnet2"])
    options.add_argument("--samples", type=int, default=1024)
    options = options.parse_args()
    engine = FabricEngine(options.device.type)
    rows = []
    for name in options.tasks:
        task = find_task(name)
        split = synthetic(task, options.samples, options.device)
        model, usual = (task.model.build().to(options.device) for _ in range(2))
        usual.load_state_dict(model.state_dict())
        ours, our_data = our_loop(model, split, task, engine)
        theirs, their_data = usual_loop(usual, split, task, options.device)
        systems = {"ours": ours, "usual": theirs, "our data": our_data, "usual data": their_data}
        timings = interleaved(systems, options.rounds)
        rows.append(
            {
                "task": name,
                "batch": task.dense.batch_size,
                "samples_per_second": options.samples / timings.median("ours"),
                "usual_samples_per_second": options.samples / timings.median("usual"),
                "time_ratio": timings.ratio("ours", to="usual"),
                "data_samples_per_second": options.samples / timings.median("our data"),
                "data_time_ratio": timings.ratio("our data", to="usual data"),
            }
        )
    publish(options, rows)


if __name__ == "__main__":
    main()
