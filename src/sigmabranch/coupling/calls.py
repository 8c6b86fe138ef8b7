"""One operation of a running model, and the registry of what operations do to labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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
    """Register a rule for the aten operations in the blank-separated list ``names``.

    The name ``pointwise`` stands for all that PyTorch itself declares to work element by element.
    """

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def find_rule(func: Any) -> Rule | None:
    """The rule for an operation, or None: such an operation must not meet a label."""
    namespace, name = func._schema.name.split("::")
    if namespace != "aten":
        return None
    if name in _RULES:
        return _RULES[name]
    return _RULES["pointwise"] if torch.Tag.pointwise in func.tags else None
