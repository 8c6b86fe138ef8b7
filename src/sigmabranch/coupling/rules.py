"""What each operation does to labels: a registry from aten operation name to rule.

A rule sees a :class:`Call` after the operation ran and marks the labels of its result through the
tracer. Labels are compact: size 1 along every dimension in which they do not change. An operation
without a rule that meets a label is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sigmabranch.coupling.units import along, varying

if TYPE_CHECKING:
    from sigmabranch.coupling.trace import Tracer


class Call:
    """One aten call: ``call["weight"]`` is the argument of that name, ``call.out`` the result."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.name: str = func._schema.name.split("::")[1]
        self.args = args
        self.kwargs = kwargs
        self.out: Any = None

    def __getitem__(self, argument: str) -> Any:
        for position, declared in enumerate(self.func._schema.arguments):
            if declared.name == argument:
                given = position < len(self.args)
                default = declared.default_value
                return self.args[position] if given else self.kwargs.get(argument, default)
        return None

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor among the arguments."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return (leaf for leaf in leaves if isinstance(leaf, Tensor))

    @property
    def results(self) -> list[Tensor]:
        """Every tensor that was returned."""
        return [leaf for leaf in pytree.tree_leaves(self.out) if isinstance(leaf, Tensor)]

    def on(self, first: Any) -> Any:
        """The same operation on other values of its first argument."""
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.cpu, (self.args[1:], self.kwargs))
        return self.func(first, *args, **kwargs)


Rule = Callable[["Tracer", Call], None]
_RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the aten operations in the blank-separated list ``names``."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def find_rule(func: Any) -> Rule | None:
    """The rule for an operation; PyTorch itself says which ones work element by element."""
    namespace, name = func._schema.name.split("::")
    if namespace != "aten":
        return None
    if name in _RULES:
        return _RULES[name]
    return elementwise if torch.Tag.pointwise in func.tags else None


# -- element by element --------------------------------------------------------------------------


@rule("copy_ where masked_fill masked_fill_ hardswish hardswish_ hardsigmoid hardsigmoid_")
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
        tracer.mark_weight(call.out, *weight)


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
        tracer.mark_weight(call.out, name, tuple(axes[size - 1] for size in probe.shape))


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
@rule("pixel_shuffle pixel_unshuffle channel_shuffle unfold diagonal")
@rule("split split_with_sizes unbind chunk")
def move(tracer: Tracer, call: Call) -> None:
    """Labels are moved as the values are, by the operation itself."""
    x = call.args[0]
    moved = call.on(tracer.labels(x).expand(x.shape))
    for result, labels in zip(call.results, pytree.tree_leaves(moved), strict=True):
        tracer.mark(result, labels)


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


# -- layers with weights -------------------------------------------------------------------------


@rule("convolution")
def convolution(tracer: Tracer, call: Call) -> None:
    """Columns read the input's units, rows make new ones; depthwise rows hand theirs on."""
    x, groups, transposed = call["input"], call["groups"], call["transposed"]
    weight = tracer.weight(call["weight"]) or tracer.refuse(call, "has a computed weight")
    if transposed and groups > 1:
        tracer.refuse(call, "is grouped and transposed")
    labels = tracer.settle(tracer.labels(x), range(2, x.ndim), "convolution across channels")
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
        a, b = (x if x.shape[k] == 1 else torch.zeros_like(x[:1, :1]) for x, k in ((a, -1), (b, -2)))
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
    """Head count and head size are constants of the attention module."""
    for argument in ("query", "key", "value"):
        tracer.fix(tracer.labels(call[argument]), "attention heads, whose size the module fixes,")


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
    for argument in ("weight", "bias", "running_mean"):
        tracer.attach(call[argument], ids)
    tracer.attach(call["running_var"], ids, "reads")
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
