"""How wide a dense network must be to cost as much as one path of a tree."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sigmabranch.backbones import ModelSpec
from sigmabranch.errors import ConfigError
from sigmabranch.measure import count_parameters
from sigmabranch.tasks import Task
from sigmabranch.tasks.counting import example, sketch
from sigmabranch.tree import TreeSpec

TOLERANCE = 0.01


@cache
def active_params(task: Task) -> int:
    """Parameters of the largest path of the task's tree, without counting its operations."""
    _, net = sketch(task)
    return max(count_parameters([net.path(leaf)]) for leaf in net.tree.leaves)


@cache
def tree_of_share(task: Task, share: float) -> TreeSpec:
    """The task's tree, its level widths changed alike until a path is ``share`` of the dense.

    Raises:
        ConfigError: the trunk alone is larger, or the levels would be wider than their sources.
    """
    _, net = sketch(task)
    widths, goal = net.record["widths"], share * count_parameters([task.model.build()])

    def scaled(step: int) -> TreeSpec:
        return replace(task.tree, widths=tuple(max(1, round(w * step / 50)) for w in widths))

    def size(step: int) -> int:
        try:
            return active_params(replace(task, tree=scaled(step)))
        except ConfigError:  # wider than the network
            return 2**62

    step = bisect_left(range(1, 151), goal, key=size) + 1
    near = min({max(1, step - 1), step}, key=lambda step: abs(size(step) - goal))
    if abs(size(near) - goal) > 5 * TOLERANCE * goal:
        raise ConfigError(
            f"no widths of the tree make a path {share:.0%} of the network of {task.name}: "
            f"the nearest is {size(near) / goal * share:.0%}"
        )
    return scaled(near)


def at_share(task: Task, share: float | None) -> Task:
    """``task`` with a tree whose paths are ``share`` of the dense network; as it is if None.

    Raises:
        ConfigError: see :func:`tree_of_share`.
    """
    return task if share is None else replace(task, tree=tree_of_share(task, share))


def check_share(share: float | None) -> None:
    """Raise :class:`ConfigError` at a share that no path can have."""
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"active_share must be between 0 and 1, got {share}")


@cache
def dense_of_size(spec: ModelSpec, params: int) -> ModelSpec:
    """The narrower network of the same depth whose size is nearest to ``params``.

    All widths shrink by one factor, the widest a little more or less to hit the size.

    Raises:
        ConfigError: no width comes within one percent.
    """
    return _narrowed(
        spec, params, "parameters", lambda candidate: count_parameters([_shape(candidate)])
    )


@cache
def dense_within(spec: ModelSpec, params: int) -> ModelSpec:
    """The largest narrower network of the same depth that has at most ``params``.

    Raises:
        ConfigError: even the narrowest has more.
    """

    def measure(candidate: ModelSpec) -> int:
        return count_parameters([_shape(candidate)])

    sizes = {near: measure(near) for near in _near(spec, params, measure, nudges=range(-2, 3))}
    fitting = [candidate for candidate, size in sizes.items() if size <= params]
    if not fitting:
        raise ConfigError(
            f"no narrower network has at most {params:,} parameters: the narrowest has "
            f"{min(sizes.values()):,}"
        )
    return max(fitting, key=lambda candidate: sizes[candidate])


@cache
def dense_of_products(task: Task, products: int) -> ModelSpec:
    """The narrower network whose convolutions and matrix products are nearest to ``products`` MACs.

    Raises:
        ConfigError: no width comes within one percent.
    """
    blank = example(task).to("meta")

    def count(candidate: ModelSpec) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _shape(candidate).eval()(blank)
        return counter.get_total_flops() // 2

    return _narrowed(task.model, products, "MACs", count)


def _narrowed(
    spec: ModelSpec, goal: int, what: str, measure: Callable[[ModelSpec], int]
) -> ModelSpec:
    # Small networks have few widths: there the last one departs further from the common factor.
    for steps, nudges in ((2, 1), (40, 4)):
        near = _near(spec, goal, measure, nudges=range(-nudges, nudges + 1), steps=steps)
        best = min(near, key=lambda candidate: abs(measure(candidate) - goal))
        if abs(measure(best) - goal) <= TOLERANCE * goal:
            return best
    raise ConfigError(
        f"no narrower network has {goal:,} {what} within {TOLERANCE:.0%}: the nearest "
        f"has {measure(best):,}"
    )


def _near(
    spec: ModelSpec,
    goal: int,
    measure: Callable[[ModelSpec], int],
    *,
    nudges: Iterable[int],
    steps: int = 2,
) -> list[ModelSpec]:
    """The narrower networks on both sides of the size, so many thousandths of the width away."""
    grid = range(1, 1001)
    middle = bisect_left(grid, goal, key=lambda step: measure(spec.narrowed(step / 1000, 0)))
    near = (
        spec.narrowed(step / 1000, nudge)
        for step in grid[max(0, middle - steps) : middle + steps]
        for nudge in nudges
    )
    return list(dict.fromkeys(near))


def _shape(spec: ModelSpec) -> nn.Module:
    with torch.device("meta"):
        return spec.build()
