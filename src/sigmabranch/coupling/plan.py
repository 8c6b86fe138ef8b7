"""The cut itself, as plain data: which positions of which tensors are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sigmabranch.coupling.map import HEAD_CHANNELS, HEADS, PARTS, is_under
from sigmabranch.errors import ConfigError, ConversionError

Value: TypeAlias = int | tuple[int, ...]

_SCHEMA = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class SlicePlan:
    """What to keep of a network, and which attributes of its modules change with it.

    Attributes:
        keep: tensor name -> axis -> kept positions, int64 ascending. Tensors and axes that are
            kept whole are absent.
        edits: module path -> attribute -> new value.
        gather: where the modules are to be given some channels of their input only: along which
            dimension, and which positions.
        gathered_by: the module that is given them; the first if None.
        source: :func:`fingerprint` of the network the positions refer to.
    """

    keep: Mapping[str, Mapping[int, Tensor]]
    edits: Mapping[str, Mapping[str, Value]]
    source: str
    gather: tuple[int, Tensor] | None = None
    gathered_by: str | None = None

    def apply(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """The sliced copy of a state dict; the tensors of ``state`` are not touched or shared.

        Args:
            state: all tensors of the network, or those of its module at ``prefix``.
            prefix: path of that module; names in ``state`` are relative to it.

        Raises:
            ConversionError: ``state`` lacks a tensor, or a tensor is smaller than the plan expects.
        """
        keep = _relative(self.keep, prefix)
        missing = keep.keys() - state.keys()
        if missing:
            raise ConversionError(
                f"the plan cuts tensor {min(missing)}, which the state dict lacks: it was made for "
                "another network"
            )
        return {
            name: _select(tensor.detach(), keep.get(name, {}), name).clone()
            for name, tensor in state.items()
        }

    def restrict(self, prefixes: Iterable[str]) -> SlicePlan:
        """The part of the plan that concerns the modules at ``prefixes``."""
        prefixes = tuple(prefixes)
        return replace(
            self,
            keep={name: axes for name, axes in self.keep.items() if is_under(name, prefixes)},
            edits={name: edit for name, edit in self.edits.items() if is_under(name, prefixes)},
        )

    def then(self, other: SlicePlan) -> SlicePlan:
        """The one plan that does this and then ``other``, whose positions count what is left.

        Raises:
            ConversionError: ``other`` keeps a position that this plan no longer has.
        """
        keep = {name: dict(axes) for name, axes in self.keep.items()}
        for name, axes in other.keep.items():
            mine = keep.setdefault(name, {})
            for axis, index in axes.items():
                mine[axis] = _take(mine[axis], index, 0, name) if axis in mine else index
        edits = {name: dict(edit) for name, edit in self.edits.items()}
        for name, edit in other.edits.items():
            edits.setdefault(name, {}).update(edit)
        return replace(self, keep=keep, edits=edits)

    def reshape(self, root: nn.Module, prefix: str = "") -> None:
        """Cut a module in place: its parameters, its buffers, and the attributes that name sizes.

        Works on real tensors and on the meta device, and keeps tied parameters tied.

        Args:
            root: the network, or a copy of its module at ``prefix``.
            prefix: path of that module in the network.

        Raises:
            ConversionError: ``root`` lacks a module or tensor of the plan, or one is too small.
        """
        done: dict[int, Tensor] = {}
        for name, axes in _relative(self.keep, prefix).items():
            owner, _, attribute = name.rpartition(".")
            module = _submodule(root, owner)
            tensor = getattr(module, attribute, None)
            if not isinstance(tensor, Tensor):
                raise ConversionError(f"the plan cuts tensor {name}, which the module lacks")
            if id(tensor) not in done:
                cut = _replacement(tensor, axes, name)
                # A module with two names is met again when its tensors are cut already.
                done[id(tensor)] = done[id(cut)] = cut
            setattr(module, attribute, done[id(tensor)])
        for path, edit in _relative(self.edits, prefix).items():
            module = _submodule(root, path)
            for attribute, value in edit.items():
                setattr(module, attribute, value)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {
            "schema": _SCHEMA,
            "source": self.source,
            "keep": {
                name: {str(axis): index.tolist() for axis, index in axes.items()}
                for name, axes in self.keep.items()
            },
            "edits": {
                path: {key: list(v) if isinstance(v, tuple) else v for key, v in edit.items()}
                for path, edit in self.edits.items()
            },
            **self._gather_dict(),
        }

    def _gather_dict(self) -> dict[str, Any]:
        if self.gather is None:
            return {}
        by = {} if self.gathered_by is None else {"by": self.gathered_by}
        return {"gather": {"dim": self.gather[0], "positions": self.gather[1].tolist(), **by}}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SlicePlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: another schema, an unknown key, or values that are not a plan.
        """
        if value.get("schema") != _SCHEMA:
            raise ConfigError(f"plan schema is {value.get('schema')!r}, expected {_SCHEMA}")
        unknown = value.keys() - {"schema", "source", "keep", "edits", "gather"}
        if unknown:
            raise ConfigError(f"unknown plan key {min(unknown)!r}")
        try:
            return cls(
                keep={
                    name: {_natural(int(axis)): _positions(index) for axis, index in axes.items()}
                    for name, axes in value["keep"].items()
                },
                edits={
                    path: {key: _attribute(key, item) for key, item in edit.items()}
                    for path, edit in value["edits"].items()
                },
                source=str(value["source"]),
                gather=_gather(value.get("gather")),
                gathered_by=_gathered_by(value.get("gather")),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a plan: {error}") from error

    def parameter_counts(self, model: nn.Module) -> tuple[int, int]:
        """Parameters of the uncut ``model`` and of what the plan leaves of it."""
        shapes = list(self._shapes(model))
        return sum(old.numel() for _, old, _ in shapes), sum(new.numel() for _, _, new in shapes)

    def explain(self, model: nn.Module) -> str:
        """One line per parameter that changes, and the totals."""
        lines = [
            f"{name}: {_times(old)} -> {_times(new)}"
            for name, old, new in self._shapes(model)
            if old != new
        ]
        before, after = self.parameter_counts(model)
        return "\n".join([*lines, f"parameters: {before:,} -> {after:,}"])

    def _shapes(self, model: nn.Module) -> Iterator[tuple[str, torch.Size, torch.Size]]:
        for name, tensor in model.named_parameters():
            kept = {axis: len(index) for axis, index in self.keep.get(name, {}).items()}
            new = [kept.get(axis, size) for axis, size in enumerate(tensor.shape)]
            yield name, tensor.shape, torch.Size(new)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, shapes and types of the tensors in ``state``, not of their values."""
    lines = sorted(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# -- applying ------------------------------------------------------------------------------------


def _relative(by_name: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under the module path ``prefix``, by their names inside it."""
    return {
        name[len(prefix) :].removeprefix("."): value
        for name, value in by_name.items()
        if is_under(name, [prefix])
    }


def _take(tensor: Tensor, index: Tensor, axis: int, name: str) -> Tensor:
    if axis >= tensor.ndim or (len(index) and int(index.max()) >= tensor.shape[axis]):
        raise ConversionError(
            f"the plan keeps position {int(index.max())} along axis {axis} of {name}, which has "
            f"shape {tuple(tensor.shape)}: it was made for another network"
        )
    return tensor.index_select(axis, index.to(tensor.device))


def _select(tensor: Tensor, axes: Mapping[int, Tensor], name: str) -> Tensor:
    for axis, index in axes.items():
        tensor = _take(tensor, index, axis, name)
    return tensor


def _replacement(tensor: Tensor, axes: Mapping[int, Tensor], name: str) -> Tensor:
    sliced = _select(tensor.detach(), axes, name)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(sliced, requires_grad=tensor.requires_grad)
    return sliced


def _submodule(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise ConversionError(f"the plan edits module {path}, which the network lacks") from None


# -- reading -------------------------------------------------------------------------------------


def _gather(value: Any) -> tuple[int, Tensor] | None:
    if value is None:
        return None
    return _natural(value["dim"]), _positions(value["positions"])


def _gathered_by(value: Any) -> str | None:
    path = None if value is None else value.get("by")
    if path is not None and type(path) is not str:
        raise ValueError(f"{path!r} is no module path")
    return path


def _positions(index: Any) -> Tensor:
    positions = torch.tensor([_natural(position) for position in index], dtype=torch.int64)
    if bool((positions.diff() <= 0).any()):
        raise ValueError("positions must ascend")
    return positions


def _attribute(name: str, value: Any) -> Value:
    if name not in _ATTRIBUTES:
        raise ValueError(f"unknown module attribute {name!r}")
    return tuple(map(_natural, value)) if isinstance(value, list) else _natural(value)


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected an integer from 0 up, got {value!r}")
    return value


_ATTRIBUTES = {
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features",
    "num_channels", "normalized_shape", "embedding_dim", "num_parameters", *HEADS, *HEAD_CHANNELS,
    *PARTS, "shape",
}  # fmt: skip


def _times(shape: torch.Size) -> str:
    return "x".join(map(str, shape))
