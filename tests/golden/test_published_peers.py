"""What other systems' papers print for ResNet-50 and WRN-28-10, as a user gets it."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fvcore", "lightning_fabric", "jinja2")),
    reason="needs the measure, train and report extras",
)

IMAGENET = "imagenet-resnet50"
COUNTED = {
    "fpgm inner": (IMAGENET, "fpgm", "rate=0.3", "convention=inner"),
    "fpgm official": (IMAGENET, "fpgm", "rate=0.3", "convention=official"),
    "fpgm coupled": (IMAGENET, "fpgm", "rate=0.3", "convention=coupled"),
    "hrank literal": (IMAGENET, "hrank", "rates=62", "convention=literal"),
    "hrank official": (IMAGENET, "hrank", "rates=62", "convention=official"),
    "hrank physical": (IMAGENET, "hrank", "rates=62", "convention=physical"),
    "skipnet": (IMAGENET, "skipnet"),
    "deepmoe": (IMAGENET, "deepmoe"),
    "decisionet": ("cifar100-wrn28-10", "decisionet"),
    "dense-equal": ("cifar100-small", "dense-equal"),
}


@pytest.fixture(scope="module")
def counts(shell) -> dict[str, dict]:
    counted = {}
    for name, (task, peer, *settings) in COUNTED.items():
        options = [part for setting in settings for part in ("--set", setting)]
        done = shell.run("count", task, "--peer", peer, *options, "--json")
        assert done.code == 0, done.err
        counted[name] = json.loads(done.out)
    return counted


@pytest.mark.parametrize(
    ("name", "active", "macs"),
    [
        ("fpgm inner", 16.96e6, 2.63e9),
        ("fpgm official", 15.89e6, None),
        ("hrank literal", 13.77e6, 1.55e9),
        ("decisionet", 10.51e6, 2.60e9),
    ],
)
def test_printed_parameters_and_operations_come_out(counts, name, active, macs):
    net = counts[name]["net"]
    assert net["active_params"] == pytest.approx(active, rel=3e-3)
    if macs is not None:
        assert net["macs"] == pytest.approx(macs, rel=5e-3)


def test_what_fpgms_script_prints_comes_out(counts):
    reduction = counts["fpgm official"]["peer"]["script_flops_reduction_percent"]
    assert round(reduction, 1) == 42.2


def test_what_is_really_removed_is_smaller_than_what_was_printed(counts):
    names = ("literal", "official", "physical")
    params = [counts[f"hrank {name}"]["net"]["active_params"] for name in names]
    assert params == [13_774_001, 9_840_341, 6_931_036]
    # 0.987 G; batch norms, which the first counts too, are the difference.
    official = counts["hrank official"]["net"]
    assert official["macs"] == 993_716_370
    assert official["macs_flop_counter"] == 986_624_110
    assert counts["fpgm coupled"]["net"]["active_params"] == 12_956_068


def test_gates_and_their_network_are_counted(counts):
    skipnet = counts["skipnet"]
    assert skipnet["peer"]["lstm_params"] == 4 * (10 * 10 + 10 * 10 + 10 + 10)
    assert skipnet["net"]["total_params"] == 25_557_032 + skipnet["peer"]["gate_params"]
    assert skipnet["peer"]["gates"] == 15
    deepmoe = counts["deepmoe"]
    extra = deepmoe["peer"]["embedding_params"] + deepmoe["peer"]["head_params"]
    assert deepmoe["net"]["total_params"] == 25_557_032 + extra
    # One bias-free row per channel of both inner convolutions.
    assert deepmoe["peer"]["head_params"] == 2 * 128 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512)
    assert deepmoe["paths"]["least"]["active_params"] < deepmoe["paths"]["most"]["active_params"]


def test_a_tree_of_decisions_stores_both_branches(counts):
    counted = counts["decisionet"]
    assert counted["dense"]["params"] == 36_536_884
    assert counted["net"]["total_params"] == pytest.approx(19.39e6, rel=1e-3)


def test_the_control_is_of_equal_size_and_every_count_has_the_same_keys(counts):
    assert counts["dense-equal"]["net"]["active_params"] == pytest.approx(229_836, rel=0.01)
    keys = {frozenset(counted) for counted in counts.values()}
    assert keys == {
        frozenset({"dense", "net", "paths", "nodes", "reduction_percent", "convention", "peer"})
    }
