"""``model.pt2``: one torch.export program with nested ``torch.cond``, weights inside."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from sigmabranch.deploy.export.check import Run, Written
from sigmabranch.deploy.export.program import HardPath, traced
from sigmabranch.net import SigmaBranchNet
from sigmabranch.tree import NodeId, TreeSpec, node_key

FILE = "model.pt2"
# Outweighs what any router says, and float32 still holds it.
_FORCE = 1e4


def write(net: SigmaBranchNet, folder: Path, sample: Tensor) -> Written:
    """Write ``folder/model.pt2`` for inputs of the shape of ``sample`` (1, ...).

    Raises:
        UnsupportedOperation: torch.export cannot follow the network.
    """
    program = traced(HardPath(net), (sample,))
    told = {"tree.json": json.dumps(net.tree.to_dict())}
    torch.export.save(program, folder / FILE, extra_files=told)
    return _Loaded(folder / FILE, net.tree)


class _Loaded:
    """The written program, whose routers can be overruled by their biases."""

    def __init__(self, path: Path, tree: TreeSpec) -> None:
        self.module = torch.export.load(path).module()
        self.biases = {
            node: self.module.get_parameter(f"routers.{node_key(node)}.gate.bias")
            for node in tree.inner
        }
        self.learned = {node: bias.clone() for node, bias in self.biases.items()}

    def __call__(self, leaf: NodeId | None) -> Run:
        path = leaf or ()
        for node, bias in self.biases.items():
            bias.copy_(self.learned[node])
        for level, branch in enumerate(path):
            self.biases[path[:level]][branch] += _FORCE
        return self._run

    def _run(self, sample: Tensor) -> tuple[Tensor, int]:
        logits, leaf = self.module(sample)
        return logits, int(leaf)
