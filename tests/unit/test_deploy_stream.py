"""The filter of a stream: Bayes' rule over groups of classes, in answers and in what is read."""

from __future__ import annotations

import itertools
import math
import threading

import pytest
import torch

from conftest import CLASSES
from sigmabranch.conversion import ConversionSpec, convert
from sigmabranch.deploy import Package, Prediction, Runtime, StreamFilter, StreamPrediction, pack
from sigmabranch.deploy.residency import Residency
from sigmabranch.deploy.speculation import likely_nodes
from sigmabranch.deploy.stream_leaves import StreamLeaves
from sigmabranch.errors import ConfigError, DataError, NumericError
from sigmabranch.tree import TreeSpec

# Of class 0, nine of ten inputs take the first leaf, of class 1 two of ten.
TWO = [[0.9, 0.1], [0.2, 0.8]]


def log(*values):
    return torch.tensor(values, dtype=torch.float64).log()


def random_logits(count, classes):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(0)).double()


# -- the filter ----------------------------------------------------------------------------------


def test_two_classes_and_two_leaves_by_hand():
    stream = StreamFilter(TWO, stickiness=0.5)
    torch.testing.assert_close(stream.prior, torch.tensor([0.5, 0.5]).double())
    torch.testing.assert_close(stream.update(log(0.6, 0.4)), log(0.6, 0.4))
    # π = (0.55, 0.45); a class in a leaf is (9/11, 2/11) and (1/9, 8/9). So beliefs are as
    # 0.55 (0.6 · 9/11 + 0.4 · 2/11) = 0.31 to 0.45 (0.6 · 1/9 + 0.4 · 8/9) = 0.19.
    torch.testing.assert_close(stream.groups, torch.tensor([0.585, 0.415]).double())
    first = 0.585 * 9 / 11 + 0.415 / 9
    torch.testing.assert_close(stream.prior, torch.tensor([first, 1 - first]).double())
    answer = stream.update(log(0.3, 0.7)).softmax(0)
    odds = 0.3 * first / (0.7 * (1 - first))
    assert float(answer[0]) == pytest.approx(odds / (1 + odds))
    stream.reset()
    torch.testing.assert_close(stream.groups, torch.tensor([0.55, 0.45]).double())


def test_it_is_the_sum_over_all_ways_that_the_groups_may_have_gone():
    share = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.0, 0.5, 0.5], [0.3, 0.3, 0.4]])
    share, s = share.double(), 0.8
    base_G = share.mean(0)
    shown_GV = share.T / share.sum(0)[:, None]
    moves_GG = s * torch.eye(3) + (1 - s) * base_G
    stream, logits = StreamFilter(share, s), random_logits(4, 4)
    for length in range(1, 5):
        found = stream.update(logits[length - 1]).softmax(0)
        answer_V = torch.zeros(4).double()
        for way in itertools.product(range(3), repeat=length):
            weight = base_G[way[0]]
            for before, after in itertools.pairwise(way):
                weight = weight * moves_GG[before, after]
            for group, said in zip(way[:-1], logits, strict=False):
                weight = weight * (shown_GV[group] @ said.softmax(0))
            answer_V += weight * shown_GV[way[-1]] * logits[length - 1].softmax(0)
        torch.testing.assert_close(found, answer_V / answer_V.sum())


def test_without_stickiness_nothing_changes_by_a_bit():
    stream = StreamFilter(TWO, stickiness=0)
    for logits in random_logits(50, 2).float():
        assert torch.equal(stream.update(logits), logits)


def test_groups_without_information_filter_nothing():
    stream = StreamFilter([[0.25] * 4] * 3)
    for logits in random_logits(50, 3):
        torch.testing.assert_close(stream.update(logits), logits)


def test_a_long_stream_of_one_group_is_believed_and_another_takes_over():
    stream = StreamFilter([[1, 0], [1, 0], [0, 1], [0, 1]], stickiness=0.97)
    for _ in range(200):
        stream.update(log(0.4, 0.3, 0.2, 0.1))
    # It cannot be surer of the next input than that the group stays, or is drawn again.
    assert 0.95 < float(stream.groups[0]) <= 0.985
    settled = stream.groups
    stream.update(log(0.4, 0.3, 0.2, 0.1))
    torch.testing.assert_close(stream.groups, settled)
    assert stream.update(log(0.2, 0.2, 0.3, 0.3)).argmax() == 0  # the input alone says 2 or 3
    for _ in range(20):
        last = stream.update(log(0.1, 0.2, 0.4, 0.3))
    assert float(stream.groups[1]) > 0.95 and last.argmax() == 2


def test_classes_that_were_never_seen_and_leaves_that_none_took_do_no_harm():
    stream = StreamFilter([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    for logits in (log(0.1, 0.1, 0.8), torch.tensor([0.0, 0.0, 1e4]), torch.tensor([-1e4, 0, 0])):
        assert stream.update(logits).isfinite().all()
        assert float(stream.groups.sum()) == pytest.approx(1)


@pytest.mark.parametrize("stickiness", [-0.1, 1, 1.5, math.nan])
def test_a_stickiness_that_is_none_is_refused(stickiness):
    with pytest.raises(ConfigError, match=r"stickiness of a stream must be in \[0, 1\), got"):
        StreamFilter(TWO, stickiness)


@pytest.mark.parametrize("share", [[0.5, 0.5], [], [[math.nan]], [[-0.5, 1.5]]])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ConfigError, match="class shares must"):
        StreamFilter(share)


# -- what is read ahead --------------------------------------------------------------------------


def test_the_sticky_leaf_is_read_ahead_whatever_leaf_the_last_input_took():
    leaves = ("0-0", "0-1", "1")
    stream = StreamFilter([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    prior = StreamLeaves(leaves, stream)
    for _ in range(5):
        stream.update(log(0.05, 0.05, 0.8, 0.1))
    prior.saw("1")
    nodes = prior.nodes()
    assert nodes["0-1"] > 0.85 and nodes["root"] == pytest.approx(1)
    assert nodes["0"] == pytest.approx(nodes["0-0"] + nodes["0-1"])
    guessed = likely_nodes(("0", "1", "0-0", "0-1"), nodes, 0.0, lambda node: 0.0)
    assert list(guessed) == ["0", "0-1"]
    assert prior.nodes("1") == pytest.approx({"root": 1.0, "1": 1.0})
    assert prior.following("root")["0-1"] > 0.85
    # One input elsewhere is rather a new run than an error; the next is likely there as well.
    assert prior.following("1")["1"] > prior.nodes()["1"]


@pytest.fixture(scope="module")
def net(dense, batches):
    """A tree whose leaves all have inputs."""
    spec = ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)
    return convert(dense, batches, TreeSpec(projection_dim=8), spec=spec)


@pytest.fixture(scope="module")
def inputs(batches):
    return torch.cat([x for x, _ in batches])


def in_one_leaf(number):
    """Shares as if every class took one leaf of four, but for an input in a hundred."""
    row = [0.97 if leaf == number else 0.01 for leaf in range(4)]
    return [row] * CLASSES


def test_a_runtime_reads_the_leaf_of_the_stream_ahead(net, inputs, tmp_path, monkeypatch):
    pack(net, tmp_path, inputs[:1], class_share=in_one_leaf(0))
    with torch.no_grad():
        last = inputs[net.hard(inputs).leaf == 3][0]
    want, guesses = Residency.want, []

    def told(self, certain, likely, **chances):
        guesses.append([segment.node for segment in likely])
        want(self, certain, likely, **chances)

    monkeypatch.setattr(Residency, "want", told)

    def first_guesses(**options):
        """What an input is believed to need below the root, after three of the last leaf."""
        with Runtime.open(tmp_path, **options) as runtime:
            for _ in range(3):
                assert runtime.predict(last).leaf == "1-1"
            runtime.forget()
            guesses.clear()
            runtime.predict(last)
        return list(dict.fromkeys(guesses[0]))[:2]

    assert first_guesses() == ["1", "1-1"]
    assert first_guesses(stream=True) == ["0", "0-0"]  # where the classes mostly go


# -- the runtime ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(net, inputs, tmp_path_factory):
    share = torch.rand(CLASSES, 4, generator=torch.Generator().manual_seed(1))
    rows = (share / share.sum(1, keepdim=True)).tolist()
    return pack(net, tmp_path_factory.mktemp("stream"), inputs[:1], class_share=rows)


def test_answers_of_a_stream_are_filtered_and_raw_ones_are_kept(package, inputs):
    expected = StreamFilter(package.class_share, 0.9)
    with (
        Runtime.open(package.folder) as plain,
        Runtime.open(package.folder, stream=True, stickiness=0.9) as runtime,
    ):
        for x in inputs[:8]:
            alone, found = plain.predict(x), runtime.predict(x)
            assert type(alone) is Prediction and isinstance(found, StreamPrediction)
            logits, leaf, trace = found
            assert torch.equal(found.raw_logits, alone.logits) and leaf == alone.leaf
            assert torch.equal(logits, expected.update(alone.logits))
            assert trace.bytes_read >= 0 and logits.dtype == torch.float32
        runtime.reset()
        expected.reset()
        assert torch.equal(runtime(inputs[:1])[0], expected.update(plain(inputs[:1])[0]))
        with pytest.raises(ConfigError, match="open the package with stream=True"):
            plain.reset()


def test_stickiness_zero_answers_as_without_a_filter(package, inputs):
    with (
        Runtime.open(package.folder) as plain,
        Runtime.open(package.folder, stream=True, stickiness=0) as runtime,
    ):
        assert all(torch.equal(plain(x[None]), runtime(x[None])) for x in inputs[:8])


def test_an_input_that_fails_leaves_the_belief_as_it_was(package, inputs):
    expected = StreamFilter(package.class_share)
    with Runtime.open(package.folder, stream=True) as runtime:
        expected.update(runtime.predict(inputs[0]).raw_logits)
        with pytest.raises(DataError):
            runtime.predict(torch.full_like(inputs[0], math.nan))
        with pytest.raises(NumericError):
            runtime.predict(inputs[0] * 1e38)
        found = runtime.predict(inputs[1])
        assert torch.equal(found.logits, expected.update(found.raw_logits))


def test_threads_that_share_a_stream_are_filtered_one_after_the_other(package, inputs):
    with Runtime.open(package.folder, stream=True) as runtime:

        def work():
            for _ in range(5):
                runtime.predict(inputs[0])

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found = runtime.predict(inputs[1])
        expected = StreamFilter(package.class_share)
        with Runtime.open(package.folder) as plain:
            raw = plain.predict(inputs[0]).logits
        for _ in range(20):
            expected.update(raw)
        assert torch.equal(found.logits, expected.update(found.raw_logits))


def test_a_dense_package_filters_over_classes_or_over_groups_that_it_is_given(
    dense, batches, tmp_path
):
    x, _ = batches[0]
    groups = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    pack(dense, tmp_path / "classes", x[:1])
    pack(dense, tmp_path / "groups", x[:1], class_share=groups)
    for name, share in (("classes", torch.eye(CLASSES)), ("groups", groups)):
        expected = StreamFilter(share)
        with Runtime.open(tmp_path / name, stream=True) as runtime:
            for one in x[:3]:
                found = runtime.predict(one)
                assert found.leaf == "root"
                assert torch.equal(found.logits, expected.update(found.raw_logits))


def test_a_package_without_shares_is_written_as_before_and_keeps_those_it_is_given(
    net, inputs, tmp_path
):
    package = pack(net, tmp_path / "none", inputs[:1])
    assert not package.class_share
    assert "class_share" not in (tmp_path / "none" / "manifest.json").read_text()
    with Runtime.open(tmp_path / "none", stream=True) as runtime:
        assert isinstance(runtime.predict(inputs[0]), StreamPrediction)
    rows = in_one_leaf(2)
    pack(net, tmp_path / "some", inputs[:1], class_share=rows)
    assert Package(tmp_path / "some").class_share == rows


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ([[0.25] * 4], "a table of 5 classes by 4 leaves"),
        ([[0.5] * 2] * CLASSES, "a table of 5 classes by 4 leaves"),
        ([["often"] * 4] * CLASSES, "a share of inputs, got 'often'"),
        ([[math.nan] * 4] * CLASSES, "a share of inputs, got nan"),
    ],
)
def test_a_class_share_that_is_none_is_refused(net, inputs, tmp_path, share, message):
    with pytest.raises(ConfigError, match=message):
        pack(net, tmp_path, inputs[:1], class_share=share)
    assert not (tmp_path / "manifest.json").exists()
