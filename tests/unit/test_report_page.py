import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from sigmabranch.report import Run, comparison, cost_table, node_table, write_report
from sigmabranch.report.proposal_table import proposal_table
from sigmabranch.tree import TreeSpec

LEAVES = ["0-0", "0-1", "1-0", "1-1"]
COST = {
    "dense": {"params": 1000, "macs": 5000, "macs_flop_counter": 4900},
    "net": {"total_params": 1200, "active_params": 400, "macs": 3000, "soft_macs": 6000},
    "reduction_percent": {"active_params": 60.0, "macs": 40.0},
    "nodes": [
        {"node": key, "level": 1, "width": width, "params": 200, "macs": 1000}
        for key, width in zip(["root", "0", "1", *LEAVES], [8, 6, 6, 4, 4, 4, 4], strict=True)
    ],
    "convention": "How it was counted.",
}
EVALUATION = {
    "samples": 400,
    "top1": 80.0,
    "top5": 95.0,
    "soft_top1": 81.0,
    "oracle_leaf": 90.0,
    "leaf_by_class": 82.0,
    "leaf_by_class_from": "training split",
    "always_leaf": [70.0, 71.0, 72.0, 73.0],
    "mean_leaf": 71.5,
    "shuffled_routes": 71.0,
    "routing_gain": 9.0,
    "agreement": 0.6,
    "mean_max_p": 0.7,
    "leaf_class_mi": 0.3,
    "usage": [0.1, 0.2, 0.3, 0.4],
    "balance": 0.92,
    "class_leaf_share": np.random.default_rng(0).dirichlet([1] * 4, 5).tolist(),
    "leaves": LEAVES,
}
DENSE = {"samples": 400, "top1": 80.5, "top5": 95.0, "loss": 0.7}
RECORD = {
    "splits": {
        key: {"sizes": [5, 5], "channel_mean": {"s": [[0.1, 0.9], [0.8, 0.2]]}}
        for key in ("root", "0", "1")
    },
    "nodes": {
        key: [{"stage": "s", "shared": [0], "specific": [1], "kept": [0, 1]}]
        for key in ("0", "1", *LEAVES)
    },
}


def cells(table):
    return {row[0]: row[1:] for _, rows in table.groups for row in rows}


def test_the_comparison_says_what_was_saved_and_what_was_lost():
    rows = cells(comparison(COST, DENSE, EVALUATION))
    assert rows["Parameters stored"] == ("1,000", "1,200", "+20.0%")
    assert rows["Parameters run per input"] == ("1,000", "400", "−60.0%")  # noqa: RUF001
    assert rows["MACs per input"] == ("5,000", "3,000", "−40.0%")  # noqa: RUF001
    assert rows["Weights read per input, as fp32"][:2] == ("4.0 kB", "1.6 kB")
    assert rows["Weights read per input, as int8"][:2] == ("1.0 kB", "0.4 kB")
    assert rows["Top-1"] == ("80.50%", "80.00%", "−0.50 pp")  # noqa: RUF001
    assert rows["Top-5"] == ("95.00%", "95.00%", "0.00 pp")
    assert rows["Routing gain over shuffled routes"][1] == "+9.00 pp"


def test_the_comparison_states_sampling_error_and_counting_convention():
    notes = comparison(COST, DENSE, EVALUATION).notes
    assert "±2.00 pp" in notes[0]  # sqrt(0.8 * 0.2 / 400)
    assert "training split" in notes[1]
    assert notes[-1] == "How it was counted."


def test_controls_stand_between_dense_and_branched_and_unknown_cells_stay_empty():
    table = comparison(COST, None, EVALUATION, {"single path": {"params": 390, "top1": 79.0}})
    assert table.header == ("", "dense", "single path", "branched", "change")
    rows = cells(table)
    empty = "\N{EN DASH}"
    assert rows["Top-1"] == (empty, "79.00%", "80.00%", empty)
    assert rows["Parameters run per input"][1] == "390"
    assert rows["MACs per input"][1] == empty


def test_the_share_of_the_arithmetic_that_is_routed_stands_below_the_counts():
    sizes = {"fp32": 4, "fp16": 2, "int8": 1}
    dense = {**COST["dense"], "flops_doubled": 9900, "bytes": sizes}
    net = {**COST["net"], "flops_doubled": 5900, "bytes_total": sizes, "bytes_per_path": sizes}
    known = {**COST, "dense": dense, "net": {**net, "routed_macs_share": 0.9612}}
    assert cells(cost_table(known))["MACs routed"][-1] == "96.1%"
    assert "MACs routed" not in cells(cost_table({**known, "net": net}))


def test_the_node_table_adds_up_and_shares_flow_down_the_tree():
    rows = cells(node_table(COST, dict(zip(LEAVES, EVALUATION["usage"], strict=True))))
    assert rows["trunk"] == ("8", "200", "1,000", "100.0%")
    assert [rows[key][-1] for key in ("0", "1", "1-1")] == ["30.0%", "70.0%", "40.0%"]
    assert rows["all nodes"][1:3] == ("1,200", "6,000")


def scores(samples, votes, chosen, reason):
    parts = len(votes)
    return {
        "samples": samples,
        "silhouette": [0.0, 0.41, 0.52, 0.4][:parts],
        "silhouette_floor": [0.0, 0.2, 0.2, 0.2][:parts],
        "gap": [0.1, 0.3, -0.25, 0.8][:parts],
        "gap_error": [0.01] * parts,
        "bic": [-1.0, -0.5, 0.5, 0.4][:parts],
        "votes": votes,
        "chosen": chosen,
        "reason": reason,
    }


PROPOSAL = {
    "tree": TreeSpec(leaves=((0,), (1,), (2,)), cuts=("layer3",)).to_dict(),
    "scores": {
        "root": scores(1500, [0, 2, 3, 2], 3, "split in 3: 3 of 3 criteria"),
        **{str(leaf): scores(500, [], 1, "leaf: <the last level>") for leaf in range(3)},
    },
    "cuts": {
        "layer2": scores(1500, [0, 1], 1, "stop"),
        "layer3": scores(1500, [0, 3], 2, "split in 2"),
    },
    "samples": 1500,
}


def test_the_proposal_table_has_a_row_for_each_place_and_each_number_of_parts():
    where, root, leaf, *_ = proposal_table(PROPOSAL).groups
    assert where[0] == "Where to cut: all 1,500 samples, split in 2"
    assert [(row[0], row[-1]) for row in where[1]] == [
        ("before layer2", ""),
        ("before layer3", "✓"),
    ]
    assert root[0] == "Trunk, 1,500 samples: split in 3: 3 of 3 criteria"
    assert [row[0] for row in root[1]] == ["2 parts", "3 parts", "4 parts"]
    assert root[1][1] == (
        "3 parts",
        "0.520",
        "0.200",
        "−0.250 ± 0.010",  # noqa: RUF001
        "1.500",
        "3 of 3",
        "✓",
    )
    assert leaf == ("Node 0, 500 samples: leaf: <the last level>", ())


def test_a_table_reads_the_same_in_a_terminal_and_in_markdown():
    table = comparison(COST, DENSE, EVALUATION)
    text, markdown = table.to_text(), table.to_markdown()
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith(("Parameters", "Top-1", "MACs"))]
    assert len({len(line) for line in rows}) == 1  # columns are aligned
    assert max(map(len, lines)) <= 100
    body = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in body} == {5}
    assert "| Top-1 | 80.50% | 80.00% |" in markdown
    assert markdown.rstrip().endswith("How it was counted.")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    history = [{"epoch": 1, "loss": 1.0, "top1": 50.0, "mean_max_p": 0.5}]
    run = Run(
        title="digits <script>alert(1)</script>",
        cost=COST,
        evaluation=EVALUATION,
        dense_evaluation=DENSE,
        record={**RECORD, "proposal": PROPOSAL},
        dense_history=history,
        finetune_history=history,
        recipe={"fine-tuning": {"lr": 0.05, "schedule": "cosine"}},
        provenance={"command": "sigmabranch demo --seed 3", "commit": "abc123"},
        warnings=["leaf 0-0 has died"],
        class_names=["a & b", "c", "d", "e", "f"],
    )
    return write_report(run, tmp_path_factory.mktemp("run"))


def test_the_report_comes_with_its_pictures_and_its_table(page):
    names = {path.name for path in (page.parent / "figures").iterdir()}
    pictures = ("tree", "classes", "channels", "training")
    drawn = {f"{name}.{suffix}" for name in pictures for suffix in ("png", "svg")}
    assert names == drawn | {".sigmabranch"}
    assert "| Top-1 |" in (page.parent / "table.md").read_text(encoding="utf-8")


def test_the_page_shows_numbers_warnings_recipe_and_provenance(page):
    text = page.read_text(encoding="utf-8")
    for expected in (
        "leaf 0-0 has died",
        "−60.0%",  # noqa: RUF001
        "sigmabranch demo --seed 3",
        "abc123",
        "cosine",
        "How it was counted.",
        "a &amp; b",
        "Why this tree",
        "3 of 3 criteria",
        "leaf: &lt;the last level&gt;",
    ):
        assert expected in text
    assert text.count("<svg") == 4


def test_the_page_escapes_what_it_is_given(page):
    assert "<script" not in page.read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_from_outside(page):
    text = page.read_text(encoding="utf-8")
    assert "@import" not in text and "<link" not in text
    targets = re.findall(r'(?:src|href)="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert targets
    assert all(target.startswith(("#", "data:")) for target in targets)


def test_the_inlined_pictures_follow_the_readers_colours_and_share_no_ids(page):
    text = page.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    drawings = text[text.index("<figure>") :]
    assert "var(--ink)" in drawings and "#1d2330" not in drawings
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used <= set(ids)


def test_every_opened_element_of_the_page_is_closed(page):
    void = ("meta", "br", "image", "path", "use", "rect")

    class Balance(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            if tag not in void:
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            if tag not in void:
                assert self.open.pop() == tag

    parser = Balance()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.open == []


def test_a_run_without_histories_or_a_dense_network_still_makes_a_page(tmp_path):
    run = Run(
        title="x",
        cost=COST,
        evaluation=EVALUATION,
        dense_evaluation=None,
        record={"splits": {"root": {"channel_mean": {}}}, "nodes": {}},
    )
    text = write_report(run, tmp_path).read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert "Read this first" not in text
    assert "Why this tree" not in text
