"""Streaming over a GPU's bus: the ring that weights pass through, and the path itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sigmabranch.deploy import GpuPath, Runtime, pack
from sigmabranch.deploy.gpu_path import ring
from sigmabranch.errors import ConfigError
from sigmabranch.tasks import find_task
from sigmabranch.tasks.counting import example, sketch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 100))
def test_no_stretch_is_overwritten_before_it_was_used(sizes: list[int], spare: int) -> None:
    room = max(sizes) + spare
    places = ring(sizes, room)
    written = [-1] * room
    inputs = [*range(len(sizes))] * 3
    for moment, number in enumerate(inputs):
        offset, after = places[number]
        assert 0 <= offset <= room - sizes[number]
        taken = {written[byte] for byte in range(offset, offset + sizes[number])}
        for other in taken - {-1}:
            # Who was there ran at or before the one that is waited for, or is this one itself.
            assert other % len(sizes) == number or (
                after is not None and other <= _latest(moment, after, len(sizes))
            )
        for byte in range(offset, offset + sizes[number]):
            written[byte] = moment


def _latest(moment: int, after: int, count: int) -> int:
    """When ``after`` last came before ``moment``."""
    return max(m for m in range(after, moment, count)) if after < moment else -1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_nothing_waits_where_there_is_room_for_all(sizes: list[int]) -> None:
    assert [place.after for place in ring(sizes, sum(sizes))] == [None] * len(sizes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        GpuPath(tmp_path)


THREE = {"leaves": ((0,), (1,), (2,))}


@pytest.fixture(scope="module", params=[{}, {"decide_after": "layer1"}, THREE])
def packed(request, tmp_path_factory):
    torch.manual_seed(0)
    task = find_task("cifar100-small")
    _, net = sketch(replace(task, tree=replace(task.tree, **request.param)))
    with torch.no_grad():  # so that inputs differ in their leaves
        for name, value in net.named_parameters():
            if "router" in name:
                value.normal_()
    return pack(net, tmp_path_factory.mktemp("package"), example(task))


@needs_gpu
@pytest.mark.parametrize("share", [1.0, 0.6, 0.5])
def test_it_says_what_the_runtime_says(packed, share: float, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    whole = GpuPath(packed.folder, dtype=torch.float32)
    path = GpuPath(packed.folder, dtype=torch.float32, budget=int(share * whole.budget))
    with Runtime.open(packed.folder) as runtime:
        for _ in range(50):
            x = 3 * torch.rand(1) * torch.randn(1, *packed.input_shape)
            expected, found = runtime.predict(x), path.predict(x)
            assert found.leaf == expected.leaf
            assert found.copied_bytes == whole.budget
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-2, atol=1e-2)


@needs_gpu
def test_what_stays_is_not_copied(packed) -> None:
    whole = GpuPath(packed.folder)
    path = GpuPath(packed.folder, resident=whole.budget)
    x = torch.randn(1, *packed.input_shape)
    copied = {path.predict(x).copied_bytes for _ in range(3)}
    assert len(copied) == 1
    assert copied.pop() < whole.budget


@needs_gpu
def test_a_budget_too_small_names_the_least(packed) -> None:
    with pytest.raises(ConfigError, match="at least"):
        GpuPath(packed.folder, budget=10)
