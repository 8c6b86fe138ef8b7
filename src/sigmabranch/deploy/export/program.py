"""The hard path of one input as a torch.export program, which every format begins with.

Shapes: V classes, K branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sigmabranch.errors import UnsupportedOperation
from sigmabranch.net import SigmaBranchNet, split_trunk
from sigmabranch.tree import NodeId, node_key

# Where each operation came from: the folders of whoever exports, and most of a program's bytes.
_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


# Flat tensors of a feature → logits (1, V), leaf (1,).
Branch: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


class HardPath(nn.Module):
    """One input to its leaf's logits, each decision a ``torch.cond`` (shares the net's modules).

    A node of K branches is K − 1 of them, one in the other: is the last branch the likeliest of
    all, else the last but one of those that are left, and so on.

    Names of its tensors are those of the saved network.
    """

    def __init__(self, net: SigmaBranchNet) -> None:
        super().__init__()
        self.tree, self.early = net.tree, net.early
        self.trunk, self.specializers = net.trunk, net.specializers
        self.routers, self.heads, self.shared = net.routers, net.heads, net.shared
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, ...) → logits (1, V), leaf (1,) int64 as a position in ``tree.leaves``."""
        until, rest = split_trunk(self.trunk, self.tree.decide_after)
        seen = until(x)
        feature = rest(seen)
        return self._below((), feature, seen if self.early else feature)

    def _below(self, node: NodeId, feature: Any, seen: Any) -> tuple[Tensor, Tensor]:
        if node in self.tree.leaves:
            leaf = torch.full((1,), self.tree.leaves.index(node))
            return self.heads[node_key(node)](feature), leaf
        log_prob_1K = self.routers[node_key(node)](seen)
        # Conditions take tensors only, whatever a feature is made of.
        tensors, structure = pytree.tree_flatten((feature, seen) if self.early else (feature,))
        branches = [self._branch(child, structure) for child in self.tree.children(node)]
        return _choice(_is_best(log_prob_1K), branches, tuple(tensors))

    def _branch(self, child: NodeId, structure: pytree.TreeSpec) -> Branch:
        def taken(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            feature, *seen = pytree.tree_unflatten(tensors, structure)
            feature = self.specializers[node_key(child)](feature)
            return self._below(child, feature, seen[0] if self.early else feature)

        return taken


def _is_best(log_prob_1K: Tensor) -> list[Tensor]:
    """For each branch but the first, whether it is likelier than all before it, as scalars.

    A draw goes to the first branch, as in the network.
    """
    return [
        log_prob_1K[0, branch] > reduce(torch.maximum, [log_prob_1K[0, k] for k in range(branch)])
        for branch in range(1, log_prob_1K.shape[1])
    ]


def _choice(
    is_best: Sequence[Tensor], branches: Sequence[Branch], tensors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """What the last branch makes of ``tensors`` if it is the best, else one of those before it."""
    *earlier, last_is_best = is_best
    *rest, last = branches
    if not earlier:
        return torch.cond(last_is_best, last, rest[0], tensors)
    count = len(earlier)

    def taken(*given: Tensor) -> tuple[Tensor, Tensor]:
        return last(*given[count:])

    def left(*given: Tensor) -> tuple[Tensor, Tensor]:
        return _choice(given[:count], rest, given[count:])

    return torch.cond(last_is_best, taken, left, (*earlier, *tensors))


def traced(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """``module`` as a program for inputs, trees of tensors, of exactly these shapes.

    Raises:
        UnsupportedOperation: torch.export cannot follow the module.
    """
    try:
        program = torch.export.export(module, inputs, strict=False)
    except RuntimeError as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise UnsupportedOperation(f"torch.export cannot follow this network: {reason}") from error
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                for origin in _ORIGINS:
                    node.meta.pop(origin, None)
    return program
