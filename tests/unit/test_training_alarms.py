"""Alarms about routing, at the numbers where they should and should not sound."""

from __future__ import annotations

import pytest

from sigmabranch.training import routing_alarms

HEALTHY = {
    "top1": 37.7,
    "mean_max_p": 0.69,
    "agreement": 0.57,
    "usage": [0.25, 0.24, 0.26, 0.25],
    "leaves": ["0-0", "0-1", "1-0", "1-1"],
}


def test_healthy_tree_raises_no_alarm():
    assert routing_alarms(HEALTHY) == []


def test_dense_records_are_not_judged():
    assert routing_alarms({"epoch": 1, "top1": 35.2, "loss": 2.0}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean_max_p": 0.37}, "dissolved"),
        ({"agreement": 0.71}, "clones"),
        ({"usage": [0.6, 0.395, 0.005, 0.0]}, "leaf 1-0 has died"),
    ],
)
def test_each_sickness_raises_its_alarm(change, words):
    assert words in " ".join(routing_alarms({**HEALTHY, **change}))


def test_every_dead_leaf_is_named():
    alarms = routing_alarms({**HEALTHY, "usage": [0.6, 0.4, 0.0, 0.0]})
    assert len([alarm for alarm in alarms if "died" in alarm]) == 2


def test_leaves_that_agree_because_they_are_right_are_no_clones():
    assert routing_alarms({**HEALTHY, "top1": 98.0, "agreement": 0.97}) == []


def test_two_leaves_are_judged_against_their_own_uniform():
    even = {"usage": [0.5, 0.5], "mean_max_p": 0.55}
    assert "dissolved" in routing_alarms(even)[0]
    assert routing_alarms({**even, "mean_max_p": 0.7}) == []
