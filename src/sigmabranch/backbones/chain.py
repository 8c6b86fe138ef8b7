"""Where any network may be cut: between the steps of its own forward, as its features lie there.

A step is a module of the network, or else a small graph of its own. Stages begin where features
change their shape, and the head where they become vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from sigmabranch.backbones.base import Backbone
from sigmabranch.backbones.forward import Step, parameter_count, steps_of
from sigmabranch.backbones.pools import PoolByRank, channel_dim, pool_of
from sigmabranch.coupling import evaluating, unheard
from sigmabranch.errors import ConversionError

# A network that changes its shape less often is uniform, and gets this many equal stages.
_CHANGES, _PARTS = 2, 4
# Dimensions of the input → how often to repeat it for a larger one: the first that is legal.
_LARGER = {3: ((1, 2, 1), (1, 1, 2)), 4: ((1, 1, 2, 2),)}


class ChainModel(nn.Module):
    """The same network as its modules in a row; they are those of the original, under its names."""

    def __init__(self, original: nn.Module, steps: Sequence[Step]) -> None:
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
    with evaluating(model), torch.no_grad():
        chained = ChainModel(model, steps_of(model, example))
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


def _shapes(chained: ChainModel, example: Tensor) -> list[list[tuple[int, ...]]]:
    """Shapes of the input and of every link's output, for the example and for one twice as large.

    The second is missing where the network takes one size only.
    """
    found = [list(_walk(chained, example))]
    for times in _LARGER.get(example.ndim, ()):
        # Foreign code may refuse in any way.
        with unheard(), suppress(Exception):
            found.append(list(_walk(chained, example.repeat(times))))
            break
    return found


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
    path = max(chained.paths, key=lambda path: parameter_count(chained.get_submodule(path)))
    link = chained.get_submodule(path)
    if not isinstance(link, fx.GraphModule):
        return path
    called = [str(node.target) for node in link.graph.find_nodes(op="call_module")]
    return max(called, key=lambda name: parameter_count(link.get_submodule(name)), default=path)


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
