"""Why an input got its answer: what the routers on its path said, and the likeliest classes.

Shapes: B batch, K branches of a node, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sigmabranch.tree import NodeId, node_key

if TYPE_CHECKING:
    from sigmabranch.net import SigmaBranchNet

TOP = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What one router said of one input.

    Attributes:
        node: key of the node that decided.
        probabilities: of its branches.
        branch: the one taken.
    """

    node: str
    probabilities: tuple[float, ...]
    branch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The path of one input.

    Attributes:
        leaf: key of the leaf that was reached.
        log_prob: log P of that leaf, the sum of the log p of the branches taken.
        decisions: from the root on.
        top: (class, probability) of the likeliest classes at the leaf, best first, at most five.
    """

    leaf: str
    log_prob: float
    decisions: tuple[Decision, ...]
    top: tuple[tuple[int, float], ...]

    @property
    def probability(self) -> float:
        """P of the leaf."""
        return math.exp(self.log_prob)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "leaf": self.leaf,
            "log_prob": self.log_prob,
            "probability": self.probability,
            "decisions": [asdict(decision) for decision in self.decisions],
            "top": [{"class": label, "probability": p} for label, p in self.top],
        }

    def __str__(self) -> str:
        classes = ", ".join(f"{label} ({p:.1%})" for label, p in self.top)
        path = "; ".join(
            f"{decision.node} → {decision.branch} of {_shares(decision.probabilities)}"
            for decision in self.decisions
        )
        leaf = f"leaf {self.leaf} ({self.probability:.1%})"
        return f"class {classes}\n{leaf}: {path}" if path else f"class {classes}\n{leaf}"


@torch.no_grad()
def explain(net: SigmaBranchNet, x: Tensor) -> list[Explanation]:
    """Explain the hard pass of a batch; see :meth:`SigmaBranchNet.explain`."""
    said: dict[NodeId, Tensor] = {}
    with ExitStack() as listening:
        for node in filter(net.has_router, net.tree.inner):
            handle = net.router(node).register_forward_hook(_note(said, node))
            listening.enter_context(handle)
        hard = net.hard(x)
    decisions: list[list[Decision]] = [[] for _ in range(len(x))]
    for node in filter(said.__contains__, net.tree.inner):
        below = hard.leaf.new_tensor(net.tree.leaves_under(node))
        # A router is given the inputs that reach it in the order of the batch.
        rows = torch.isin(hard.leaf, below).nonzero().flatten().tolist()
        probabilities, branches = said[node].exp().tolist(), said[node].max(dim=-1).indices.tolist()
        for row, shares, branch in zip(rows, probabilities, branches, strict=True):
            decision = Decision(node=node_key(node), probabilities=tuple(shares), branch=branch)
            decisions[row].append(decision)
    likely_BV = hard.logits.float().softmax(dim=-1)
    best_BT, label_BT = likely_BV.topk(min(TOP, likely_BV.shape[-1]), dim=-1)
    return [
        Explanation(
            leaf=node_key(net.tree.leaves[leaf]),
            log_prob=log_prob,
            decisions=tuple(path),
            top=tuple(zip(labels, best, strict=True)),
        )
        for leaf, log_prob, path, labels, best in zip(
            hard.leaf.tolist(),
            hard.log_prob.tolist(),
            decisions,
            label_BT.tolist(),
            best_BT.tolist(),
            strict=True,
        )
    ]


def _note(said: dict[NodeId, Tensor], node: NodeId) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(router: nn.Module, inputs: Any, log_prob_BK: Tensor) -> None:
        said[node] = log_prob_BK

    return hook


def _shares(probabilities: tuple[float, ...]) -> str:
    return " | ".join(f"{p:.1%}" for p in probabilities)
