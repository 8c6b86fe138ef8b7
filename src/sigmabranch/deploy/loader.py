"""The thread that reads weights: one segment at a time, what is needed first."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Mapping

from sigmabranch.deploy.residency import Residency
from sigmabranch.deploy.segment import Segment
from sigmabranch.deploy.storage import NodeFile, Throttle, request_bytes
from sigmabranch.errors import StorageError

# Weight of the newest segment in the measured rate.
_NEWEST = 0.3


class Loader:
    """Fills memory with what a :class:`Residency` wants, until it is closed.

    Args:
        residency: says what to load, and where to.
        opened: node → its file.
        throttle: the storage's rate.

    Attributes:
        bytes_per_second: measured over the last segments; None before the first.
    """

    def __init__(
        self, residency: Residency, opened: Mapping[str, NodeFile], throttle: Throttle
    ) -> None:
        self.bytes_per_second: float | None = None
        self._residency, self._files, self._throttle = residency, opened, throttle
        self._thread = threading.Thread(target=self._work, name="sigmabranch-loader", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread, which ends when the residency is closed."""
        # A runtime that nobody holds may be collected by any thread, this one included.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        try:
            while self._load_next():
                pass
        except Exception as error:  # else whoever waits would wait forever
            self._residency.failed(f"the loader has failed: {error!r}; open the package again")

    def _load_next(self) -> bool:
        # A function of its own, so that no local name outlives the segment in memory.
        job = self._residency.next()
        if job is None:
            return False
        segment, memory = job
        try:
            if self._filled(segment, memory):
                self._residency.ready(segment, segment.tensors(memoryview(memory)))
            else:
                self._residency.dropped(segment)
        except StorageError as error:
            self._residency.dropped(segment, error)
        except Exception as error:  # whoever waits must learn of it, whatever it is
            self._residency.dropped(segment, StorageError(f"cannot load {segment.node}: {error!r}"))
        return True

    def _filled(self, segment: Segment, memory: mmap.mmap) -> bool:
        """Read a segment; False if it stopped being wanted on the way."""
        began = time.perf_counter()
        self._throttle.began()
        request = request_bytes(self.bytes_per_second)
        source = self._files[segment.node]
        for count in source.read(segment.offset, memoryview(memory), request):
            self._throttle.took(count)
            if not self._residency.arrived(segment, count):
                return False
        rate = segment.bytes / (time.perf_counter() - began)
        before = self.bytes_per_second or rate
        self.bytes_per_second = (1 - _NEWEST) * before + _NEWEST * rate
        return True
