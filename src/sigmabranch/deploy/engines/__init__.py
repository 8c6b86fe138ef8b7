"""How a segment is computed, given its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from sigmabranch.deploy.blocks import Node
from sigmabranch.deploy.engines.aoti import AotiEngine
from sigmabranch.deploy.engines.eager import EagerEngine
from sigmabranch.deploy.segment import Segment
from sigmabranch.errors import ConfigError

__all__ = ["ENGINES", "AotiEngine", "EagerEngine", "Engine", "find_engine"]


class Engine(Protocol):
    """Computes segments on weights that are handed to it.

    Attributes:
        whole_nodes: whether a segment is a node rather than a block.
    """

    whole_nodes: ClassVar[bool]

    def __init__(self, nodes: Sequence[Node]) -> None: ...

    def run(self, segment: Segment, tensors: Mapping[str, Tensor], feature: Any) -> Any:
        """Feature → feature, logits or log p."""


ENGINES: Mapping[str, type[Engine]] = {"eager": EagerEngine, "aoti": AotiEngine}


def find_engine(name: str) -> type[Engine]:
    """The engine of this name; :class:`ConfigError` if there is none."""
    if name not in ENGINES:
        raise ConfigError(f"unknown engine {name!r}: choose from {', '.join(ENGINES)}")
    return ENGINES[name]
