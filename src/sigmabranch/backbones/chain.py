"""Where any network may be cut: its own forward, read as modules applied one after another.

The forward is followed symbolically with the network's modules as black boxes, so that nothing but
the glue between them has to be understood. A place where a single tensor is alive is a possible
cut. What lies between two cuts is a module of the network, or else a small graph of its own.
"""

from __future__ import annotations

import inspect
import io
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sigmabranch.backbones.base import Backbone
from sigmabranch.backbones.pools import PoolByRank, channel_dim, pool_of
from sigmabranch.coupling import evaluating
from sigmabranch.errors import ConversionError

# A black box with more than this share of the network's parameters is opened, if that gives cuts.
_LARGE = 0.3
# A network that changes its shape less often is uniform, and gets this many equal stages.
_CHANGES, _PARTS = 2, 4
# Dimensions of the input → how often to repeat it for a larger one: the first that is legal.
_LARGER = {3: ((1, 2, 1), (1, 1, 2)), 4: ((1, 1, 2, 2),)}


class ChainModel(nn.Module):
    """The same network as its modules in a row; they are those of the original, under its names."""

    def __init__(self, original: nn.Module, steps: Sequence[_Step]) -> None:
        super().__init__()
        names = {step.path.partition(".")[0] for step in steps if step.glue is None}
        for name, child in original.named_children():
            if name in names:
                self.add_module(name, child)
        for step in steps:
            if step.glue is not None:
                self.add_module(step.path, step.glue)
        self.paths = tuple(step.path for step in steps)

    def forward(self, x: Tensor) -> Any:
        """What the original returns."""
        for path in self.paths:
            x = self.get_submodule(path)(x)
        return x


@dataclass(frozen=True, slots=True)
class _Step:
    """One link of the chain: a module of the network, or glue under a new name."""

    path: str
    glue: fx.GraphModule | None = None


def chain_backbone(model: nn.Module, example: Tensor, pool: str = "mean") -> Backbone:
    """Find a network's chain, stages, pool and head by following its forward.

    Args:
        model: (B, ...) → (B, V) logits; read, never changed.
        example: a legal input, (1, ...), on the model's device.
        pool: what routers see of a feature: ``"mean"`` over all positions, or ``"first"`` of the
            tokens, which is the class token where there is one.

    Raises:
        ConfigError: an unknown pool.
        ConversionError: the forward branches on values, or is one piece that cannot be cut.
    """
    example = example.clone()  # which an in-place operation would change
    with evaluating(model), torch.no_grad(), _unmarked(model):
        chained = ChainModel(model, _steps(model, example))
        shapes = _shapes(chained, example)
    paths = chained.paths
    first = _head_start(chained, shapes)
    if first < 2:
        raise ConversionError(
            f"{type(model).__name__} cannot be cut before its head ({' → '.join(paths)}): "
            "describe it with a Backbone of its own"
        )
    lies = _layouts(shapes, first, mean=pool == "mean")
    stages = _stages(chained, paths[:first], shapes, lies)
    if not stages:
        raise ConversionError(
            f"{type(model).__name__} can be cut nowhere, because {_largest_piece(chained)} hands "
            "on several tensors at once: describe it with a Backbone of its own"
        )
    return Backbone(
        model=chained,
        original=model,
        chain=paths[:first],
        stages=stages,
        pool=_pool(pool, lies, [sizes[first] for sizes in shapes]),
        head=paths[first:],
        head_pools=True,
    )


@contextmanager
def _unmarked(model: nn.Module) -> Iterator[None]:
    """Take away the constants that fx hangs on the network it follows."""
    before = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - before:
            delattr(model, name)


# -- reading the forward -------------------------------------------------------------------------


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


def _steps(model: nn.Module, example: Tensor) -> list[_Step]:
    """The finest chain that opening large modules gives."""
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


def _modules(steps: Sequence[_Step]) -> int:
    return sum(step.glue is None for step in steps)


def _largest(model: nn.Module, steps: Sequence[_Step], refused: set[str]) -> str | None:
    """A black box that holds much of the network and is no layer of torch itself."""
    limit = _LARGE * _count(model)
    for step in steps:
        if step.glue is None and step.path not in refused:
            module = model.get_submodule(step.path)
            if not type(module).__module__.startswith("torch.") and _count(module) > limit:
                return step.path
    return None


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _followed(model: nn.Module, example: Tensor, opened: set[str]) -> list[_Step]:
    arguments = list(inspect.signature(model.forward).parameters.values())[1:]
    fixed = {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}
    outline = _Outline(example, opened)
    try:
        with _unheard():
            graph = outline.trace(model, concrete_args=fixed)
    except Exception as error:  # the forward is foreign code and may fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"the forward of {type(model).__name__} cannot be followed ({reason}): describe it "
            "with a sigmabranch.Backbone that names its chain, stages, pool and head"
        ) from error
    return list(_cut(model, graph, outline.values))


def _cut(model: nn.Module, graph: fx.Graph, values: Mapping[fx.Node, Any]) -> Iterator[_Step]:
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
) -> _Step:
    (node, *others) = piece
    plain = not others and node.op == "call_module" and node.args == (source,) and not node.kwargs
    # A module that is called again is wrapped, because a link is known by its path.
    if plain and names.is_first(str(node.target)):
        return _Step(str(node.target))
    members = _reached(piece, lambda node: set(node.all_input_nodes) - moving) | set(piece)
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}
    for node in source.graph.nodes:
        if node in members:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[piece[-1]])
    return _Step(names.fresh(piece[-1]), fx.GraphModule(model, graph))


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


# -- where stages begin, and the head ------------------------------------------------------------


def _shapes(chained: ChainModel, example: Tensor) -> list[list[tuple[int, ...]]]:
    """Shapes of the input and of every link's output, for the example and for one twice as large.

    The second is missing where the network takes one size only.
    """
    found = [list(_walk(chained, example))]
    for times in _LARGER.get(example.ndim, ()):
        # Foreign code may refuse in any way.
        with _unheard(), suppress(Exception):
            found.append(list(_walk(chained, example.repeat(times))))
            break
    return found


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep to ourselves what fx tells on stderr of a forward that fails."""
    with redirect_stderr(io.StringIO()):
        yield


def _walk(chained: ChainModel, feature: Tensor) -> Iterator[tuple[int, ...]]:
    for path in (None, *chained.paths):
        if path is not None:
            feature = chained.get_submodule(path)(feature)
        if not isinstance(feature, Tensor):
            raise ConversionError(
                f"module {path!r} returns no tensor: describe the network with a Backbone"
            )
        yield tuple(feature.shape[1:])


def _head_start(chained: ChainModel, shapes: list[list[tuple[int, ...]]]) -> int:
    """Position in the chain of the first link from which on there are vectors, not maps."""
    if len(shapes[0][-1]) != 1:
        raise ConversionError(
            f"the network returns {shapes[0][-1]} per input, not one vector of logits"
        )
    if _is_vector(shapes[0][0]):  # vectors all the way: the head is the last layer
        return max(i for i, path in enumerate(chained.paths) if _is_layer(chained, path))
    maps = [i for sizes in shapes for i, size in enumerate(sizes) if not _is_vector(size)]
    return max(maps)


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) <= 1


def _largest_piece(chained: ChainModel) -> str:
    """The largest link, or the largest module that is called in it."""
    path = max(chained.paths, key=lambda path: _count(chained.get_submodule(path)))
    link = chained.get_submodule(path)
    if not isinstance(link, fx.GraphModule):
        return path
    called = [str(node.target) for node in link.graph.find_nodes(op="call_module")]
    return max(called, key=lambda name: _count(link.get_submodule(name)), default=path)


def _is_layer(chained: ChainModel, path: str) -> bool:
    """Whether a link has weights, not norms or tokens alone."""
    weights = chained.get_submodule(path).named_parameters()
    return any(p.ndim > 1 and name.endswith("weight") for name, p in weights)


def _layouts(
    shapes: Sequence[Sequence[tuple[int, ...]]], last: int, *, mean: bool
) -> Mapping[int, int]:
    """Number of dimensions → that of the channels in the last such feature of the chain.

    Of tokens the first is read only where the last feature has tokens, too.
    """
    known: dict[int, int] = {}
    for number in range(last, 0, -1):
        dim = _channel_dim(shapes, number)
        if dim is not None and (mean or number == last):
            known.setdefault(len(shapes[0][number]) + 1, dim)
    return known


def _channel_dim(shapes: Sequence[Sequence[tuple[int, ...]]], number: int) -> int | None:
    """The dimension of the channels in what a link is given; None where that cannot be told."""
    try:
        return channel_dim([sizes[number] for sizes in shapes])
    except ConversionError:
        return None


def _pool(name: str, lies: Mapping[int, int], last: Sequence[tuple[int, ...]]) -> nn.Module:
    """What routers see of the features."""
    maps = {rank: dim for rank, dim in lies.items() if rank > 2}
    if len({dim == 1 for dim in maps.values()}) < 2:
        return pool_of(name, channel_dim(last))
    return PoolByRank({rank: pool_of(name, dim) for rank, dim in maps.items()})


def _stages(
    chained: ChainModel,
    chain: Sequence[str],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    lies: Mapping[int, int],
) -> tuple[str, ...]:
    """The links that change the feature's shape; equal parts of a network that hardly does.

    What they are given must be a feature that the pool can read.
    """
    shape = shapes[0]
    layers = [
        number
        for number, path in enumerate(chain)
        if number
        and _is_layer(chained, path)
        and lies.get(len(shape[number]) + 1) == _channel_dim(shapes, number)
    ]
    changing = [number for number in layers if shape[number] != shape[number + 1]]
    if len(changing) < _CHANGES:
        count = min(_PARTS, len(layers))
        changing = [layers[len(layers) * part // count] for part in range(count)]
    return tuple(chain[number] for number in changing)
