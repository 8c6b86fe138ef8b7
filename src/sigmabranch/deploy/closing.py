"""What holds threads and files, and is closed after use."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from sigmabranch.errors import ConfigError


class Closing(ABC):
    """A context manager that closes what it is at its end; its process alone can use it.

    A fork copies memory without the threads that work on it, so that a copy would wait forever.
    """

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this process opened it."""
        return self._process == os.getpid()

    def check_here(self) -> None:
        """Raise :class:`ConfigError` in any process but the one that opened it."""
        if not self.is_here:
            raise ConfigError(
                "another process opened this runtime, and a fork does not bring its threads along: "
                "open the folder again in this process"
            )

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a runtime cannot be copied or sent to another process: open the folder there"
        )

    @abstractmethod
    def close(self) -> None:
        """Let go of everything; a second time does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
