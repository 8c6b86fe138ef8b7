"""The runtime: what it says is what the network says, from the bytes of one path."""

from __future__ import annotations

import gc
import threading
import time

import psutil
import pytest
import torch

from conftest import randomise
from sigmabranch.backbones import PointNet2, PointNet2Spec, ResNet, ResNetSpec
from sigmabranch.conversion import ConversionSpec, blueprint, convert
from sigmabranch.deploy import Package, Runtime, pack
from sigmabranch.deploy.checks import checked_input
from sigmabranch.errors import ConfigError, DataError, StorageError
from sigmabranch.tree import TreeSpec, node_key


def spread(dense, batches, **tree):
    """A branched network whose leaves all have inputs."""
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)
    return convert(dense, batches, TreeSpec(projection_dim=8, **tree), spec=spec)


@pytest.fixture(scope="module", params=["sequential", "early", "unbalanced"])
def case(request, dense, batches, tmp_path_factory):
    """A network, its package, and an input for each leaf."""
    options = {
        "sequential": {},
        "early": {"decide_after": "layer1"},
        "unbalanced": {"leaves": ((0,), (1, 0), (1, 1))},
    }[request.param]
    net = spread(dense, batches, **options)
    folder = tmp_path_factory.mktemp(request.param)
    package = pack(net, folder, batches[0][0][:1])
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        leaf = net.hard(x).leaf
    of_leaf = {
        node_key(name): x[leaf == number][0]
        for number, name in enumerate(net.tree.leaves)
        if (leaf == number).any()
    }
    assert len(of_leaf) == len(net.tree.leaves)
    return net, package, of_leaf


def agrees(net, prediction, leaf, x):
    with torch.no_grad():
        expected = net.hard(x[None])
    assert prediction.leaf == leaf
    torch.testing.assert_close(prediction.logits, expected.logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("budget", [None, "least"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_predictions_are_those_of_the_network_within_any_budget(case, budget, prefetch):
    net, package, of_leaf = case
    largest = max(b.bytes for node in package.nodes.values() for b in node.blocks)
    budget = largest if budget else None
    with Runtime.open(package.folder, budget=budget, prefetch=prefetch) as runtime:
        for _ in range(3):
            for leaf, x in of_leaf.items():
                agrees(net, runtime.predict(x), leaf, x)
        assert runtime.peak_bytes <= runtime.budget


def test_a_cold_prediction_reads_its_path_and_nothing_else(case):
    _, package, of_leaf = case
    with Runtime.open(package.folder, prefetch=False) as runtime:
        for leaf, x in of_leaf.items():
            runtime.forget()
            trace = runtime.predict(x).trace
            assert trace.bytes_read == package.path_bytes(leaf)
            assert trace.hit_bytes == trace.wasted_bytes == 0
            assert sum(node.bytes for node in trace.nodes) == trace.bytes_read
            assert [node.node for node in trace.nodes][-1] == leaf


def test_an_input_seen_again_reads_nothing(case):
    _, package, of_leaf = case
    with Runtime.open(package.folder, prefetch=False) as runtime:
        x = of_leaf["1-0"]
        runtime.predict(x)
        trace = runtime.predict(x).trace
        assert trace.bytes_read == 0 and trace.hit_bytes == package.path_bytes("1-0")


def test_inputs_are_laid_out_as_compiled_code_reads_them():
    image, rows = torch.randn(3, 8, 6).transpose(1, 2), torch.randn(5, 4).T
    assert not image.is_contiguous() and not rows.is_contiguous()
    found = checked_input(image, (3, 6, 8))
    assert found.is_contiguous(memory_format=torch.channels_last) and found.shape == (1, 3, 6, 8)
    assert torch.equal(found[0], image)
    found = checked_input(rows, (4, 5))
    assert found.is_contiguous() and torch.equal(found[0], rows)


def test_guesses_read_in_vain_are_counted_as_waste(dense, batches, tmp_path):
    net = spread(dense, batches)
    x = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        leaf = net.hard(x).leaf
    package = pack(net, tmp_path, x[:1], usage={"0-0": 1.0})
    elsewhere = x[leaf == 3][0]
    # So slow that all of the root is there, and a guess under way, before its router decides.
    with Runtime.open(tmp_path, bytes_per_second="1MB") as runtime:
        run = runtime._engine.run

        def slowly(segment, tensors, feature):
            time.sleep(0.1)
            return run(segment, tensors, feature)

        runtime._engine.run = slowly
        trace = runtime.predict(elsewhere).trace
        assert trace.leaf == "1-1"
        assert trace.wasted_bytes > 0
        assert trace.bytes_read - trace.wasted_bytes == package.path_bytes("1-1")


@pytest.mark.parametrize("case", ["early"], indirect=True)
def test_a_known_path_is_never_guessed_wrong(case):
    """With early decision nothing below the routers is read before they have decided."""
    net, package, of_leaf = case
    assert net.early
    # So slow that the rest of the trunk, which is certain, is still on its way when they decide.
    with Runtime.open(package.folder, bytes_per_second="50KB") as runtime:
        for leaf, x in of_leaf.items():
            runtime.forget()
            trace = runtime.predict(x).trace
            assert trace.wasted_bytes == 0 and trace.bytes_read == package.path_bytes(leaf)


def test_calling_it_replaces_the_network(case):
    net, package, of_leaf = case
    x = of_leaf["1-1"]
    with Runtime.open(package.folder) as runtime, torch.no_grad():
        torch.testing.assert_close(runtime(x[None]), net(x[None]), rtol=1e-3, atol=1e-4)


def test_throttled_reading_takes_as_long_as_the_bytes_do(case):
    _, package, of_leaf = case
    with Runtime.open(package.folder, prefetch=False, bytes_per_second="200KB") as runtime:
        trace = runtime.predict(of_leaf["1-0"]).trace
    seconds = package.path_bytes("1-0") / 200e3
    assert trace.wait_ms > 0
    assert trace.total_ms / 1e3 > 0.95 * seconds


def test_a_dense_network_streams_through_a_budget_smaller_than_itself(tmp_path):
    spec = ResNetSpec(layers=(2, 2, 2), planes=(24, 32, 48), strides=(1, 2, 2), classes=7)
    dense = randomise(ResNet(spec))
    x = torch.randn(1, 3, 64, 64)
    package = pack(dense, tmp_path, x)
    sizes = sorted(block.bytes for block in package.nodes["root"].blocks)
    assert len(sizes) > 1
    with Runtime.open(tmp_path, budget=sizes[-1]) as runtime, torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(runtime(x), dense(x), rtol=1e-3, atol=1e-4)
        assert runtime.predict(x[0]).leaf == "root"
        assert runtime.peak_bytes <= runtime.budget < package.path_bytes("root")


def test_points_stream_too(tmp_path):
    spec = PointNet2Spec(
        widths=((4, 4), (4, 6), (6, 8)),
        centroids=(8, 4),
        radii=(0.4, 0.8),
        neighbours=(4, 4),
        connected=(8, 6),
    )
    dense = randomise(PointNet2(spec))
    x = torch.randn(1, 16, 3) / 4
    net = randomise(blueprint(dense, x))
    pack(net, tmp_path, x)
    with Runtime.open(tmp_path) as runtime, torch.no_grad():
        torch.testing.assert_close(runtime(x), net(x), rtol=1e-3, atol=1e-4)


def test_a_network_of_the_users_own_needs_its_skeleton(dense, batches, tmp_path):
    import copy
    from dataclasses import replace

    from sigmabranch.backbones import as_backbone
    from sigmabranch.errors import CheckpointError

    own = replace(as_backbone(copy.deepcopy(dense)), source=None)
    pack(own, tmp_path, batches[0][0][:1])
    with pytest.raises(CheckpointError, match="skeleton"):
        Runtime.open(tmp_path)
    with Runtime.open(tmp_path, skeleton=own) as runtime, torch.no_grad():
        x = batches[0][0][:1]
        torch.testing.assert_close(runtime(x), dense(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 8, 7), "of shape"),
        (torch.zeros(2, 1, 8, 8), "of shape"),
        (torch.zeros(1, 8, 8, dtype=torch.float64), "float64"),
        (torch.full((1, 8, 8), float("nan")), "NaN or infinity"),
        (torch.full((1, 8, 8), float("inf")), "NaN or infinity"),
    ],
)
def test_bad_input_is_refused_and_the_next_one_works(case, x, message):
    net, package, of_leaf = case
    with Runtime.open(package.folder) as runtime:
        with pytest.raises(DataError, match=message):
            runtime.predict(x)
        agrees(net, runtime.predict(of_leaf["1-0"]), "1-0", of_leaf["1-0"])


def test_a_budget_below_the_least_says_the_least(case):
    _, package, _ = case
    with pytest.raises(ConfigError, match="at least"):
        Runtime.open(package.folder, budget=5000)
    assert threads() == 0


def threads() -> int:
    return sum(thread.name == "sigmabranch-loader" for thread in threading.enumerate())


def test_closing_ends_the_thread_and_a_closed_runtime_says_so(case):
    _, package, of_leaf = case
    runtime = Runtime.open(package.folder)
    runtime.predict(of_leaf["1-0"])
    assert threads() == 1
    runtime.close()
    runtime.close()
    assert threads() == 0
    with pytest.raises(ConfigError, match="is closed"):
        runtime.predict(of_leaf["1-0"])


def test_a_runtime_that_is_dropped_ends_its_thread_and_closes_its_files(case):
    _, package, of_leaf = case
    before = psutil.Process().num_fds()
    runtime = Runtime.open(package.folder)
    runtime.predict(of_leaf["1-0"])
    assert threads() == 1 and psutil.Process().num_fds() > before
    del runtime
    gc.collect()
    assert threads() == 0 and psutil.Process().num_fds() == before


def test_two_runtimes_share_a_package_and_threads_share_a_runtime(case):
    net, package, of_leaf = case
    wrong: list[str] = []

    def work(runtime):
        for leaf, x in of_leaf.items():
            try:
                agrees(net, runtime.predict(x), leaf, x)
            except AssertionError as error:
                wrong.append(str(error))

    with Runtime.open(package.folder) as one, Runtime.open(package.folder) as two:
        workers = [threading.Thread(target=work, args=(r,)) for r in (one, one, two, two)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


def test_a_file_deleted_while_open_does_no_harm(case, tmp_path):
    import shutil

    net, package, of_leaf = case
    folder = shutil.copytree(package.folder, tmp_path / "copy")
    with Runtime.open(folder) as runtime:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        agrees(net, runtime.predict(of_leaf["1-0"]), "1-0", of_leaf["1-0"])
    assert Package(package.folder)


def test_a_file_changed_while_open_is_an_error_for_the_inputs_that_need_it(case, tmp_path):
    import shutil

    net, package, of_leaf = case
    folder = shutil.copytree(package.folder, tmp_path / "copy")
    with Runtime.open(folder, prefetch=False) as runtime:
        path = folder / "1-0.safetensors"
        data = bytearray(path.read_bytes())
        data[package.nodes["1-0"].blocks[0].offset + 5] ^= 4
        path.write_bytes(data)
        for _ in range(2):
            with pytest.raises(StorageError, match="node 1-0 is damaged or has been changed"):
                runtime.predict(of_leaf["1-0"])
            agrees(net, runtime.predict(of_leaf["1-1"]), "1-1", of_leaf["1-1"])
        data[package.nodes["1-0"].blocks[0].offset + 5] ^= 4
        path.write_bytes(data)
        agrees(net, runtime.predict(of_leaf["1-0"]), "1-0", of_leaf["1-0"])
