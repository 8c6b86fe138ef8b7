"""What the page asks for: one input through every network, one request after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from sigmabranch.view.inputs import Inputs, Shown
from sigmabranch.view.network import Network


class Show:
    """Networks side by side; its methods may be called from any thread.

    Everything runs on one thread: torch keeps its workers per calling thread, and starting them
    anew would be part of every request's time.

    Args:
        title: of the page.
        inputs: what they are fed.
        networks: as they stand on the page.
    """

    def __init__(self, title: str, inputs: Inputs, networks: Sequence[Network]) -> None:
        self.title, self.inputs, self.networks = title, inputs, tuple(networks)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="show")

    def described(self) -> dict[str, Any]:
        """What can be shown, and the totals so far."""
        return self._alone(
            lambda: {
                "title": self.title,
                **self.inputs.described(),
                "networks": [network.described() for network in self.networks],
            }
        )

    def sample(self, number: int) -> dict[str, Any]:
        """Run a test sample; raises :class:`DataError` if there is none of this number."""
        return self._alone(lambda: self._run(self.inputs.sample(number)))

    def picture(self, encoded: bytes) -> dict[str, Any]:
        """Run a picture file's contents; raises :class:`DataError` if they are none."""
        return self._alone(lambda: self._run(self.inputs.picture(encoded)))

    def forget(self) -> dict[str, Any]:
        """Drop all weights in memory, so that the next input is cold."""

        def drop() -> dict[str, Any]:
            for network in self.networks:
                network.runtime.forget()
            return {"forgotten": len(self.networks)}

        return self._alone(drop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait until every request is answered."""
        self._thread.shutdown()

    def _run(self, chosen: Shown) -> dict[str, Any]:
        answers = [network.predict(chosen.x) for network in self.networks]
        return {"input": self.inputs.shown(chosen), "networks": answers}

    def _alone(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self._thread.submit(work).result()
