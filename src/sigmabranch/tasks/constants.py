"""Every constant of a task with its source: the paper, its printed counts, or ourselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sigmabranch.errors import ConfigError
from sigmabranch.tasks.paper import PAPER, PaperTask, Source
from sigmabranch.tasks.task import SECTIONS, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """One constant of a task.

    Attributes:
        section: of the task, such as ``"dense"``.
        name: of the setting, or words for what no setting holds.
        value: JSON-able.
        source: where the value comes from.
        replaces: the source of the value that this one departs from, None if it departs from none.
        paper: that value.
        unused: the setting whose value makes this one idle, ``""`` if it is in use.
    """

    section: str
    name: str
    value: Any
    source: Source
    replaces: Source | None = None
    paper: Any = None
    unused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; ``paper`` only where the value departs from the paper's."""
        departs = {"paper": self.paper, "replaces": str(self.replaces)} if self.replaces else {}
        return {
            "section": self.section,
            "name": self.name,
            "value": self.value,
            "source": str(self.source),
            **departs,
            "used": not self.unused,
        }


# Setting of a recipe → (the setting that decides, the values that make it idle).
_IDLE: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "momentum": ("optimizer", ("adam",)),
    "betas": ("optimizer", ("sgd",)),
    "step_epochs": ("schedule", ("cosine", "constant")),
    "step_factor": ("schedule", ("cosine", "constant")),
    "distill_temperature": ("distill_weight", (0.0,)),
    "mix_alpha": ("mix", ("none",)),
    "groups": ("upcycle", (0.0,)),
}


def constants(task: Task) -> tuple[Constant, ...]:
    """Every setting of a task, and what is built in, section by section.

    A task that is not the paper's owes nothing to it: all its constants are ours.

    Raises:
        ConfigError: a setting of a task of the paper has no mark.
    """
    paper = PAPER.get(task.name)
    return tuple(part for section in SECTIONS for part in _section(task, section, paper))


def _section(task: Task, section: str, paper: PaperTask | None) -> Iterator[Constant]:
    spec = getattr(task, section)
    written = spec.to_dict()  # which may leave out what is off
    names = [part.name for part in fields(spec)]
    settings = {name: written.get(name, getattr(spec, name)) for name in names}
    for name, value in settings.items():
        decides, idle = _IDLE.get(name, ("", ()))
        unused = f"{decides}={settings[decides]}" if settings.get(decides) in idle else ""
        marked = _marked(paper, f"{section}.{name}", value)
        yield Constant(section=section, name=name, value=value, unused=unused, **marked)
    for place, what, text, source in paper.built_in if paper else ():
        if place == section:
            yield Constant(section=section, name=what, value=text, source=source)


def _marked(paper: PaperTask | None, key: str, value: Any) -> dict[str, Any]:
    """The source of one setting's value, and what it replaces."""
    if paper is None or key in paper.open:
        return {"source": Source.OURS}
    for source, values in ((Source.STATED, paper.stated), (Source.FITTED, paper.fitted)):
        if key in values:
            if value == values[key]:
                return {"source": source}
            return {"source": Source.OURS, "replaces": source, "paper": values[key]}
    raise ConfigError(f"{key} of {paper.title} has no mark: say in tasks/paper.py where it is from")
