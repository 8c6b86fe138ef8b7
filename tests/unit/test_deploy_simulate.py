"""The analytic model: its arithmetic, its floor, and its agreement with the throttled runtime."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import randomise
from sigmabranch.backbones import ResNet, ResNetSpec
from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy import Runtime, pack
from sigmabranch.deploy.engines import EagerEngine
from sigmabranch.deploy.simulate import (
    Step,
    Storage,
    checking_rate,
    floor,
    latency,
    path_steps,
    streamed_bytes,
)
from sigmabranch.tree import TreeSpec, node_key

SLOW = Storage(bytes_per_second=10.0)


def test_loading_and_computing_overlap():
    steps = [Step(bytes=10, seconds=0.5), Step(bytes=20, seconds=0.25), Step(bytes=10, seconds=2.0)]
    assert latency(steps, SLOW) == pytest.approx(6.0)  # 4 s of loading, then the last block
    assert latency([Step(bytes=0, seconds=1.0)] * 3, SLOW) == pytest.approx(3.0)


def test_a_branch_that_is_not_known_waits_for_its_router():
    root = [Step(bytes=10, seconds=3.0), Step(bytes=0, seconds=0.0, decides=True)]
    gated = [*root, Step(bytes=10, seconds=1.0, after=1)]
    foreseen = [*root, Step(bytes=10, seconds=1.0)]
    assert latency(gated, SLOW) == pytest.approx(1 + 3 + 1 + 1)
    assert latency(foreseen, SLOW) == pytest.approx(1 + 3 + 1)


def test_what_is_known_already_is_loaded_while_a_router_is_not_decided_yet():
    """As the loader does where the tree decides early: the second router waits, the trunk not."""
    trunk = [Step(bytes=10, seconds=3.0), Step(bytes=10, seconds=0.0, decides=True)]
    second = Step(bytes=10, seconds=0.0, decides=True, after=1)
    rest = [Step(bytes=20, seconds=0.5), Step(bytes=10, seconds=0.5, after=2)]
    # The rest of the trunk has come by 4 s, when the first router decides; then the others' bytes.
    assert latency([*trunk, second, *rest], SLOW) == pytest.approx(4 + 1 + 1 + 0.5)


def test_requests_cost_time():
    storage = Storage(bytes_per_second=10.0, request_seconds=0.5)
    assert latency([Step(bytes=10, seconds=0.0)] * 2, storage) == pytest.approx(3.0)


def test_checksums_cost_time():
    storage = Storage(bytes_per_second=10.0, checked_per_second=20.0)
    assert latency([Step(bytes=10, seconds=0.0)] * 2, storage) == pytest.approx(3.0)
    assert checking_rate() > 1e6


step = st.builds(
    Step,
    bytes=st.integers(0, 1000),
    seconds=st.floats(0, 10),
    decides=st.booleans(),
    after=st.integers(0, 3),
)


def possible(steps):
    """The steps, none of which waits for more routers than there are before it."""
    before = itertools.accumulate((s.decides for s in steps), initial=0)
    return [replace(s, after=min(s.after, most)) for s, most in zip(steps, before, strict=False)]


@given(st.lists(step, min_size=1, max_size=12), st.floats(1, 1e4))
def test_no_schedule_beats_the_floor_and_knowing_more_never_hurts(steps, rate):
    storage = Storage(bytes_per_second=rate)
    steps = possible(steps)
    known = [replace(s, after=0) for s in steps]
    assert floor(steps, storage) <= latency(known, storage) * (1 + 1e-9)
    assert latency(known, storage) <= latency(steps, storage) * (1 + 1e-9)
    one_by_one = sum(s.bytes / rate + s.seconds for s in steps)
    assert latency(steps, storage) <= one_by_one * (1 + 1e-9)


@pytest.fixture(scope="module", params=[None, "layer1"])
def case(request, tmp_path_factory):
    """A package of a megabyte, an input for each leaf."""
    return packed(tmp_path_factory.mktemp("package"), request.param, planes=(8, 16, 48, 96))


def packed(folder, decide_after, planes):
    """A package of a network of these planes, an input for each leaf."""
    spec = ResNetSpec(
        layers=(1, 1, 2, 1), planes=planes, strides=(1, 2, 1, 2), stem="cifar", classes=5
    )
    dense = randomise(ResNet(spec))
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 4
    x = torch.randn(4, 3, 8, 8, generator=generator)[y]
    x = x + 0.3 * torch.randn(64, 3, 8, 8, generator=generator)
    settings = ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)
    tree = TreeSpec(projection_dim=8, decide_after=decide_after)
    net = convert(dense, [(x, y)], tree, spec=settings)
    with torch.no_grad():
        leaf = net.hard(x).leaf
    keys = [node_key(name) for name in net.tree.leaves]
    assert len(leaf.unique()) == len(keys)
    package = pack(net, folder, x[:1])
    return package, {key: x[leaf == number][0] for number, key in enumerate(keys)}


def test_the_model_agrees_with_the_throttled_runtime(case):
    """Storage so slow that what is measured is waiting, which a busy machine does not change."""
    package, of_leaf = case
    rate = max(package.path_bytes(leaf) for leaf in of_leaf) / 0.8
    with Runtime.open(package.folder, prefetch=False, bytes_per_second=int(rate)) as runtime:
        for leaf, x in of_leaf.items():
            runtime.forget()
            trace = runtime.predict(x).trace
            spread = sum(len(node.blocks) for node in package.path(leaf))
            computing = trace.compute_ms / 1e3 / spread
            steps = path_steps(package, leaf, lambda segment, each=computing: each)
            modelled = latency(steps, Storage(bytes_per_second=rate))
            assert trace.total_ms / 1e3 == pytest.approx(modelled, rel=0.1)


def test_the_model_agrees_where_the_trunk_arrives_before_the_routers_decide(tmp_path, monkeypatch):
    package, of_leaf = packed(tmp_path, "layer1", planes=(8, 48, 16, 32))
    leaf, x = next(iter(of_leaf.items()))
    run, root = EagerEngine.run, package.nodes["root"]
    slow, rate = root.blocks[0], package.path_bytes(leaf) / 0.8
    # When it has been computed, everything of the root is there: most of a path.
    seconds = root.weight_bytes / rate
    assert root.weight_bytes > package.path_bytes(leaf) / 2

    def computed(engine, segment, tensors, feature):
        if slow in segment.blocks:
            time.sleep(seconds)
        return run(engine, segment, tensors, feature)

    monkeypatch.setattr(EagerEngine, "run", computed)
    with Runtime.open(package.folder, prefetch=False, bytes_per_second=int(rate)) as runtime:
        trace = runtime.predict(x).trace
    steps = path_steps(package, leaf, lambda segment: seconds * (slow in segment.blocks))
    modelled = latency(steps, Storage(bytes_per_second=rate))
    assert trace.total_ms / 1e3 == pytest.approx(modelled, rel=0.1)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.5])
def test_simulated_bytes_are_those_of_the_runtime(case, share):
    package, of_leaf = case
    total = sum(node.weight_bytes for node in package.nodes.values())
    chosen = random.Random(0)
    leaves = [chosen.choice(list(of_leaf)) for _ in range(40)]
    simulated = streamed_bytes(package, int(share * total), leaves)
    with Runtime.open(package.folder, budget=int(share * total), prefetch=False) as runtime:
        measured = [runtime.predict(of_leaf[leaf]).trace.bytes_read for leaf in leaves]
    assert sum(simulated) == pytest.approx(sum(measured), rel=0.1)
    if share == 1.0:
        assert simulated == measured


def test_a_stream_that_stays_moves_less_than_one_that_jumps(case):
    package, of_leaf = case
    budget = package.path_bytes("0-0") + 4096
    chosen, leaf, stay, jump = random.Random(0), "0-0", [], []
    for _ in range(300):
        leaf = leaf if chosen.random() < 0.9 else chosen.choice(list(of_leaf))
        stay.append(leaf)
        jump.append(chosen.choice(list(of_leaf)))
    assert sum(streamed_bytes(package, budget, stay)) < 0.35 * sum(
        streamed_bytes(package, budget, jump)
    )


def test_a_network_that_does_not_fit_is_not_read_anew_for_every_input(tmp_path):
    spec = ResNetSpec(layers=(4, 4, 4, 4), planes=(64, 64, 64, 64), stem="cifar", classes=5)
    package = pack(ResNet(spec).eval(), tmp_path / "dense", torch.zeros(1, 3, 8, 8))
    sizes = [block.bytes for node in package.nodes.values() for block in node.blocks]
    budget = sum(sizes) * 3 // 4
    read = streamed_bytes(package, budget, ["root"] * 10)
    assert read[0] == sum(sizes)
    # What fits beside the largest block and the window stays.
    assert max(read[2:]) <= sum(sizes) - (budget - 2 * max(sizes) - budget // 8)
