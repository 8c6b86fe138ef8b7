"""Batch norms become part of the convolutions before them: fewer bytes, fewer operations.

Which norms can is read off a trace of the module by torch.fx; where that cannot follow a module's
own Python, its parts are traced one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

Pair: TypeAlias = tuple[str, str]

_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: nn.Conv1d,
    nn.BatchNorm2d: nn.Conv2d,
    nn.BatchNorm3d: nn.Conv3d,
}


def foldable(module: nn.Module) -> list[Pair]:
    """(convolution or linear layer, batch norm that alone reads it), as paths in ``module``."""
    if not _holds_norm(module):
        return []
    try:
        graph = _Tracer().trace(module)
    except Exception:  # a trace runs the module's own Python, which may raise anything
        return [
            (f"{name}.{producer}", f"{name}.{norm}")
            for name, child in module.named_children()
            for producer, norm in foldable(child)
        ]
    return list(_pairs(graph, module))


class _Tracer(fx.Tracer):
    """Does not look into modules that hold no norm: their Python may be beyond a trace."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return super().is_leaf_module(module, path) or not _holds_norm(module)


def _holds_norm(module: nn.Module) -> bool:
    return any(type(part) in _CONVOLUTIONS for part in module.modules())


def _pairs(graph: fx.Graph, module: nn.Module) -> Iterator[Pair]:
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(node.args[0], fx.Node):
            continue
        norm, producer = module.get_submodule(str(node.target)), node.args[0]
        if type(norm) not in _CONVOLUTIONS or norm.running_mean is None:
            continue
        if producer.op != "call_module" or len(producer.users) > 1:
            continue
        if called.count(producer.target) > 1 or called.count(node.target) > 1:
            continue
        kind = type(module.get_submodule(str(producer.target)))
        if kind is _CONVOLUTIONS[type(norm)] or kind is nn.Linear:
            yield str(producer.target), str(node.target)


@torch.no_grad()
def fold(module: nn.Module, pairs: Sequence[Pair]) -> None:
    """Fold the ``pairs`` in place; ``module`` is in eval mode and may be on the meta device."""
    for producer_path, norm_path in pairs:
        producer: Any = module.get_submodule(producer_path)
        norm: Any = module.get_submodule(norm_path)
        fuse: Any = fuse_linear_bn_eval if isinstance(producer, nn.Linear) else fuse_conv_bn_eval
        module.set_submodule(producer_path, fuse(producer, norm))
        module.set_submodule(norm_path, nn.Identity())
