"""What layers with weights do to labels, and what products of activations do.

Convolutions and linear layers are where units begin and end: their columns read units and their
rows make new ones. Normalisation passes units on and ties its own parameters to them.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sigmabranch.coupling.calls import Call, rule
from sigmabranch.coupling.units import along, varying

if TYPE_CHECKING:
    from sigmabranch.coupling.trace import Tracer


@rule("convolution")
def convolution(tracer: Tracer, call: Call) -> None:
    """Columns read the input's units, rows make new ones; depthwise rows hand theirs on."""
    x, groups, transposed = call["input"], call["groups"], call["transposed"]
    weight = tracer.weight(call["weight"]) or tracer.refuse(call, "has a computed weight")
    if transposed and groups > 1:
        tracer.refuse(call, "is grouped and transposed")
    labels = tracer.labels(x)
    if 1 == x.shape[1] == call.out.shape[1] and x.shape == call.out.shape and varying(labels):
        # A window that slides over the channels: each makes itself anew with its neighbours' help.
        tracer.blur(labels, "convolution across channels")
        tracer.mark(call.out, labels)
        return
    labels = tracer.settle(labels, range(2, x.ndim), "convolution across channels")
    read = tracer.vector(labels, 1, x.shape[1])
    rows = call.out.shape[1]
    if 1 < groups == x.shape[1]:
        made = read.repeat_interleave(rows // groups)
    else:
        read = _tie_groups(tracer, read, groups)
        tracer.bind(weight, 0 if transposed else 1, read[: len(read) // groups], "reads")
        made = _tie_groups(tracer, tracer.units.fresh(rows), groups)
    tracer.bind(weight, 1 if transposed else 0, made, "makes")
    tracer.attach(call["bias"], made)
    tracer.mark(call.out, along(made, 1, call.out.ndim))


def _tie_groups(tracer: Tracer, ids: Tensor, groups: int) -> Tensor:
    """One unit for the channels at the same place in every group: groups stay equally wide."""
    table = ids.reshape(groups, -1)
    return tracer.project(table, 1).expand_as(table).reshape(-1)


@rule("linear")
def linear(tracer: Tracer, call: Call) -> None:
    """``input @ weight.T + bias``."""
    _apply_linear(tracer, call, call["input"], call["weight"], call["bias"], reads=1)


@rule("addmm")
def addmm(tracer: Tracer, call: Call) -> None:
    """``self + mat1 @ mat2`` with a weight as second factor."""
    _apply_linear(tracer, call, call["mat1"], call["mat2"], call["self"], reads=0)


def _apply_linear(
    tracer: Tracer, call: Call, x: Tensor, factor: Tensor, bias: Tensor | None, *, reads: int
) -> None:
    weight = tracer.weight(factor) or tracer.refuse(call, "has a computed weight")
    labels = tracer.labels(x)
    if labels.shape[-1] == 1 and varying(labels):
        # The rows are the channels (token mixing): each row stays its own.
        tracer.mark(call.out, labels)
        return
    tracer.bind(weight, reads, tracer.vector(labels, -1, x.shape[-1]), "reads")
    made = tracer.units.fresh(call.out.shape[-1])
    tracer.bind(weight, 1 - reads, made, "makes")
    tracer.attach(bias, made)
    tracer.mark(call.out, along(made, -1, call.out.ndim))


@rule("mm bmm")
def multiply(tracer: Tracer, call: Call) -> None:
    """A weight as second factor is a linear layer; two activations meet along the inner axis."""
    a, b = call["self"], call["mat2"]
    if tracer.weight(b) is not None and b.ndim == 2:
        _apply_linear(tracer, call, a, b, None, reads=0)
    else:
        tracer.mark(call.out, _contract(tracer, tracer.labels(a), tracer.labels(b)))


def _contract(tracer: Tracer, a: Tensor, b: Tensor) -> Tensor:
    """Labels of ``a @ b``: (…, N, K) times (…, K, M)."""
    for labels in (a, b):
        if labels.ndim == 3 and labels.shape[0] > 1:
            tracer.fix(labels, "attention heads, whose size the module fixes,")
    if a.shape[-1] > 1 or b.shape[-2] > 1:
        batch = list(range(a.ndim - 2))
        inner_a = tracer.project(a, *batch, -1)
        inner_b = tracer.project(b, *batch, -2)
        tracer.unite(inner_a.transpose(-1, -2), inner_b)
        a, b = (
            x if x.shape[k] == 1 else torch.zeros_like(x[:1, :1]) for x, k in ((a, -1), (b, -2))
        )
    if bool(a.any()) and bool(b.any()):
        tracer.fix(a, "matrix product of channels with channels")
        tracer.fix(b, "matrix product of channels with channels")
        return torch.zeros([1] * a.ndim, dtype=torch.int64)
    return a if bool(a.any()) else b


@rule("_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention")
@rule("_scaled_dot_product_attention_math _scaled_dot_product_attention_math_for_mps")
@rule("_scaled_dot_product_fused_attention_overrideable")
def attention(tracer: Tracer, call: Call) -> None:
    """A head is one unit of queries, keys and values, if the module says how many it has."""
    query, *others = call.tensors
    heads = query.shape[1] if query.ndim == 4 else 1
    known = [tracer.labels(operand) for operand in call.tensors]
    shared = any(x.shape[1] not in (1, heads) for x in others if x.ndim == query.ndim)
    if heads == 1 or shared or not tracer.counts_heads(heads, query.shape[-1]):
        for labels in known:
            tracer.fix(labels, "attention heads, whose number or size the module fixes,")
        return
    rows = [tracer.vector(labels, 1, heads) for labels in known if bool(labels.any())]
    ids = reduce(tracer.unite, rows)
    tracer.count_heads(ids, query.shape[-1])
    tracer.mark(call.results[0], along(ids, 1, call.results[0].ndim))


@rule("embedding")
def embedding(tracer: Tracer, call: Call) -> None:
    """The columns of the table make units."""
    weight = tracer.weight(call["weight"]) or tracer.refuse(call, "has a computed weight")
    made = tracer.units.fresh(call.out.shape[-1])
    tracer.bind(weight, 1, made, "makes")
    tracer.mark(call.out, along(made, -1, call.out.ndim))


# -- normalisation -------------------------------------------------------------------------------


@rule("native_batch_norm cudnn_batch_norm miopen_batch_norm batch_norm")
@rule("_native_batch_norm_legit _native_batch_norm_legit_no_training")
@rule("_batch_norm_with_update _batch_norm_no_update")
def batch_norm(tracer: Tracer, call: Call) -> None:
    """Every channel is normalised by itself."""
    x = call["input"]
    labels = tracer.labels(x)
    ids = tracer.vector(labels, 1, x.shape[1])
    for argument in ("weight", "bias", "running_mean", "running_var"):
        tracer.attach(call[argument], ids)
    tracer.mark(call.results[0], labels)


@rule("native_layer_norm _fused_rms_norm rms_norm layer_norm")
def layer_norm(tracer: Tracer, call: Call) -> None:
    """The statistics run over the normalised dimensions, the last ones."""
    labels = tracer.labels(call["input"])
    dims = range(-len(call["normalized_shape"]), 0)
    inner = torch.zeros([1] * len(dims), dtype=torch.int64)
    if any(labels.shape[dim] > 1 for dim in dims):
        tracer.blur(labels, call.name.removeprefix("native_"))
        inner = tracer.project(labels, *dims)
        inner = inner.reshape(inner.shape[-len(dims) :])
    tracer.attach(call["weight"], inner)
    tracer.attach(call["bias"], inner)
    tracer.mark(call.results[0], labels)


@rule("native_group_norm")
def group_norm(tracer: Tracer, call: Call) -> None:
    """The statistics run over the channels of a group."""
    x = call["input"]
    labels = tracer.labels(x)
    ids = _tie_groups(tracer, tracer.vector(labels, 1, x.shape[1]), call["group"])
    tracer.blur(ids, "group_norm")
    tracer.attach(call["weight"], ids)
    tracer.attach(call["bias"], ids)
    tracer.mark(call.results[0], labels)
