"""Networks that a command line names: of timm, or of a Python file of the user's."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from sigmabranch.backbones.timm import create_timm
from sigmabranch.errors import ConfigError
from sigmabranch.tasks import TASKS
from sigmabranch.tree import TreeSpec

_FORMS = "timm:NAME or PATH.py:CLASS"


def open_tree(settings: Sequence[str] | None) -> TreeSpec:
    """The tree that ``tree.KEY=VALUE`` settings describe, for a network without a task.

    Raises:
        ConfigError: another setting, or a value that does not fit.
    """
    for setting in settings or ():
        if not setting.startswith("tree."):
            raise ConfigError(f"--set {setting}: only tree settings mean something without a task")
    any_task = replace(next(iter(TASKS.values())), tree=TreeSpec())
    return any_task.with_settings(settings or ()).tree


def open_model(text: str, shape: str | None) -> tuple[nn.Module, Tensor]:
    """The network that ``text`` names, in eval mode, and a blank input for it, (1, ...).

    Args:
        text: ``timm:NAME`` (untrained), or ``PATH.py:NAME`` for a class or function of that file
            that takes no arguments; the file is run.
        shape: one input's sides, such as ``3x224x224``; timm's networks know their own.

    Raises:
        ConfigError: no such network, or an input shape that is missing or wrong.
        MissingDependency: timm is not installed.
    """
    kind, _, name = text.rpartition(":")
    if kind == "timm":
        model = create_timm(name)
        config = getattr(model, "default_cfg", {})
        shape = shape or "x".join(map(str, config.get("input_size", ())))
    elif kind.endswith(".py"):
        model = _own_model(Path(kind), name)
    else:
        raise ConfigError(f"{text!r} is no network: write a folder, {_FORMS}")
    if not shape:
        raise ConfigError(f"how large is an input of {text}? say --input, for example 3x224x224")
    return model.eval(), torch.zeros(1, *_sides(shape))


def _sides(shape: str) -> list[int]:
    sides = shape.lower().split("x")
    if not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ConfigError(f"{shape!r} is no input shape: write for example 3x224x224")
    return [int(side) for side in sides]


def _own_model(path: Path, name: str) -> nn.Module:
    maker = getattr(_imported(path), name, None)
    if not callable(maker):
        raise ConfigError(f"{path} has no class or function {name!r}")
    try:
        model = maker()
    except Exception as error:  # the user's code may fail in any way
        raise ConfigError(f"{name}() of {path} fails: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name}() of {path} gives a {type(model).__name__}, not a torch module")
    return model


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may fail in any way
        raise ConfigError(f"{path} cannot be run: {_first_line(error)}") from error
    return module


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
