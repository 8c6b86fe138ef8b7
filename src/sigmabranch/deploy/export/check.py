"""Whether an exported network says what the network says, leaf by leaf.

Shapes: B batch (always 1 in what was exported), V classes, N samples, I inner nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sigmabranch.errors import ConversionError
from sigmabranch.net import SigmaBranchNet, is_branched
from sigmabranch.tree import NodeId, node_key

# One input (1, ...) → (logits (1, V), number of the leaf that they come from).
Run: TypeAlias = Callable[[Tensor], tuple[Tensor, int]]
# What was written, made to run: down one path whatever its routers say, or for None by their say.
Written: TypeAlias = Callable[[NodeId | None], Run]

# Of the largest logit; folding norms and other kernels round anew, and that is all they may do.
TOLERANCE = 1e-4
# Inputs sent down each path; one would do, were it not for the inputs that give nothing but zeros.
_FORCED = 4
# Routers nearer to a draw than this may be tipped by rounding.
_DRAW = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class LeafCheck:
    """One leaf of an export beside the same leaf of the network.

    Attributes:
        leaf: node key.
        routed: inputs that both sent there by themselves.
        forced: inputs that were sent there.
        max_abs: largest difference of a logit.
        max_rel: the same over the network's largest absolute logit there.
    """

    leaf: str
    routed: int
    forced: int
    max_abs: float
    max_rel: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def check_leaves(net: SigmaBranchNet, written: Written, samples: Tensor) -> tuple[LeafCheck, ...]:
    """Compare routes on all samples, and each leaf's logits also on samples forced there.

    Args:
        net: in eval mode on the CPU.
        written: runs the export.
        samples: (N, ...) inputs.

    Raises:
        ConversionError: another leaf than the network's, or logits farther off than
            :data:`TOLERANCE`.
    """
    routed = _routed(net, written(None), samples)
    return tuple(
        _leaf_check(net, leaf, written(leaf), samples[:_FORCED], routed[number])
        for number, leaf in enumerate(net.tree.leaves)
    )


def _routed(net: SigmaBranchNet, run: Run, samples: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """Per leaf the pairs (found, expected) of the logits that both routed there."""
    pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in net.tree.leaves]
    for sample in _decided(net, samples).unsqueeze(1):
        expected, found = net.hard(sample), run(sample)
        _same_leaf(net, found[1], int(expected.leaf))
        pairs[found[1]].append((found[0], expected.logits))
    return pairs


def _decided(net: SigmaBranchNet, samples: Tensor) -> Tensor:
    """Those on which no router is near a draw."""
    if not is_branched(net):
        return samples
    best_NI2 = net.soft(samples).branch_log_prob.topk(2, dim=-1).values
    margin_N = (best_NI2[..., 0] - best_NI2[..., 1]).amin(dim=1)
    return samples[margin_N > _DRAW]


def _leaf_check(
    net: SigmaBranchNet,
    leaf: NodeId,
    run: Run,
    samples: Tensor,
    routed: list[tuple[Tensor, Tensor]],
) -> LeafCheck:
    pairs, path = list(routed), net.path(leaf)
    for sample in samples.split(1):
        logits, arrived = run(sample)
        _same_leaf(net, arrived, net.tree.leaves.index(leaf))
        pairs.append((logits, path(sample)[0]))
    found, expected = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    max_abs = float((found - expected).abs().max())
    max_rel = max_abs / max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    if not max_rel <= TOLERANCE:  # NaN, too, is a difference
        raise ConversionError(
            f"the export differs from the network at leaf {node_key(leaf)} by {max_rel:.1e} of the "
            f"largest logit, more than {TOLERANCE:.0e}: nothing was written; try another format"
        )
    return LeafCheck(
        leaf=node_key(leaf),
        routed=len(routed),
        forced=len(samples),
        max_abs=max_abs,
        max_rel=max_rel,
    )


def _same_leaf(net: SigmaBranchNet, found: int, expected: int) -> None:
    if found != expected:
        named = [node_key(leaf) for leaf in net.tree.leaves]
        raise ConversionError(
            f"the export arrives at leaf {named[found]} where the network arrives at "
            f"{named[expected]}: nothing was written; try another format"
        )
