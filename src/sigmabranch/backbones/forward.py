"""A network's forward, read as steps applied one after another.

The forward is followed symbolically with the network's modules as black boxes, so that nothing but
the glue between them has to be understood. A step ends wherever a single tensor is alive.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sigmabranch.coupling import unheard
from sigmabranch.errors import ConversionError

# A black box with more than this share of the network's parameters is opened, if that gives cuts.
_LARGE = 0.3


@dataclass(frozen=True, slots=True)
class Step:
    """One link of the chain: a module of the network, or glue under a new name."""

    path: str
    glue: fx.GraphModule | None = None


def steps_of(model: nn.Module, example: Tensor) -> list[Step]:
    """The finest chain that opening large modules gives.

    Args:
        model: as in evaluation; read, never changed.
        example: a legal input, (1, ...), on the model's device.

    Raises:
        ConversionError: the forward branches on values, or does not end in one tensor.
    """
    with _unmarked(model):
        return _finest(model, example)


def _finest(model: nn.Module, example: Tensor) -> list[Step]:
    opened: set[str] = set()
    steps = _followed(model, example, opened)
    refused: set[str] = set()
    while (path := _largest(model, steps, refused)) is not None:
        try:
            finer = _followed(model, example, {*opened, path})
        except ConversionError:
            finer = steps
        if _modules(finer) > _modules(steps):
            opened, steps = {*opened, path}, finer
        else:
            refused.add(path)
    return steps


def _modules(steps: Sequence[Step]) -> int:
    return sum(step.glue is None for step in steps)


def _largest(model: nn.Module, steps: Sequence[Step], refused: set[str]) -> str | None:
    """A black box that holds much of the network and is no layer of torch itself."""
    limit = _LARGE * parameter_count(model)
    for step in steps:
        if step.glue is None and step.path not in refused:
            module = model.get_submodule(step.path)
            if not type(module).__module__.startswith("torch.") and parameter_count(module) > limit:
                return step.path
    return None


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, each once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _followed(model: nn.Module, example: Tensor, opened: set[str]) -> list[Step]:
    arguments = list(inspect.signature(model.forward).parameters.values())[1:]
    fixed = {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}
    outline = _Outline(example, opened)
    try:
        with unheard():
            graph = outline.trace(model, concrete_args=fixed)
    except Exception as error:  # the forward is foreign code and may fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"the forward of {type(model).__name__} cannot be followed ({reason}): describe it "
            "with a sigmabranch.Backbone that names its chain, stages, pool and head"
        ) from error
    return list(_cut(model, graph, outline.values))


def _cut(model: nn.Module, graph: fx.Graph, values: Mapping[fx.Node, Any]) -> Iterator[Step]:
    """Split a graph wherever one tensor alone is alive."""
    (end,) = graph.find_nodes(op="output")
    source = next(node for node in graph.nodes if node.op == "placeholder")
    needed = _reached([end], lambda node: node.all_input_nodes)
    # What the input does not decide is no cut; it is made anew in every piece that uses it.
    moving = _reached([source], lambda node: node.users) & needed
    nodes = [node for node in graph.nodes if node in moving and node not in (source, end)]
    if not nodes:
        raise ConversionError(f"the output of {type(model).__name__} does not depend on its input")
    order = {node: position for position, node in enumerate([*nodes, end])}
    last_use = {
        node: max(order[user] for user in node.users if user in moving) for node in moving - {end}
    }
    names, piece, alive = _Names(model), [], {source}
    for position, node in enumerate(nodes):
        piece.append(node)
        alive = {other for other in {*alive, node} if last_use[other] > position}
        if alive == {node} and isinstance(values[node], Tensor):
            yield _step(model, source, piece, moving, names)
            source, piece = node, []
    if piece:
        raise ConversionError(f"{type(model).__name__} does not return one tensor of logits")


def _step(
    model: nn.Module, source: fx.Node, piece: list[fx.Node], moving: set[fx.Node], names: _Names
) -> Step:
    (node, *others) = piece
    plain = not others and node.op == "call_module" and node.args == (source,) and not node.kwargs
    # A module that is called again is wrapped, because a link is known by its path.
    if plain and names.is_first(str(node.target)):
        return Step(str(node.target))
    members = _reached(piece, lambda node: set(node.all_input_nodes) - moving) | set(piece)
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}
    for node in source.graph.nodes:
        if node in members:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[piece[-1]])
    return Step(names.fresh(piece[-1]), fx.GraphModule(model, graph))


def _reached(
    start: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """``start`` and everything that leads on from it."""
    found: set[fx.Node] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += neighbours(node)
    return found


class _Names:
    """Paths of the links: those of modules once each, and new names for glue."""

    def __init__(self, model: nn.Module) -> None:
        self._taken = set(dir(model)) | {name for name, _ in model.named_children()}
        self._called: set[str] = set()

    def is_first(self, path: str) -> bool:
        """Whether no link is called ``path`` yet; from now on one is."""
        is_first = path not in self._called
        self._called.add(path)
        return is_first

    def fresh(self, node: fx.Node) -> str:
        """A name after the operation that ends the glue."""
        name = node.name.replace(".", "_")
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


@contextmanager
def _unmarked(model: nn.Module) -> Iterator[None]:
    """Take away the constants that fx hangs on the network it follows."""
    before = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - before:
            delattr(model, name)


class _Outline(fx.Tracer):
    """Follows a forward; only plain sequences and the ``opened`` modules are looked into.

    Every value is computed along the way, so that conditions on shapes have answers; conditions on
    what an input holds have none that hold for all inputs, and are refused.
    """

    def __init__(self, example: Tensor, opened: Iterable[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self.example, self.opened = example, set(opened)
        self.values: dict[fx.Node, Any] = {}
        self._computing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` stays a black box."""
        return type(m) is not nn.Sequential and module_qualified_name not in self.opened

    def create_node(self, kind: str, target: Any, *described: Any, **more: Any) -> fx.Node:
        """As fx does; the value that stands behind the node is computed too."""
        node = super().create_node(kind, target, *described, **more)
        self.values[node] = self._computed(node) if self.values else self.example
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that knows its length."""
        return _Proxy(node, self)

    def _computed(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "output") or node.target is torch._assert:
            return None
        if node.target in ("item", "tolist"):
            raise ValueError(f"it reads what a tensor holds, by {node.target}()")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        args, kwargs = _mutable(args), _mutable(kwargs)
        target = str(node.target)
        self._computing = True
        try:
            if node.op == "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            return _attribute(self.root, target)
        finally:
            self._computing = False

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """As fx does, but while a value is computed modules just run."""
        if self._computing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As fx does, but while a value is computed parameters are themselves."""
        if self._computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The answer, if it depends on shapes alone."""
        value = self.values[obj.node]
        return super().to_bool(obj) if isinstance(value, Tensor) else bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """As many items as the example gives."""
        value = self.values[obj.node]
        if not isinstance(value, Sequence):
            return super().iter(obj)
        return iter([operator.getitem(obj, position) for position in range(len(value))])  # type: ignore[call-overload]


def _mutable(value: Any) -> Any:
    """fx's lists and dictionaries as plain ones, which a forward may change."""
    if isinstance(value, dict):
        return {key: _mutable(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return (list if isinstance(value, list) else tuple)(map(_mutable, value))
    return value


class _Proxy(fx.Proxy):
    def __len__(self) -> int:
        return len(self.tracer.values[self.node])  # type: ignore[attr-defined]


def _attribute(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)
