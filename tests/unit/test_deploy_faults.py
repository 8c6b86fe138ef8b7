"""Storage that fails at random: an error for that input or the right answer, nothing else.

``SIGMABRANCH_FAULTS=10000`` makes it a long run.
"""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
import time

import psutil
import pytest
import torch

from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy import Runtime, pack
from sigmabranch.deploy.storage import NodeFile
from sigmabranch.errors import StorageError
from sigmabranch.tree import TreeSpec

FAULTS = int(os.environ.get("SIGMABRANCH_FAULTS", "200"))


class Weather:
    """What the storage does to a read."""

    def __init__(self, seed: int) -> None:
        self.random, self.fair, self.faults = random.Random(seed), False, 0
        self.read = NodeFile.read

    def reading(self, file, offset, into, request):
        chance = 1.0 if self.fair else self.random.random()
        if chance < 0.1:
            self.faults += 1
            raise StorageError("the device did not answer")
        for count in self.read(file, offset, into, request):
            if chance < 0.2:
                self.faults += 1
                raise StorageError("the file ends too early")
            if chance < 0.3:
                self.faults += 1
                into[self.random.randrange(len(into))] ^= 1 << self.random.randrange(8)
            elif chance < 0.4:
                time.sleep(0.001)
            elif chance < 0.45:
                self.faults += 1
                raise RuntimeError("a bug in a driver")
            yield count


@pytest.fixture(scope="module")
def case(dense, batches, tmp_path_factory):
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)
    net = convert(dense, batches, TreeSpec(projection_dim=8), spec=spec)
    folder = tmp_path_factory.mktemp("package")
    package = pack(net, folder, batches[0][0][:1])
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        return package, x, net.hard(x)


def test_random_faults_never_give_a_wrong_answer_a_hang_or_a_leak(case, monkeypatch):
    package, x, expected = case
    weather, chosen = Weather(0), random.Random(1)

    def read(file, offset, into, request):  # a bound method would not be given the file
        return weather.reading(file, offset, into, request)

    monkeypatch.setattr(NodeFile, "read", read)
    sizes = sorted(b.bytes for node in package.nodes.values() for b in node.blocks)
    right = errors = 0
    with Runtime.open(package.folder, budget=sum(sizes[-3:])) as runtime:
        open_files = psutil.Process().num_fds()
        while weather.faults < FAULTS:
            number = chosen.randrange(len(x))
            if chosen.random() < 0.2:
                runtime.forget()
            try:
                logits = runtime.predict(x[number]).logits
            except StorageError:
                errors += 1
            else:
                right += 1
                torch.testing.assert_close(logits, expected.logits[number], rtol=1e-3, atol=1e-4)
            assert runtime.peak_bytes <= runtime.budget
        weather.fair = True
        for number in range(len(x)):  # and it has recovered
            logits = runtime.predict(x[number]).logits
            torch.testing.assert_close(logits, expected.logits[number], rtol=1e-3, atol=1e-4)
        assert psutil.Process().num_fds() == open_files
    assert right > errors / 10 and errors > FAULTS / 10
    assert not any(t.name == "sigmabranch-loader" for t in threading.enumerate())


def test_a_system_without_memory_is_an_error_for_that_input(case, monkeypatch):
    package, x, expected = case
    with Runtime.open(package.folder) as runtime:
        with monkeypatch.context() as patch:
            patch.setattr("mmap.mmap", no_memory)
            with pytest.raises(StorageError, match=r"no memory for .*lower the budget"):
                runtime.predict(x[0])
        found = runtime.predict(x[0]).logits
        torch.testing.assert_close(found, expected.logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fault", [MemoryError(), OverflowError("too far"), TypeError("not int")])
def test_a_loader_that_fails_says_so_to_every_input(case, monkeypatch, fault):
    package, x, _ = case

    def failing():
        raise fault

    with Runtime.open(package.folder) as runtime:
        monkeypatch.setattr(runtime._residency, "due", failing)
        for _ in range(2):
            with pytest.raises(StorageError, match=r"the loader has failed: .*open the package"):
                runtime.predict(x[0])


def no_memory(*_):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_memory_stays_within_the_budget_over_a_long_stream(case):
    package, x, _ = case
    sizes = sorted(b.bytes for node in package.nodes.values() for b in node.blocks)
    with Runtime.open(package.folder, budget=sum(sizes[-3:])) as runtime:
        for number in range(60):
            runtime.predict(x[number % len(x)])
        gc.collect()
        before = psutil.Process().memory_info().rss
        for number in range(200):
            runtime.predict(x[number % len(x)])
        gc.collect()
        assert psutil.Process().memory_info().rss - before < 2 * 2**20
        assert runtime.peak_bytes <= runtime.budget


def test_an_interrupt_while_waiting_ends_the_input_and_leaves_the_runtime_whole(case, monkeypatch):
    package, x, expected = case
    with Runtime.open(package.folder, bytes_per_second="20KB") as runtime:
        waiting = runtime._residency._changed.wait
        monkeypatch.setattr(runtime._residency._changed, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runtime.predict(x[0])
        monkeypatch.setattr(runtime._residency._changed, "wait", waiting)
        torch.testing.assert_close(
            runtime.predict(x[0]).logits, expected.logits[0], rtol=1e-3, atol=1e-4
        )


def interrupt(*_):
    if threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
    time.sleep(0.01)
