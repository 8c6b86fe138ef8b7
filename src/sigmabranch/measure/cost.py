"""Parameters, bytes and multiply-adds: of a dense network, and of one path through a tree.

Counting runs the straight line :meth:`~sigmabranch.net.SigmaBranchNet.path`, not the hard forward:
its branches depend on the input, and a tracer would drop a router whose output nobody returns.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sigmabranch.coupling import evaluating
from sigmabranch.errors import MissingDependency
from sigmabranch.measure.load import Dynamic
from sigmabranch.net import SigmaBranchNet
from sigmabranch.tree import NodeId, node_key

CONVENTION = (
    "Parameters: weights, biases and normalisation scales; running statistics are not counted. "
    "Active: the trunk and, along one path, every router, specializer and the head; where paths "
    "differ, the largest. MACs: fvcore at batch 1 in eval mode on that path, a multiply-add "
    "counting 1, batch norm 2 and layer norm 5 per element, pooling 1 per input element, "
    "activations, additions and softmax nothing. flop_counter: convolutions and matrix products "
    "only, two of its FLOPs being one MAC. FLOPs, doubled: the MACs as above, but with 2 for each "
    "multiply-add of a convolution or matrix product; the paper's ModelNet40 row fits these, its "
    "ResNet rows fit the MACs. Bytes: parameters at 4 (fp32), 2 (fp16) or 1 (int8)."
)


def cost(model: nn.Module, example: Tensor, *, dense: nn.Module | None = None) -> dict[str, Any]:
    """Count a dense network, or one that runs less against the dense one that it comes from.

    Args:
        model: a dense network, or with ``dense`` a :class:`~sigmabranch.net.SigmaBranchNet`, a
            :class:`~sigmabranch.measure.load.Dynamic` network or a smaller dense one.
        example: an input batch; only its first sample is used, and only its shape matters.
        dense: what ``model`` is compared with.

    Returns:
        JSON-able. ``dense`` (if there is one): ``params``, ``macs``, ``macs_flop_counter``,
        ``flops_doubled``, ``bytes``. For any other network also ``net``: ``total_params``,
        ``active_params``, ``macs``, ``macs_flop_counter``, ``flops_doubled``, ``soft_macs`` (every
        node once), ``bytes_total``, ``bytes_per_path``, and of a tree ``routed_macs_share``, the
        part of ``macs`` outside the trunk and its router; ``paths``: the same per leaf; ``nodes``:
        one row per node, which add up to the total parameters and to ``soft_macs``, and along a
        path to that path's; and, with ``dense``, ``reduction_percent``. A network without a tree is
        one node and one path; a dynamic one has two, ``least`` and ``most``, and counts as its
        most. ``convention`` says what is counted.

    Raises:
        MissingDependency: fvcore is not installed.
    """
    result: dict[str, Any] = {}
    if dense is not None:
        result["dense"] = _dense_cost(dense, example)
    if isinstance(model, SigmaBranchNet):
        result |= _net_cost(model, example)
    elif dense is not None:
        result |= _whole_cost(model, example)
    else:
        result["dense"] = _dense_cost(model, example)
    if "dense" in result and "net" in result:
        result["reduction_percent"] = {
            "active_params": _reduction(result["net"]["active_params"], result["dense"]["params"]),
            "macs": _reduction(result["net"]["macs"], result["dense"]["macs"]),
        }
    return {**result, "convention": CONVENTION}


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Elements of all parameters, one that several modules share counting once."""
    return _elements(p for module in modules for p in module.parameters())


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())


def _dense_cost(model: nn.Module, example: Tensor) -> dict[str, Any]:
    with _countable(model) as network:
        macs, products = _macs(network, example)
    params = count_parameters([model])
    return {
        "params": params,
        "macs": macs[""],
        "macs_flop_counter": products,
        "flops_doubled": macs[""] + products,
        "bytes": _bytes(params),
    }


def _net_cost(net: SigmaBranchNet, example: Tensor) -> dict[str, Any]:
    node_params = {key: _elements(own) for key, own in net.node_parameters().items()}
    node_macs: dict[NodeId, int] = {}
    paths: dict[str, dict[str, int]] = {}
    counted: dict[Any, tuple[Counter[str], int]] = {}
    with _countable(net) as network:
        for leaf in net.tree.leaves:
            passed = [leaf[:level] for level in range(len(leaf) + 1)]
            path = network.path(leaf)
            form = _form(path)  # most trees have the same on all paths, and counting takes seconds
            if form not in counted:
                counted[form] = _macs(path, example)
            macs, products = counted[form]
            names = {id(module): name for name, module in path.named_modules()}
            for node in passed:
                node_macs[node] = sum(macs[names[id(m)]] for m in network.node_modules(node))
            paths[node_key(leaf)] = {
                "active_params": sum(node_params[key] for key in net.tree.keys_to(leaf)),
                "macs": macs[""],
                "macs_flop_counter": products,
                "flops_doubled": macs[""] + products,
            }
    total = sum(node_params.values())
    worst = {key: max(path[key] for path in paths.values()) for key in next(iter(paths.values()))}
    return {
        "net": {
            "total_params": total,
            **worst,
            "soft_macs": sum(node_macs.values()),
            "routed_macs_share": 1 - node_macs[()] / worst["macs"],
            "bytes_total": _bytes(total),
            "bytes_per_path": _bytes(worst["active_params"]),
        },
        "paths": paths,
        "nodes": list(_rows(net, node_params, node_macs)),
    }


def _rows(
    net: SigmaBranchNet, node_params: Mapping[str, int], node_macs: Mapping[NodeId, int]
) -> Iterator[dict[str, Any]]:
    """One row per node; what siblings share is computed by each of them."""
    nodes = {node_key(node): node for node in net.nodes}
    for key in net.tree.keys:
        node = nodes.get(key)
        yield {
            "node": key,
            "level": key.count("-") + (key != node_key(())),
            "width": None if node is None else _width(net, node),
            "params": node_params[key],
            "macs": 0 if node is None else node_macs[node],
        }


def _form(model: nn.Module) -> tuple[str, tuple[torch.Size, ...]]:
    """What multiply-adds depend on: modules and the shapes of their tensors."""
    return repr(model), tuple(tensor.shape for tensor in model.state_dict().values())


def _whole_cost(model: nn.Module, example: Tensor) -> dict[str, Any]:
    """A network without a tree, in the form of one with a single node."""
    whole = _dense_cost(model, example)
    total = whole["params"]
    path = {"active_params": total, "macs": whole["macs"]}
    paths = model.bounds() if isinstance(model, Dynamic) else {node_key(()): path}
    worst = paths["most"] if isinstance(model, Dynamic) else path
    return {
        "net": {
            "total_params": total,
            **worst,
            "macs_flop_counter": whole["macs_flop_counter"],
            "flops_doubled": worst["macs"] + whole["macs_flop_counter"],
            "soft_macs": whole["macs"],
            "bytes_total": _bytes(total),
            "bytes_per_path": _bytes(worst["active_params"]),
        },
        "paths": paths,
        "nodes": [
            {
                "node": node_key(()),
                "level": 0,
                "width": None,
                "params": total,
                "macs": whole["macs"],
            }
        ],
    }


def module_costs(model: nn.Module, example: Tensor) -> dict[str, tuple[int, int]]:
    """(parameters, MACs at batch 1) of every module of a network by its path, "" being the whole.

    Raises:
        MissingDependency: fvcore is not installed.
    """
    with _countable(model) as network:
        macs, _ = _macs(network, example)
    return {
        path: (count_parameters([module]), macs[path]) for path, module in model.named_modules()
    }


def _macs(model: nn.Module, example: Tensor) -> tuple[Counter[str], int]:
    """(fvcore's count per module path, the whole under ``""``; torch's count of products)."""
    sample = torch.zeros_like(example[:1], device=next(model.parameters()).device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations, and the tracer's remarks on constants
        try:
            from fvcore.nn import FlopCountAnalysis  # noqa: PLC0415 (an optional package)
        except ImportError as error:
            raise MissingDependency("fvcore", "measure", "Counting multiply-adds") from error
        analysis = FlopCountAnalysis(model, sample)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        # Charged to the caller: several nodes may share one pooling module.
        macs = analysis.ancestor_mode("caller").by_module()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(sample)
    return macs, counter.get_total_flops() // 2


def _attention_macs(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Both matrix products of an attention: queries × keys, and their weights × values."""
    query, key, value = (part.type().sizes() for part in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


@contextmanager
def _countable(model: nn.Module) -> Iterator[Any]:
    """The model in eval mode without gradients; a copy with memory if it lies on ``meta``.

    The tracer follows values, and shape functions refuse traced sizes on the meta device. The
    copy's weights are whatever the memory held: counts do not depend on them.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model = copy.deepcopy(model).to_empty(device="cpu")
    with torch.no_grad(), evaluating(model):
        yield model


def _width(net: SigmaBranchNet, node: NodeId) -> int | None:
    """Channels that the node hands on: those of its last level, or what its own router reads."""
    if node in net.tree.leaves or (node and net.early):
        widths = (net.record or {}).get("widths")
        return widths[net.tree.levels_of(node)[-1] - 1] if widths else None
    decides_inside = len(net.trunk_parts()[1]) > 0
    return net.router(node).channels if net.has_router(node) and not decides_inside else None


def _bytes(params: int) -> dict[str, int]:
    return {"fp32": 4 * params, "fp16": 2 * params, "int8": params}


def _reduction(ours: int, theirs: int) -> float:
    return 100 * (1 - ours / theirs)
