"""What operations without weights do to labels.

A rule sees a :class:`Call` after the operation ran and marks the labels of its result through the
tracer. Labels are compact: size 1 along every dimension in which they do not change. An operation
without a rule that meets a label is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sigmabranch.coupling.calls import Call, rule
from sigmabranch.coupling.units import varying

if TYPE_CHECKING:
    from sigmabranch.coupling.trace import Tracer


# -- element by element --------------------------------------------------------------------------


@rule(
    "pointwise copy_ where masked_fill masked_fill_ hardswish hardswish_ hardsigmoid hardsigmoid_"
)
@rule("_prelu_kernel log_sigmoid_forward hardtanh hardtanh_ threshold threshold_ clamp clamp_")
def elementwise(tracer: Tracer, call: Call) -> None:
    """Operands at the same position belong to the same unit."""
    out = call.results[0]
    operands = [tensor for tensor in call.tensors if tensor.numel() > 1]
    known = [tensor for tensor in operands if not tracer.is_new(tensor)] or operands[:1]
    labels = _meet(tracer, known, out.ndim)
    for tensor in operands:
        if tracer.is_new(tensor):
            tracer.attach(tensor, _seen_from(labels, tensor.shape))
    for result in call.results:
        tracer.mark(result, labels)


def _meet(tracer: Tracer, operands: Sequence[Tensor], ndim: int) -> Tensor:
    """Unite the labels of broadcast operands."""
    aligned = [_align(tracer.labels(tensor), ndim) for tensor in operands]
    shapes = [(1,) * (ndim - tensor.ndim) + tensor.shape for tensor in operands]
    met = torch.zeros([1] * ndim, dtype=torch.int64)
    first = True
    for labels, shape in zip(aligned, shapes, strict=True):
        if any(shape[dim] == 1 for other in aligned for dim in varying(other)):
            # One value for all channels of the other operand: no channel of its own.
            tracer.fix(labels, "spread over the channels of another tensor")
            continue
        met = labels if first else tracer.unite(met, labels)
        first = False
    return met


def _align(labels: Tensor, ndim: int) -> Tensor:
    return labels.reshape([1] * (ndim - labels.ndim) + list(labels.shape))


def _seen_from(labels: Tensor, shape: torch.Size) -> Tensor:
    """``labels`` for an operand of ``shape`` that is broadcast against them."""
    full = (1,) * (labels.ndim - len(shape)) + shape
    if any(full[dim] == 1 for dim in varying(labels)):
        return torch.zeros([1] * len(shape), dtype=torch.int64)
    return labels.reshape(labels.shape[labels.ndim - len(shape) :])


@rule("zeros_like ones_like empty_like full_like rand_like randn_like fill_ zero_ tril triu")
@rule("lift_fresh native_dropout")
def same(tracer: Tracer, call: Call) -> None:
    """The result looks like the first argument."""
    labels = tracer.labels(next(call.tensors))
    for result in call.results:
        tracer.mark(result, labels)


@rule("new_zeros new_ones new_empty new_full new_empty_strided")
@rule("_assert_async _assert_tensor_metadata is_same_size")
def nothing(tracer: Tracer, call: Call) -> None:
    """Only the type of the argument is used: the result has no labels."""


@rule("glu")
def glu(tracer: Tracer, call: Call) -> None:
    """The two halves meet element by element."""
    x = call["self"]
    value, gate = tracer.labels(x).expand(x.shape).chunk(2, call["dim"])
    tracer.mark(call.out, tracer.unite(tracer.units.compact(value), tracer.units.compact(gate)))


# -- shape ---------------------------------------------------------------------------------------


@rule("detach alias clone contiguous _to_copy")
def copy(tracer: Tracer, call: Call) -> None:
    """The same values elsewhere; a weight stays recognisable as that weight."""
    x = call["self"]
    weight = tracer.weight(x)
    if weight is None or tracer.is_marked(x):
        tracer.mark(call.out, tracer.labels(x))
    else:
        tracer.mark_weight(call.out, weight)


@rule("t transpose permute")
def rearrange(tracer: Tracer, call: Call) -> None:
    """Axes change places, those of a weight too."""
    x = call["self"]
    weight = tracer.weight(x)
    if weight is None or tracer.is_marked(x):
        tracer.mark(call.out, call.on(tracer.labels(x)))
    else:
        name, axes = weight
        # A probe with a different length along every axis shows where each axis went.
        probe = call.on(torch.empty(tuple(range(1, x.ndim + 1))))
        tracer.mark_weight(call.out, (name, tuple(axes[size - 1] for size in probe.shape)))


@rule("view _unsafe_view _reshape_alias reshape")
def reshape(tracer: Tracer, call: Call) -> None:
    """Labels are reshaped as the values are."""
    x = call["self"]
    tracer.mark(call.out, tracer.labels(x).expand(x.shape).reshape(call.out.shape))


@rule("as_strided_")
def lay_out(tracer: Tracer, call: Call) -> None:
    """Pooling to a single position ends by giving (N, C, 1, 1) channels-last strides."""
    out = call.out
    if out.ndim < 3 or out.stride(1) != 1 or any(size != 1 for size in out.shape[2:]):
        tracer.refuse(call, "gives memory another shape")


@rule("expand slice select unsqueeze squeeze narrow index index_select gather repeat roll flip")
@rule("pixel_shuffle pixel_unshuffle channel_shuffle unfold diagonal unbind")
def move(tracer: Tracer, call: Call) -> None:
    """Labels are moved as the values are, by the operation itself."""
    x = call.args[0]
    moved = call.on(tracer.labels(x).expand(x.shape))
    for result, labels in zip(call.results, pytree.tree_leaves(moved), strict=True):
        tracer.mark(result, labels)


@rule("split")
def split(tracer: Tracer, call: Call) -> None:
    """Equal parts stay equally wide: what stands at the same place in each becomes one unit."""
    x, size = call["self"], call["split_size"]
    dim = call["dim"] % x.ndim
    labels = tracer.labels(x)
    if labels.shape[dim] > size:
        if labels.shape[dim] % size:
            labels = _kept_whole(tracer, labels, dim)
        else:
            parts = labels.unflatten(dim, (-1, size))
            others = [axis for axis in range(parts.ndim) if axis != dim]
            labels = tracer.project(parts, *others).expand_as(parts).flatten(dim, dim + 1)
            if varying(labels) == [dim]:
                tracer.count_parts(labels.flatten(), size)
    _mark_parts(tracer, call, labels)


@rule("split_with_sizes")
def split_unevenly(tracer: Tracer, call: Call) -> None:
    """The sizes of the parts are written into the forward."""
    dim = call["dim"] % call["self"].ndim
    _mark_parts(tracer, call, _kept_whole(tracer, tracer.labels(call["self"]), dim))


def _kept_whole(tracer: Tracer, labels: Tensor, dim: int) -> Tensor:
    """Labels of a tensor whose length along ``dim`` must not change."""
    if labels.shape[dim] > 1:
        others = [axis for axis in varying(labels) if axis != dim]
        if others:
            return tracer.project(labels, *others)
        tracer.fix(labels, "split into parts of written sizes")
    return labels


def _mark_parts(tracer: Tracer, call: Call, labels: Tensor) -> None:
    """The labels of a tensor, on the parts that it was split into."""
    moved = call.on(labels.expand(call["self"].shape))
    for result, part in zip(call.results, pytree.tree_leaves(moved), strict=True):
        tracer.mark(result, part)


@rule("cat stack")
def join(tracer: Tracer, call: Call) -> None:
    """Labels are joined as the values are."""
    stacked = call.name == "stack"
    # A 1-d empty tensor may be concatenated with anything and adds nothing.
    tensors = [tensor for tensor in call["tensors"] if stacked or tensor.shape != (0,)]
    dim = call["dim"] % call.out.ndim
    views = [tensor.unsqueeze(dim) if stacked else tensor for tensor in tensors]
    labels = [tracer.labels(tensor) for tensor in tensors]
    labels = [ids.unsqueeze(dim) if stacked else ids for ids in labels]
    wide = {dim, *(axis for ids in labels for axis in varying(ids))}
    parts = [
        ids.expand([size if axis in wide else 1 for axis, size in enumerate(view.shape)])
        for ids, view in zip(labels, views, strict=True)
    ]
    tracer.mark(call.out, torch.cat(parts, dim))


@rule("constant_pad_nd")
def pad(tracer: Tracer, call: Call) -> None:
    """Padding a picture belongs to its channel; padding among the channels belongs to none."""
    labels = tracer.labels(call["self"])
    amounts = list(call["pad"])
    for number in range(len(amounts) // 2):
        if labels.shape[-1 - number] == 1:
            amounts[2 * number : 2 * number + 2] = (0, 0)
    tracer.mark(call.out, torch.constant_pad_nd(labels, amounts, 0))


# -- windows, reductions, orders -----------------------------------------------------------------


@rule("avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices")
@rule("_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d")
@rule("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d")
@rule("_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d")
@rule("upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d")
@rule("_upsample_bilinear2d_aa _upsample_bicubic2d_aa")
@rule("reflection_pad1d reflection_pad2d reflection_pad3d")
@rule("replication_pad1d replication_pad2d replication_pad3d")
def window(tracer: Tracer, call: Call) -> None:
    """A window slides over the last dimensions and keeps channels apart."""
    dims = int(re.findall(r"(\d)d", call.name)[0])
    labels = tracer.labels(next(call.tensors))
    others = [dim for dim in varying(labels) if dim < labels.ndim - dims]
    if others:  # every position of a parameter, such as a position embedding, has units of its own
        labels = tracer.project(labels, *others)
    labels = tracer.settle(labels, range(-dims, 0), f"{call.name} across channels")
    for result in call.results:
        tracer.mark(result, labels)


@rule("sum mean prod amax amin max min any all std var std_mean var_mean logsumexp")
@rule("linalg_vector_norm norm")
def reduce(tracer: Tracer, call: Call) -> None:
    """Reducing over other dimensions keeps channels apart; over the channels it mixes them."""
    x = next(call.tensors)
    dims = _dims(call["dim"], x.ndim)
    labels = _mix(tracer, tracer.labels(x), dims, call.name)
    for result in call.results:
        kept = labels if result.ndim == x.ndim else labels.squeeze(dims)
        tracer.mark(result, kept)


@rule("_softmax _log_softmax _safe_softmax cumsum logcumsumexp")
def normalise(tracer: Tracer, call: Call) -> None:
    """As a reduction, but every element stays."""
    x = call["self"]
    labels = tracer.labels(x)
    dims = _dims(call["dim"], x.ndim)
    mixed = _mix(tracer, labels, dims, call.name)
    tracer.mark(call.out, mixed if bool(mixed.any()) else labels)


def _dims(given: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    chosen = [given] if isinstance(given, int) else given
    return tuple(dim % ndim for dim in chosen) if chosen else tuple(range(ndim))


def _mix(tracer: Tracer, labels: Tensor, dims: Sequence[int], name: str) -> Tensor:
    """Labels with size 1 along ``dims``."""
    if all(labels.shape[dim] == 1 for dim in dims):
        return labels
    others = [dim for dim in varying(labels) if dim not in dims]
    if others:
        # Several copies of the same channels, such as the branches of a selective kernel: what is
        # mixed is one channel with its counterparts, so they become one unit.
        return tracer.project(labels, *others)
    tracer.blur(labels, f"{name} over channels")
    return torch.zeros([1] * labels.ndim, dtype=torch.int64)


@rule("argmax argmin sort topk argsort kthvalue")
def order(tracer: Tracer, call: Call) -> None:
    """Ranking within a channel is harmless; ranking channels needs all of them."""
    x = call["self"]
    dims = _dims(call["dim"], x.ndim)
    labels = tracer.settle(tracer.labels(x), dims, f"{call.name} over channels")
    for result in call.results:
        tracer.mark(result, labels if result.ndim == x.ndim else labels.squeeze(dims))
