"""What stays in memory: the budget holds, order is kept, and what goes is what is worth least."""

from __future__ import annotations

import threading
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmabranch.deploy.prior import LeafPrior
from sigmabranch.deploy.residency import Residency
from sigmabranch.deploy.segment import Segment
from sigmabranch.deploy.slots import Slots
from sigmabranch.deploy.speculation import likely_nodes
from sigmabranch.deploy.stored import StoredBlock
from sigmabranch.errors import ConfigError, StorageError
from sigmabranch.sizes import byte_count

PAGE = 4096


def segment(node: str, pages: int = 1, at: int = 1) -> Segment:
    block = StoredBlock(
        name=f"{node}.{at}", offset=at * PAGE, bytes=pages * PAGE, crc32=0, macs=0, tensors=()
    )
    return Segment(node=node, blocks=(block,))


def want(residency, certain, likely=(), now=None, following=None):
    residency.want(certain, likely, likely_probability=now or {}, next_probability=following or {})


def is_ready(residency, part) -> bool:
    return residency.missing([part]) == 0


def load(residency) -> Segment | None:
    """Load what is due, as the loader does; None if nothing is."""
    job: list = []
    thread = threading.Thread(target=lambda: job.append(residency.next()), daemon=True)
    thread.start()
    thread.join(0.2)
    if not job:  # it waits: wake it for good
        residency.close()
        thread.join()
        residency._closed = False
        return None
    residency.ready(job[0][0], {})
    return job[0][0]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1000, 1000),
        ("42MB", 42_000_000),
        ("40MiB", 41_943_040),
        ("1.5 kb", 1500),
        ("2GB", 2 * 10**9),
    ],
)
def test_sizes_are_read(text, count):
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "MB", "4 apples", "-3MB", "0", "infMB", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="is no size: write bytes"):
        byte_count(text)


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 5]), st.booleans()), max_size=60))
def test_slots_never_exceed_their_budget(steps):
    slots, out = Slots(8 * PAGE), []
    for pages, give in steps:
        if give and out:
            slots.give_back(out.pop(0))
        else:
            memory = slots.take(pages * PAGE)
            assert (memory is None) == (pages * PAGE > 8 * PAGE - sum(map(len, out)))
            out += [memory] if memory is not None else []
        assert slots.used == sum(map(len, out)) <= slots.peak <= 8 * PAGE


def test_a_buffer_that_came_back_is_used_again():
    slots = Slots(2 * PAGE)
    memory = slots.take(PAGE)
    slots.give_back(memory)
    assert slots.take(PAGE) is memory


def test_free_buffers_can_go_back_to_the_system():
    slots = Slots(2 * PAGE)
    memory = slots.take(PAGE)
    gone = weakref.ref(memory)
    slots.give_back(memory)
    del memory
    assert gone() is not None
    slots.release()
    assert gone() is None and slots.room == 2 * PAGE


def test_a_budget_below_the_largest_segment_is_refused_with_the_least():
    parts = [segment("root", 2), segment("0", 3), segment("1", 1)]
    with pytest.raises(ConfigError, match=f"at least {3 * PAGE:,}"):
        Residency(parts, 3 * PAGE - 1)


def test_certain_segments_load_in_order_and_before_guesses():
    parts = [segment("root", at=1), segment("root", at=2), segment("0"), segment("1")]
    residency = Residency(parts, 4 * PAGE)
    want(residency, parts[:2], parts[2:], now={"0": 0.6, "1": 0.4})
    assert [load(residency) for _ in range(5)] == [*parts, None]


def test_a_guess_never_displaces_what_is_as_likely_to_be_needed():
    parts = [segment("root"), segment("0"), segment("1")]
    residency = Residency(parts, 2 * PAGE)
    want(residency, parts[:2])
    assert load(residency) is parts[0] and load(residency) is parts[1]
    for s in parts[:2]:
        residency.acquire(s)
        residency.release(s)
    even = {"root": 1.0, "0": 0.5, "1": 0.5}
    want(residency, [], [parts[2]], now=even, following=even)
    assert load(residency) is None
    want(residency, [], [parts[2]], now={"1": 0.6}, following=even)
    assert load(residency) is parts[2]
    assert not is_ready(residency, parts[1]) and is_ready(residency, parts[0])


def test_a_dense_network_reads_anew_only_what_does_not_fit():
    """Least recently used would read all blocks anew for every input."""
    parts = [segment("root", at=number) for number in range(1, 7)]
    residency = Residency(parts, 4 * PAGE)
    always = {"root": 1.0}
    for _ in range(10):
        want(residency, parts, following=always)
        for part in parts:
            if not is_ready(residency, part):
                assert load(residency) is part
                residency.arrived(part, part.bytes)
            residency.acquire(part)
            residency.release(part)
    # The best there is: two or three blocks a pass, not six.
    assert sum(residency.read().values()) <= (6 + 9 * 2.5) * PAGE


def test_a_small_victim_is_spared_where_a_large_one_suffices():
    parts = [segment("root", 2), segment("0", 1), segment("1", 3), segment("2", 3)]
    residency = Residency(parts, 6 * PAGE)
    following = {"root": 1.0, "0": 0.1, "1": 0.2}
    want(residency, parts[:3], following=following)
    assert [load(residency) for _ in range(3)] == parts[:3]
    want(residency, [parts[3]], following=following)
    assert load(residency) is parts[3]
    assert is_ready(residency, parts[1]) and not is_ready(residency, parts[2])


def test_a_guess_in_flight_ends_when_something_certain_is_due():
    parts = [segment("root"), segment("0"), segment("1")]
    residency = Residency(parts, 3 * PAGE)
    want(residency, [], [parts[1]], now={"0": 0.9})
    taken, _ = residency.next()
    assert taken is parts[1] and residency.arrived(taken, 10)
    want(residency, [parts[2]], [parts[1]])
    assert not residency.arrived(taken, 10)
    residency.dropped(taken)
    assert residency.next()[0] is parts[2]
    assert residency.read() == {parts[1]: 20}


def test_an_error_reaches_who_waits_once_and_the_next_attempt_starts_anew():
    parts = [segment("root"), segment("0")]
    residency = Residency(parts, 2 * PAGE)
    want(residency, parts[:1])
    taken, _ = residency.next()
    residency.dropped(taken, StorageError("gone"))
    with pytest.raises(StorageError, match="gone"):
        residency.acquire(taken)
    want(residency, [])
    want(residency, parts[:1])
    assert load(residency) is parts[0]


def test_forgetting_keeps_what_runs_first():
    parts = [segment("root", at=1), segment("root", at=2), segment("0")]
    residency = Residency(parts, 3 * PAGE)
    want(residency, parts)
    while load(residency):
        pass
    residency.forget(keep=2 * PAGE)
    assert [is_ready(residency, part) for part in parts] == [True, True, False]
    residency.forget()
    assert not any(is_ready(residency, part) for part in parts) and residency.slots.used == 0


def test_forgetting_gives_the_memory_back_to_the_system():
    parts = [segment("root")]
    residency = Residency(parts, PAGE)
    want(residency, parts)
    taken, memory = residency.next()
    residency.ready(taken, {})
    gone = weakref.ref(memory)
    del memory
    residency.forget()
    assert gone() is None


def test_a_failure_of_the_loader_reaches_all_who_wait_then_and_later():
    parts = [segment("root"), segment("0")]
    residency, said = Residency(parts, 2 * PAGE), []
    want(residency, parts)

    def wait():
        try:
            residency.acquire(parts[0])
        except StorageError as error:
            said.append(str(error))

    waiting = [threading.Thread(target=wait, daemon=True) for _ in range(2)]
    for thread in waiting:
        thread.start()
    residency.failed("the loader has failed")
    for thread in waiting:
        thread.join(5)
    assert said == ["the loader has failed"] * 2
    with pytest.raises(StorageError, match="the loader has failed"):
        residency.acquire(parts[1])


def test_the_prior_starts_from_the_usage_and_learns_a_stream():
    prior = LeafPrior(("0-0", "0-1", "1"), {"0-0": 0.5, "0-1": 0.25, "1": 0.25})
    first = prior.nodes()
    assert first["root"] == pytest.approx(1.0)
    assert first["0"] == pytest.approx(first["0-0"] + first["0-1"])
    assert first["0-0"] > first["0-1"] == pytest.approx(first["1"])
    for _ in range(20):
        prior.saw("1")
    assert prior.nodes()["1"] > 0.85
    assert prior.nodes(given="0")["0-0"] > 0.5 and "1" not in prior.nodes(given="0")


def test_what_follows_depends_on_where_the_current_input_goes():
    prior = LeafPrior(("0-0", "0-1", "1"), {})
    for leaf in ["0-0"] * 20 + ["1"] * 20 + ["0-0"] * 20:
        prior.saw(leaf)
    assert prior.following("0")["0-0"] > 0.85
    assert prior.following("1")["1"] > 0.85  # although the last input took another leaf
    assert sum(prior.following("root")[leaf] for leaf in ("0", "1")) == pytest.approx(1)


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["0-0", "0-1", "1"]), max_size=30))
def test_probabilities_add_up_at_every_node(seen):
    prior = LeafPrior(("0-0", "0-1", "1"), {})
    for leaf in seen:
        prior.saw(leaf)
    p = prior.nodes()
    assert p["root"] == pytest.approx(1) and p["0"] + p["1"] == pytest.approx(1)
    assert p["0-0"] + p["0-1"] == pytest.approx(p["0"]) and min(p.values()) > 0


@pytest.mark.parametrize(
    ("p", "idle", "expected"),
    [
        ({"0": 0.9, "1": 0.1, "0-0": 0.8, "0-1": 0.1}, 0.0, ["0", "0-0"]),
        ({"0": 0.9, "1": 0.1, "0-0": 0.8, "0-1": 0.1}, 99.0, ["0", "0-0"]),
        ({"0": 0.6, "1": 0.4, "0-0": 0.3, "0-1": 0.3}, 0.0, ["0", "0-0"]),
        ({"0": 0.6, "1": 0.4, "0-0": 0.3, "0-1": 0.3}, 1.5, ["0", "1", "0-0"]),
        ({"0": 0.6, "1": 0.4, "0-0": 0.3, "0-1": 0.3}, 99.0, ["0", "1", "0-0", "0-1"]),
    ],
)
def test_the_likeliest_line_is_read_first_and_others_only_if_time_remains(p, idle, expected):
    nodes = ["0", "1", "0-0", "0-1"]
    assert list(likely_nodes(nodes, p, idle, lambda node: 1.0)) == expected


def test_a_node_whose_number_begins_alike_is_no_child():
    nodes = [str(number) for number in range(11)]
    p = {**dict.fromkeys(nodes, 0.01), "1": 0.5, "10": 0.4}
    assert list(likely_nodes(nodes, p, 0.0, lambda node: 1.0)) == ["1"]
