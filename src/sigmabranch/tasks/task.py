"""A task: data, network, tree and recipes under one name, as plain data."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from sigmabranch.backbones import FAMILIES, ModelSpec
from sigmabranch.conversion import ConversionSpec
from sigmabranch.data import check_data
from sigmabranch.errors import ConfigError
from sigmabranch.fields import from_fields
from sigmabranch.training import FinetuneRecipe, Recipe
from sigmabranch.tree import TreeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """Which data set a task reads, and how much of it.

    Attributes:
        name: see :data:`sigmabranch.data.DATA_NAMES`.
        image_size: side in pixels where the data set leaves it free, else None.
        train_limit, test_limit: at most so many samples, classes in proportion; None takes all.
        held_out: so many training samples, classes in proportion, are kept from training and form a
            split of their own to choose by; None keeps none.
    """

    name: str
    image_size: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    held_out: int | None = None

    def __post_init__(self) -> None:
        check_data(self.name, self.image_size)
        for name in ("train_limit", "test_limit", "held_out"):
            samples = getattr(self, name)
            if samples is not None and samples < 1:
                raise ConfigError(f"data {name} must be at least 1, got {samples}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> DataSpec:
        """Inverse of :meth:`to_dict`; unknown keys raise :class:`ConfigError`."""
        return from_fields(cls, "data", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Everything that ``sigmabranch run`` needs to know but the seed and the data's folder.

    Attributes:
        name: how the command line calls it.
        summary: one line for a newcomer.
        data: what it learns from.
        model: the dense network.
        tree: the branched network.
        conversion: how clusters and channels are chosen.
        dense: recipe of the dense network.
        finetune: recipe of the branched network.
    """

    name: str
    summary: str
    data: DataSpec
    model: ModelSpec
    tree: TreeSpec = field(default_factory=TreeSpec)
    conversion: ConversionSpec = field(default_factory=ConversionSpec)
    dense: Recipe = field(default_factory=Recipe)
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)

    def __post_init__(self) -> None:
        self.tree.check_branched()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        sections = {name: getattr(self, name).to_dict() for name in SECTIONS}
        sections["model"] = {"family": self.model.family, **sections["model"]}
        return {"name": self.name, "summary": self.summary, **sections}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Task:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: a missing section, an unknown key or a wrong value.
        """
        try:
            sections = {name: kind.from_dict(value[name]) for name, kind in _KINDS.items()}
            return cls(
                name=value["name"],
                summary=value["summary"],
                model=_model_from_dict(value["model"]),
                **sections,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a task: {error!r}") from error

    def with_settings(self, settings: Iterable[str]) -> Task:
        """This task with ``key=value`` settings applied, e.g. ``finetune.lr=0.05``.

        The key is ``section.field``, or the field alone where only one section has it. The value
        is JSON (``0.05``, ``true``, ``[1,2]``) or a plain word. ``tree.depth=N`` sets the
        balanced tree of that depth.

        Raises:
            ConfigError: no such key, an ambiguous one, or a value that does not fit.
        """
        sections = {name: getattr(self, name).to_dict() for name in SECTIONS}
        known = setting_keys(self)
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise ConfigError(f"--set takes key=value, got {setting!r}")
            section, name = _locate(key.strip(), known)
            if (section, name) == ("tree", "depth"):
                sections["tree"]["leaves"] = TreeSpec.balanced(_integer(key, text)).leaves
            else:
                sections[section][name] = parsed(text)
        try:
            changed = {
                name: type(getattr(self, name)).from_dict(values)
                for name, values in sections.items()
            }
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a --set value does not fit its field: {error}") from error
        return replace(self, **changed)


SECTIONS = ("data", "model", "tree", "conversion", "dense", "finetune")
_KINDS: Mapping[str, Any] = {
    "data": DataSpec,
    "tree": TreeSpec,
    "conversion": ConversionSpec,
    "dense": Recipe,
    "finetune": FinetuneRecipe,
}


def _model_from_dict(value: Mapping[str, Any]) -> ModelSpec:
    # Tasks that were saved before there were families hold a ResNet.
    family = value.get("family", "resnet")
    if family not in FAMILIES:
        raise ConfigError(f"unknown network family {family!r}: known are {', '.join(FAMILIES)}")
    return FAMILIES[family].from_dict({k: v for k, v in value.items() if k != "family"})


def completed(task: Any) -> dict[str, Any]:
    """A saved task's JSON form; settings that are younger than it have their defaults.

    What is no task stays as it is, or is empty.
    """
    with suppress(ConfigError):
        return Task.from_dict(task).to_dict()
    return dict(task) if isinstance(task, Mapping) else {}


def first_difference(old: Any, new: Any, where: str = "") -> str:
    """The first setting that differs between two nested dictionaries, as text."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new} - {"summary"}):  # which people read, and no program
            found = first_difference(old.get(key), new.get(key), f"{where}.{key}".strip("."))
            if found:
                return found
        return ""
    return "" if old == new else f"{where} is {old} there and {new} here"


def setting_keys(task: Task) -> list[str]:
    """Every key that ``--set`` knows for this task."""
    keys = [f"{name}.{part.name}" for name in SECTIONS for part in fields(getattr(task, name))]
    return sorted([*keys, "tree.depth"])


def _locate(key: str, known: Sequence[str]) -> tuple[str, str]:
    matches = [name for name in known if name == key or name.partition(".")[2] == key]
    if len(matches) == 1:
        section, _, name = matches[0].partition(".")
        return section, name
    if matches:
        raise ConfigError(f"--set {key} is ambiguous: write {' or '.join(matches)}")
    near = difflib.get_close_matches(key, [*known, *(n.partition(".")[2] for n in known)], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"sections are {', '.join(SECTIONS)}"
    raise ConfigError(f"--set knows no {key!r}: {hint}")


def parsed(text: str) -> Any:
    """The value of a setting: JSON (``0.05``, ``true``, ``[1,2]``) or a plain word."""
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def _integer(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--set {key} takes a whole number, got {text!r}") from None
