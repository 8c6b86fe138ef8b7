"""The nodes of a tree as functions of flat tensors, for formats that write a file for each.

A node reads its parent's feature and gives its own and its router's log p, or a leaf's logits.
With early decision the part ``decide`` comes first: it gives the feature that all routers read, and
what they say. What siblings share is written with each of them, for a part runs on its own.

Shapes: I inner nodes, K branches, V classes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sigmabranch import files
from sigmabranch.archive import MANIFEST
from sigmabranch.deploy.export.check import Run
from sigmabranch.deploy.export.staging import listing
from sigmabranch.deploy.fold import fold, foldable
from sigmabranch.net import SigmaBranchNet, is_branched
from sigmabranch.routing import stacked
from sigmabranch.shared import with_shared
from sigmabranch.tree import NodeId, node_key

SCHEMA = 1
DECIDE = "decide"

# Key of a part and the tensors that it reads → the tensors that it gives.
RunPart: TypeAlias = Callable[[str, Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one file computes.

    Attributes:
        key: a node key, or ``"decide"``.
        function: flat tensors → flat tensors.
        inputs: example of what it reads.
        passed: the feature (or the logits) that it makes of that.
        outputs: names of what it gives.
    """

    key: str
    function: NodeFunction
    inputs: tuple[Tensor, ...]
    passed: Any
    outputs: tuple[str, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of what it reads."""
        return _numbered("input", len(self.inputs))


class NodeFunction(nn.Module):
    """Modules in a row, and a router at their end, as a function of flat tensors."""

    def __init__(
        self, body: Sequence[nn.Module], structure: pytree.TreeSpec, router: nn.Module | None
    ) -> None:
        super().__init__()
        self.body, self.structure, self.router = nn.Sequential(*body), structure, router
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the feature in their order, then log p if there is a router."""
        feature = self.body(pytree.tree_unflatten(tensors, self.structure))
        said = () if self.router is None else (self.router(feature),)
        return (*pytree.tree_leaves(feature), *said)

    def folded(self) -> NodeFunction:
        """A copy whose batch norms are part of the layers before them."""
        body = [copy.deepcopy(module) for module in self.body]
        copied = NodeFunction(body, self.structure, copy.deepcopy(self.router))
        fold(copied, foldable(copied))
        return copied


class AllRouters(nn.Module):
    """What every router says of one feature."""

    def __init__(self, routers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.routers = nn.ModuleList(routers)

    def forward(self, seen: Any) -> Tensor:
        """log p: (1, I, K), −∞ for branches that a node lacks."""
        return stacked([router(seen) for router in self.routers])


class Walk:
    """Written parts, run one after the other from the input to a leaf."""

    def __init__(self, net: SigmaBranchNet, run_part: RunPart) -> None:
        self.tree, self.early, self.run_part = net.tree, net.early, run_part

    def __call__(self, leaf: NodeId | None) -> Run:
        """Down the path to ``leaf`` whatever the routers say, or for None by their say."""
        return functools.partial(self._run, leaf)

    def _run(self, leaf: NodeId | None, sample: Tensor) -> tuple[Tensor, int]:
        node: NodeId = ()
        tensors = [sample]
        decided: dict[NodeId, Tensor] = {}
        if self.early:
            *tensors, said_1IK = self.run_part(DECIDE, tensors)
            decided = dict(zip(self.tree.inner, said_1IK[0], strict=True))
        tensors = [*self.run_part(node_key(()), tensors)]
        while node not in self.tree.leaves:
            log_prob = decided[node] if self.early else tensors.pop()
            branch = int(log_prob.argmax()) if leaf is None else leaf[len(node)]
            node = (*node, branch)
            tensors = [*self.run_part(node_key(node), tensors)]
        return tensors[0], self.tree.leaves.index(node)


def node_parts(net: SigmaBranchNet, sample: Tensor) -> Iterator[Part]:
    """All parts for inputs of the shape of ``sample`` (1, ...), parents first."""
    if not is_branched(net):
        yield _part(node_key(()), [net.trunk, net.head(())], sample, names=("logits",))
        return
    until, rest = net.trunk_parts()
    if net.early:
        decide = _part(DECIDE, [until], sample, AllRouters([*map(net.router, net.tree.inner)]))
        root = _part(node_key(()), [rest], decide.passed)
        yield decide
    else:
        root = _part(node_key(()), [net.trunk], sample, net.router(()))
    yield root
    features: dict[NodeId, Any] = {(): root.passed}
    for node in net.tree.specializers:
        feature = features[node[:-1]]
        body = [with_shared(copy.deepcopy(net.specializer(node)))]
        if node in net.tree.leaves:
            body.append(with_shared(copy.deepcopy(net.head(node))))
            yield _part(node_key(node), body, feature, names=("logits",))
            continue
        part = _part(node_key(node), body, feature, None if net.early else net.router(node))
        features[node] = part.passed
        yield part


def write_manifest(
    net: SigmaBranchNet,
    folder: Path,
    sample: Tensor,
    *,
    format: str,
    nodes: Mapping[str, Any],
    arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Say what lies in ``folder``, how to run it, and how to arrange an input for it.

    Args:
        net: what was written.
        folder: receives ``manifest.json``.
        sample: (1, ...), as the network takes it.
        format: name of the format.
        nodes: key → how to run that part.
        arrange: what turns a network's input into one for the files.
    """
    manifest = {
        "format": format,
        "schema": SCHEMA,
        "leaves": [list(leaf) for leaf in net.tree.leaves],
        "routers": [node_key(node) for node in net.tree.inner],
        "early": net.early,
        "input": {
            "shape": list(arrange(sample).shape),
            "dtype": str(sample.dtype).removeprefix("torch."),
        },
        "classes": net(sample).shape[1],
        "nodes": nodes,
        "files": listing(folder),
    }
    files.write_json(folder / MANIFEST, manifest)


def _part(
    key: str,
    body: list[nn.Module],
    feature: Any,
    router: nn.Module | None = None,
    names: tuple[str, ...] | None = None,
) -> Part:
    inputs, structure = pytree.tree_flatten(feature)
    function = NodeFunction(body, structure, router)
    passed = function.body(feature)
    outputs = names or _numbered("feature", len(pytree.tree_leaves(passed)))
    return Part(
        key=key,
        function=function,
        inputs=tuple(inputs),
        passed=passed,
        outputs=outputs if router is None else (*outputs, "log_prob"),
    )


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return (name,) if count == 1 else tuple(f"{name}_{number}" for number in range(count))
