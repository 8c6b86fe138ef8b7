"""Specs from JSON: every key is known, and every value is of its field's type."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from sigmabranch.errors import ConfigError

Spec = TypeVar("Spec")


def from_fields(kind: type[Spec], what: str, value: Mapping[str, Any]) -> Spec:
    """A dataclass of ``kind`` from its JSON form; missing keys keep their defaults.

    Whole numbers pass for floats, lists for tuples.

    Args:
        kind: a dataclass of numbers, strings, booleans, and tuples of them.
        what: how a message calls it, such as ``"recipe"``.
        value: field name → value.

    Raises:
        ConfigError: an unknown or missing key, or a value of another type.
    """
    hints = get_type_hints(kind)
    if not isinstance(value, Mapping):
        raise ConfigError(f"a {what} is a set of named values, got {value!r}")
    for name in value:
        if name not in hints:
            near = " or ".join(difflib.get_close_matches(name, hints, n=3))
            hint = f"did you mean {near}?" if near else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown {what} key {name!r}: {hint}")
    typed = {name: _typed(f"{what} {name}", item, hints[name]) for name, item in value.items()}
    try:
        return kind(**typed)
    except TypeError as error:
        raise ConfigError(f"not a {what}: {error}") from error


def to_fields(value: Any) -> Any:
    """The JSON form of one field's value: tuples as lists."""
    return [to_fields(item) for item in value] if isinstance(value, tuple) else value


def _typed(where: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` says, or :class:`ConfigError`."""
    if get_origin(hint) is Literal:
        return value  # the spec itself names the choices
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        parts = _parts(value, get_args(hint))
        if parts is not None:
            return tuple(_typed(where, item, part) for item, part in parts)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise ConfigError(f"{where} must be {_name(hint)}, got {value!r}")


def _parts(value: Any, hints: tuple[Any, ...]) -> list[tuple[Any, Any]] | None:
    """Each item of a tuple with its type; None if there are too many or too few."""
    if not isinstance(value, list | tuple):
        return None
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    return list(zip(value, hints, strict=True)) if len(value) == len(hints) else None


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)
