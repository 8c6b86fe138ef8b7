"""The sweep over other people's networks: what its page claims, and small networks measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sigmabranch.tree import TreeSpec

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

pytest.importorskip("psutil", reason="the sweep measures memory")

from benchmarks.support_models import subjects  # noqa: E402
from benchmarks.support_page import page  # noqa: E402
from benchmarks.support_row import measured  # noqa: E402

CONVERTED = ("exact", "approximate")
#: Of the largest logit, in fp64.
ROUNDING = 1e-5
SMALL = TreeSpec.balanced(depth=1, projection_dim=8)


@pytest.fixture(scope="module")
def result():
    return json.loads((ROOT / "results" / "support.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows(result):
    return list(result["rows"].values())


@pytest.fixture(scope="module")
def converted(rows):
    return [row for row in rows if row["outcome"] in CONVERTED]


# -- the page and its claims ---------------------------------------------------------------------


def test_the_page_is_written_from_the_rows(result):
    assert (ROOT / "MODEL_SUPPORT.md").read_text(encoding="utf-8") == page(result)


def test_every_network_of_the_list_has_a_row_and_none_failed(rows):
    assert [row["name"] for row in rows] == [subject.name for subject in subjects()]
    assert {row["outcome"] for row in rows} <= {*CONVERTED, "refused"}


def test_nine_in_ten_networks_of_timm_convert(rows):
    timm = [row for row in rows if row["origin"] == "timm"]
    assert len(timm) >= 40
    assert len({row["family"] for row in timm}) >= 14
    assert sum(row["outcome"] in CONVERTED for row in timm) >= 0.9 * len(timm)


def test_a_refusal_is_one_line_that_says_what_to_do(rows):
    for row in rows:
        if row["outcome"] == "refused":
            assert row["reason"].count("\n") == 0, row["name"]
            assert ";" in row["reason"] or ": " in row["reason"], row["name"]


def test_every_budget_is_spent_to_two_percent_and_what_was_counted_was_built(converted):
    for row in converted:
        assert 0.98 <= row["spent"] <= 1, row["name"]
        assert row["active_params"] == row["built_params"] <= row["asked_params"], row["name"]


def test_no_network_is_silently_wrong(converted):
    for row in converted:
        assert row["path_error_settled"] <= ROUNDING, row["name"]
        assert row["groups_cut"] > 0, row["name"]
        if row["outcome"] == "exact":
            assert row["path_error"] <= ROUNDING, row["name"]
        else:
            assert row["inexact_by"], row["name"]
        for entry in row["entries"].values():
            assert entry.get("path_error_settled", 0) <= ROUNDING, row["name"]


# -- small networks, measured now ----------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("timm")


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("test_resnet", "exact"),
        ("test_byobnet", "exact"),
        ("test_efficientnet", "exact"),
        ("test_vit", "exact"),
        ("test_convnext", "approximate"),
        ("test_mambaout", "approximate"),
    ],
)
def test_a_small_network_of_timm_is_measured(name, outcome):
    row = measured(name, tree=SMALL, entries=())
    assert row["outcome"] == outcome
    assert row["path_error_settled"] < ROUNDING
    assert (row["path_error"] < ROUNDING) == (outcome == "exact")
    assert row["active_params"] == row["built_params"]
    assert 0.98 <= row["spent"] <= 1


def test_computed_weights_are_refused_in_one_line():
    row = measured("test_nfnet", tree=SMALL)
    assert row["outcome"] == "refused"
    assert "aten.convolution in stem.conv1 has a computed weight" in row["reason"]
