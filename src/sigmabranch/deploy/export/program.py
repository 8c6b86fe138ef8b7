"""The hard path of one input as a torch.export program, which every format begins with.

Shapes: V classes, K branches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sigmabranch.errors import UnsupportedOperation
from sigmabranch.net import SigmaBranchNet, split_trunk
from sigmabranch.tree import NodeId, node_key

# Where each operation came from: the folders of whoever exports, and most of a program's bytes.
_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


class HardPath(nn.Module):
    """One input to its leaf's logits, each decision a ``torch.cond`` (shares the net's modules).

    Names of its tensors are those of the saved network.
    """

    def __init__(self, net: SigmaBranchNet) -> None:
        super().__init__()
        self.tree, self.early = net.tree, net.early
        self.trunk, self.specializers = net.trunk, net.specializers
        self.routers, self.heads = net.routers, net.heads
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
        return torch.cond(
            log_prob_1K[0, 1] > log_prob_1K[0, 0],  # a draw goes left, as in the network
            self._branch((*node, 1), structure),
            self._branch((*node, 0), structure),
            tuple(tensors),
        )

    def _branch(
        self, child: NodeId, structure: pytree.TreeSpec
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        def taken(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            feature, *seen = pytree.tree_unflatten(tensors, structure)
            feature = self.specializers[node_key(child)](feature)
            return self._below(child, feature, seen[0] if self.early else feature)

        return taken


def traced(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """``module`` as a program for inputs of exactly these shapes.

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
