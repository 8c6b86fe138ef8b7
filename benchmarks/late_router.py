"""Claim: leaves once trained, no router that reads the same features sends inputs much better.

Some leaf is right far more often than the leaf that the router chooses. Here the network is frozen
and fresh routers are trained on its training split, each on what its node's router reads: linear
ones and ones with a hidden layer, for the expected loss of the leaf, for the likelihood of the
mixture of leaves, and for the expected accuracy. Accuracy is that of the hard path, in percent.

    python -m benchmarks.late_router --net runs/compare/seed0/branched --data data
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.harness import parser, publish
from torch import Tensor, nn

from sigmabranch.archive import read_manifest
from sigmabranch.net import SigmaBranchNet
from sigmabranch.routing import stacked
from sigmabranch.saving import load_net
from sigmabranch.tasks import Task
from sigmabranch.tasks.chain import open_task_data, ordered
from sigmabranch.tree import NodeId, TreeSpec, node_key

EPOCHS, BATCH, LR, WEIGHT_DECAY = 5, 256, 2e-3, 1e-2
HIDDEN = 128


@dataclass(frozen=True, slots=True)
class Seen:
    """What a frozen network makes of a split."""

    read: Mapping[NodeId, Tensor]
    leaf_N: Tensor
    loss_NL: Tensor
    right_NL: Tensor

    def accuracy(self, leaf_N: Tensor) -> float:
        """Of those leaves."""
        return 100 * self.right_NL.gather(1, leaf_N[:, None]).mean().item()

    def ceiling(self) -> float:
        """Of any leaf that is right."""
        return 100 * self.right_NL.amax(1).mean().item()


# (log P of the leaves, loss of the leaves, whether they are right), all (B, L) → (B,).
Goal = Callable[[Tensor, Tensor, Tensor], Tensor]
GOALS: Mapping[str, Goal] = {
    "expected loss": lambda log_prob, loss, _: (log_prob.exp() * loss).sum(1),
    "mixture": lambda log_prob, loss, _: -(log_prob - loss).logsumexp(1),
    "expected accuracy": lambda log_prob, _, right: -(log_prob.exp() * right).sum(1),
}


class Routers(nn.Module):
    """A fresh router for every inner node."""

    def __init__(self, tree: TreeSpec, seen: Seen, hidden: int) -> None:
        super().__init__()
        self.tree = tree
        self.gates = nn.ModuleDict(
            {
                node_key(node): gate(seen.read[node], len(tree.children(node)), hidden)
                for node in tree.inner
            }
        )

    def forward(self, read: Mapping[NodeId, Tensor]) -> dict[NodeId, Tensor]:
        """log p of the branches, (B, K), at every inner node."""
        return {node: self.gates[node_key(node)](read[node]).log_softmax(1) for node in read}

    def leaf_log_prob(self, branch: Mapping[NodeId, Tensor]) -> Tensor:
        """log P of the leaves, (B, L)."""
        found = [
            sum(branch[leaf[:level]][:, leaf[level]] for level in range(len(leaf)))
            for leaf in self.tree.leaves
        ]
        return torch.stack(found, dim=1)  # type: ignore[arg-type]


def gate(read_NC: Tensor, branches: int, hidden: int) -> nn.Module:
    """Pooled features, (B, C), to scores of the branches."""
    channels = read_NC.shape[1]
    if not hidden:
        return nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, branches))
    return nn.Sequential(
        nn.BatchNorm1d(channels),
        nn.Linear(channels, hidden),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(hidden, branches),
    )


def main() -> None:
    options = parser(__doc__, "late-router")
    options.add_argument("--net", type=Path, nargs="+", required=True, help="trained networks")
    options.add_argument("--data", type=Path, default=None, help="folder of the data set")
    given = options.parse_args()
    publish(given, [row for folder in given.net for row in measured(given, folder)])


def measured(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """What the network's own router reaches, what the leaves allow, and what new routers reach."""
    task = Task.from_dict(read_manifest(folder, "branched")["notes"]["task"])
    net = load_net(folder).to(options.device)
    data = open_task_data(task, options.data, options.device)
    train, test = (watched(net, ordered(split)) for split in (data.train, data.test))

    def row(router: str, train_top1: float, top1: float) -> dict[str, Any]:
        found = {"net": str(folder), "router": router, "train_top1": train_top1, "top1": top1}
        print(found, flush=True)
        return found

    yield row("its own", train.accuracy(train.leaf_N), test.accuracy(test.leaf_N))
    yield row("any right leaf", train.ceiling(), test.ceiling())
    for hidden in (0, HIDDEN):
        for goal in GOALS:
            routers = trained(net.tree, train, GOALS[goal], hidden)
            kind = f"{hidden} hidden units" if hidden else "linear"
            reached = (seen.accuracy(routed(net, routers, seen)) for seen in (train, test))
            yield row(f"{kind}, {goal}", *reached)


@torch.no_grad()
def watched(net: SigmaBranchNet, batches: Iterable[tuple[Tensor, Tensor]]) -> Seen:
    """Run all leaves and keep what the routers read."""
    read: dict[NodeId, list[Tensor]] = {node: [] for node in net.tree.inner}
    for node in net.tree.inner:
        pool = net.router(node).projection[0]
        pool.register_forward_hook(lambda *given, node=node: read[node].append(given[-1]))
    leaf, loss, right = [], [], []
    for x, y in batches:
        soft = net.soft(x)
        leaf.append(net.leaf_of(soft))
        label_BL = y[:, None].expand(soft.logits.shape[:2])
        loss.append(F.cross_entropy(soft.logits.mT, label_BL, reduction="none"))
        right.append((soft.logits.argmax(-1) == label_BL).float())
    kept = {node: torch.cat(parts) for node, parts in read.items()}
    return Seen(kept, torch.cat(leaf), torch.cat(loss), torch.cat(right))


def trained(tree: TreeSpec, seen: Seen, goal: Goal, hidden: int) -> Routers:
    """Routers trained for that goal."""
    torch.manual_seed(0)
    routers = Routers(tree, seen, hidden).to(seen.loss_NL.device)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    count = len(seen.loss_NL)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * (count // BATCH))
    for _ in range(EPOCHS):
        for rows in torch.randperm(count).split(BATCH)[: count // BATCH]:
            branch = routers({node: read[rows] for node, read in seen.read.items()})
            log_prob_BL = routers.leaf_log_prob(branch)
            optimizer.zero_grad()
            goal(log_prob_BL, seen.loss_NL[rows], seen.right_NL[rows]).mean().backward()
            optimizer.step()
            schedule.step()
    return routers.eval()


@torch.no_grad()
def routed(net: SigmaBranchNet, routers: Routers, seen: Seen) -> Tensor:
    """The leaves that their decisions reach, (N,)."""
    branch = routers(seen.read)
    return net.routes.hard(stacked([branch[node] for node in net.tree.inner]))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
