"""Find coupled channels by running the model once.

An integer label rides along every element of every activation: the id of the unit it belongs to.
Shape operations act on the labels as on the values; elementwise operations declare the labels of
their operands equal; convolutions and linear layers tie a weight's columns to the labels they read
and its rows to new ones. What each operation does is in :mod:`sigmabranch.coupling.rules` and
:mod:`sigmabranch.coupling.layers`; an operation without a rule that meets a label is refused.

The model's input carries no labels: its channels are not ours to drop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sigmabranch.coupling import layers, rules  # noqa: F401 (importing them registers the rules)
from sigmabranch.coupling.assemble import Findings, assemble, model_tensor
from sigmabranch.coupling.calls import Call, find_rule
from sigmabranch.coupling.map import HEAD_CHANNELS, HEADS, PARTS, CouplingMap, Role
from sigmabranch.coupling.units import Units, distinct, varying
from sigmabranch.coupling.written import Given, is_written, written_sizes
from sigmabranch.errors import ConversionError, UnsupportedOperation

# Marks live on the tensor object itself, so they die with it and no recycled id() can lie.
_MARK = "_sigmabranch_mark"
# The trace whose input a tensor was computed from.
_ORIGIN = "_sigmabranch_origin"

#: A parameter or buffer by name, and which of its axes each dimension is.
Weight: TypeAlias = tuple[str, tuple[int, ...]]


@dataclass(slots=True)
class _Mark:
    """What is known of one tensor; ``owner`` tells this trace from an earlier one."""

    owner: Units
    labels: Tensor | None = None
    weight: Weight | None = None


def trace(
    model: nn.Module, example: Tensor | tuple[Any, ...], *, watch: Sequence[str] = ()
) -> CouplingMap:
    """Run ``model`` once on ``example`` and report which channels belong together.

    The run is in eval mode without gradients; the model is left as it was. A batch of one and the
    smallest legal input are enough.

    Args:
        model: the dense network.
        example: its input, or a tuple of its positional inputs.
        watch: paths of modules whose output channels the map should name.

    Raises:
        UnsupportedOperation: channels reach an operation through which they cannot be followed.
        ConversionError: a watched module does not exist or did not run.
    """
    modules = dict(model.named_modules())
    for name in watch:
        if name not in modules:
            raise ConversionError(f"cannot watch {name!r}: the model has no module of that name")
    arguments = example if isinstance(example, tuple) else (example,)
    # In-place operations of the model must not reach the caller's data.
    copies = pytree.tree_map_only(Tensor, torch.clone, arguments)
    tracer = Tracer(model, watch)
    tracer.begin(copies)
    with evaluating(model), torch.no_grad(), tracer.following_modules(), tracer:
        output = model(*copies)
    tracer.fix_output(output)
    coupling = assemble(model, tracer.units, tracer.findings)
    with evaluating(model), torch.no_grad():
        written = written_sizes(model, tracer.given(coupling, arguments), coupling)
    return replace(
        coupling,
        fixed={**coupling.fixed, **written},
        outputs={name: coupling.outputs[name] for name in watch},
        per_input=tracer.per_input,
    )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put ``models`` into eval mode and give every module its own flag back afterwards."""
    modules = [module for model in models for module in model.modules()]
    flags = [module.training for module in modules]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


class Tracer(TorchDispatchMode):
    """The labels of a running model: what the rules read and write."""

    def __init__(self, model: nn.Module, watch: Sequence[str] = ()) -> None:
        super().__init__()
        self.units = Units()
        self.findings = Findings(watched=dict.fromkeys(watch))
        self._model = model
        self._path: list[str] = []
        self._given: dict[str, Given] = {}
        self._inputs = 0
        self._is_per_input: dict[str, bool] = {}
        # Keyed by identity: the model keeps these tensors alive, so no id is reused.
        named = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor): name for name, tensor in named}

    # -- running -----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = Call(func, args, kwargs or {})
        touched = any(map(self._is_touched, call.tensors))
        moving = any(map(self._is_from_input, call.tensors))
        call.out = func(*args, **(kwargs or {}))
        for result in call.results if moving else ():
            setattr(result, _ORIGIN, self.units)
        if touched:
            rule = find_rule(func) or self.refuse(call, "has no rule")
            rule(self, call)
        return call.out

    def begin(self, arguments: tuple[Any, ...]) -> None:
        """The network is about to be given these."""
        tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            setattr(tensor, _ORIGIN, self.units)
        self._inputs = next((len(tensor) for tensor in tensors if tensor.ndim), 0)

    def _is_from_input(self, tensor: Tensor) -> bool:
        return getattr(tensor, _ORIGIN, None) is self.units

    @property
    def per_input(self) -> frozenset[str]:
        """Modules that were always given as many values as there were inputs, made from these."""
        return frozenset(name for name, always in self._is_per_input.items() if always)

    def _note_inputs(self, name: str, given: Sequence[Any]) -> None:
        value = given[0] if given and isinstance(given[0], Tensor) else None
        one_each = (
            value is not None
            and value.ndim > 0
            and len(value) == self._inputs
            and self._is_from_input(value)
        )
        self._is_per_input[name] = one_each and self._is_per_input.get(name, True)

    def _is_touched(self, tensor: Tensor) -> bool:
        return self.is_marked(tensor) or self.weight(tensor) is not None

    def refuse(self, call: Call, why: str) -> NoReturn:
        """Stop the trace at an operation through which channels cannot be followed."""
        raise UnsupportedOperation(
            f"operation aten.{call.name} in {self.path} {why}: channels cannot be followed through "
            "it; rewrite the module or add a rule to sigmabranch.coupling.rules"
        )

    @property
    def path(self) -> str:
        """The module that is running, for messages."""
        return self._path[-1] if self._path and self._path[-1] else type(self._model).__name__

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """Know which module runs, and note what the watched ones return."""
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._path.append(name)
            self._note_inputs(name, arguments)
            if name and is_written(module) and name not in self._given:
                self._given[name] = Given(arguments, named)
                self.findings.watched[_given_to(name)] = self._output_labels((arguments, named))

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, arguments: Any, output: Any) -> None:
            self._path.pop()
            if name in self.findings.watched:
                self.findings.watched[name] = self._output_labels(output)

        return leave

    def _output_labels(self, output: Any) -> list[tuple[Tensor | None, torch.Size]]:
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        return [(self._mark_of(tensor).labels, tensor.shape) for tensor in tensors]

    def given(self, coupling: CouplingMap, arguments: tuple[Any, ...]) -> dict[str, Given]:
        """What the network and its written modules were called with first."""
        axes = {name: coupling.outputs[_given_to(name)] for name in self._given}
        inner = {name: replace(given, axes=axes[name]) for name, given in self._given.items()}
        return {"": Given(arguments), **inner}

    def fix_output(self, output: Any) -> None:
        """Units that reach the model's output must stay."""
        for labels, _ in self._output_labels(output):
            if labels is not None:
                self.fix(labels, "the model's output")

    # -- labels of activations ---------------------------------------------------------------

    def labels(self, tensor: Tensor) -> Tensor:
        """Compact labels of ``tensor``; a parameter met for the first time gets new units."""
        labels = self._mark_of(tensor).labels
        if labels is None:
            weight = self.weight(tensor)
            if weight is None:
                return torch.zeros([1] * tensor.ndim, dtype=torch.int64)
            labels = self._parameter_labels(weight)
        return self.units.compact(labels)

    def _mark_of(self, tensor: Tensor) -> _Mark:
        mark: _Mark | None = getattr(tensor, _MARK, None)
        return mark if mark is not None and mark.owner is self.units else _Mark(self.units)

    def is_marked(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has labels of its own."""
        return self._mark_of(tensor).labels is not None

    def is_new(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a parameter or buffer that no operation has used yet."""
        weight = None if self.is_marked(tensor) else self.weight(tensor)
        if weight is None:
            return False
        return weight[0] not in self.findings.elements and weight[0] not in self.findings.weights

    def mark(self, tensor: Tensor, labels: Tensor) -> None:
        """Give ``tensor`` the labels, broadcast to its shape."""
        if id(tensor) in self._names:
            raise UnsupportedOperation(
                f"tensor {self._names[id(tensor)]} is changed in place in {self.path}: its "
                "channels cannot be followed; make the forward leave parameters and buffers alone"
            )
        labels = self.units.compact(labels)
        known = labels if bool((labels > 0).any()) else None
        setattr(tensor, _MARK, _Mark(self.units, labels=known))

    def unite(self, a: Tensor, b: Tensor) -> Tensor:
        """Declare two broadcastable labels equal and return them.

        A unit that meets a position without one cannot be dropped: the other side would stay.
        """
        self.units.unite(a, b)
        a, b = torch.broadcast_tensors(a, b)
        alone = (a > 0) != (b > 0)
        if bool(alone.any()):
            self.fix(torch.maximum(a, b)[alone], "combined with values that have no channels")
        return self.units.find(torch.where(a > 0, a, b))

    def project(self, labels: Tensor, *dims: int) -> Tensor:
        """Labels that change along ``dims`` only: the units along all others become one."""
        keep = {dim % labels.ndim for dim in dims}
        for dim in varying(labels):
            if dim not in keep:
                labels = self.unite(labels.narrow(dim, 0, 1), labels).narrow(dim, 0, 1)
        return self.units.find(labels)

    def vector(self, labels: Tensor, dim: int, size: int) -> Tensor:
        """The unit at each of the ``size`` positions along ``dim``."""
        return self.project(labels, dim).reshape(-1).expand(size)

    def settle(self, labels: Tensor, dims: Sequence[int], why: str) -> Tensor:
        """Labels constant along ``dims``; if they are not, their units are fixed and forgotten."""
        if any(labels.shape[dim] > 1 for dim in dims):
            self.fix(labels, why)
            return torch.zeros([1] * labels.ndim, dtype=torch.int64)
        return labels

    def fix(self, labels: Tensor, why: str) -> None:
        """The units in ``labels`` cannot be dropped."""
        self.findings.fixed.append((distinct([labels]), self._located(why)))

    def blur(self, labels: Tensor, why: str) -> None:
        """Dropping the units in ``labels`` changes what the others compute."""
        self.findings.inexact.append((distinct([labels]), self._located(why)))

    def _located(self, why: str) -> str:
        return f"{why} in {self.path}" if self._path else why

    # -- numbers of heads --------------------------------------------------------------------

    def counts_heads(self, heads: int, size: int) -> list[tuple[str, int]]:
        """Attributes of the running module that count its heads, or the channels of all heads.

        Each with how many channels of a head it counts.
        """
        owner = self._model.get_submodule(self._path[-1])
        # torch's own insists on the width that it was made for.
        module = {} if isinstance(owner, nn.MultiheadAttention) else vars(owner)
        found = [(name, 1) for name in HEADS if module.get(name) == heads]
        if not found:
            return []
        return found + [(name, size) for name in HEAD_CHANNELS if module.get(name) == heads * size]

    def count_heads(self, ids: Tensor, size: int) -> None:
        """The running module has the heads ``ids`` of so many channels each."""
        for name, each in self.counts_heads(len(ids), size):
            self.findings.counts[self._path[-1], name] = ids.repeat_interleave(each)

    def count_parts(self, ids: Tensor, size: int) -> None:
        """The running module splits the channels ``ids`` into parts of so many."""
        module = self._model.get_submodule(self._path[-1]) if self._path else self._model
        for name in PARTS:
            for counted in (ids, ids[:size]):
                if vars(module).get(name) == len(counted):
                    self.findings.counts[self._path[-1], name] = counted

    # -- labels of parameters ----------------------------------------------------------------

    def weight(self, tensor: Tensor) -> Weight | None:
        """The parameter or buffer that ``tensor`` is, up to a permutation of its axes."""
        name = self._names.get(id(tensor))
        if name is None:
            return self._mark_of(tensor).weight
        # Integers index and count, single numbers scale everything: neither has channels.
        if not tensor.is_floating_point() or (tensor.ndim < 2 and tensor.numel() < 2):
            return None
        return name, tuple(range(tensor.ndim))

    def mark_weight(self, tensor: Tensor, weight: Weight) -> None:
        """``tensor`` is a parameter or buffer with its axes in another order."""
        setattr(tensor, _MARK, _Mark(self.units, weight=weight))

    def bind(self, weight: Weight, dim: int, ids: Tensor, role: Role) -> None:
        """Tie the axis of a layer's weight to the units it makes or reads."""
        name, axes = weight
        known = self.findings.weights.setdefault(name, {})
        axis = axes[dim]
        if name in self.findings.elements:
            self._refuse_mixed(name)
        known[axis] = self.unite(known[axis], ids) if axis in known else ids
        self.findings.roles.setdefault((name, axis), role)
        if role == "makes":
            self.findings.roles[name, axis] = role

    def attach(self, tensor: Tensor | None, labels: Tensor) -> None:
        """Tie a bias, norm affine or other elementwise operand to ``labels`` of its shape."""
        if tensor is None:
            return
        weight = self.weight(tensor)
        if weight is None or weight[0] in self.findings.elements:
            if tensor.numel() > 1:
                self.unite(self.labels(tensor), labels)
        else:
            self._adopt(weight, labels)

    def _adopt(self, weight: Weight, labels: Tensor) -> None:
        name, axes = weight
        if name in self.findings.weights:
            self._refuse_mixed(name)
        inverse = sorted(range(len(axes)), key=axes.__getitem__)
        self.findings.elements[name] = self.units.compact(labels).permute(inverse)

    def _parameter_labels(self, weight: Weight) -> Tensor:
        name, axes = weight
        if name not in self.findings.elements:
            tensor = model_tensor(self._model, name)
            fresh = self.units.fresh(tensor.numel()).view(tensor.shape)
            self._adopt((name, tuple(range(tensor.ndim))), fresh)
        return self.findings.elements[name].permute(axes)

    def _refuse_mixed(self, name: str) -> NoReturn:
        raise UnsupportedOperation(
            f"tensor {name} is both a layer's weight and an elementwise operand in {self.path}: "
            "its channels cannot be followed; use two tensors"
        )


def _given_to(path: str) -> str:
    """Under which name the labels of a module's arguments are kept."""
    return f"{path} (given)"
