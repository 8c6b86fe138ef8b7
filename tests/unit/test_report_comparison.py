"""The table of a comparison: one recipe, one yardstick, and pictures in which nothing hides."""

from __future__ import annotations

import copy
import csv
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.peers import find_system
from sigmabranch.report import (
    ablation_table,
    comparison_table,
    published_table,
    write_comparison,
)
from sigmabranch.report.compared import Range
from sigmabranch.report.comparison_figures import accuracy_by_bytes, pareto_front
from sigmabranch.report.comparison_reader import REFERENCE, read_comparison
from sigmabranch.report.leaf_maps import leaf_maps
from sigmabranch.report.numbering import place_numbers
from sigmabranch.report.tables import NOTHING
from sigmabranch.tasks import TASKS
from sigmabranch.tasks.published import PUBLISHED

TASK = TASKS["digits-resnet"].to_dict()
RECIPE = TASK["finetune"]
DENSE = {"params": 1_000_000, "macs": 5_000_000}
SEEDS = (0, 1, 2)
LEAVES = ["0", "1"]
MINUS = "\N{MINUS SIGN}"


def row(top1: float, *, system: dict, params: float = 400_000, most: float = 0, **changes) -> dict:
    """What ``peers.row.measure_row`` writes; ``most`` parameters for the costliest input."""
    bits = changes.pop("bits", 32)
    most = most or params
    accuracy = {"samples": 1000, "top1": top1, **changes.pop("accuracy", {})}
    return {
        "system": system,
        "epochs": 30,
        "recipe": RECIPE,
        "mark": "",
        "cost": {
            "dense": DENSE,
            "net": {
                "total_params": 1_200_000,
                "active_params": params,
                "active_params_max": most,
                "macs": 5 * params,
                "macs_max": 5 * most,
            },
            "convention": "How it was counted.",
        },
        "active_bytes": {"mean": bits / 8 * params, "max": bits / 8 * most},
        "accuracy": accuracy,
        "latency": {"ms": 1.0, "reference_ms": 2.0, "ratio": 0.5},
        "notes": {},
        **changes,
    }


def routed(seed: int) -> dict:
    share = np.random.default_rng(seed).dirichlet([1, 1], 6).tolist()
    return {"routing_gain": -1.0 - seed, "balance": 0.9, "class_leaf_share": share,
            "leaves": LEAVES}  # fmt: skip


def made() -> dict:
    """Nine rows, two of them dynamic, one marked, one failed, one to come, one without a seed."""
    plain = find_system("sigma-branch").to_dict()
    random = {**plain, "settings": ["conversion.channels=random"]}
    oracle = {"name": "rerouted", "rule": "oracle"}
    rows = {
        "sigma-branch": [
            row(80 + seed, system=plain, accuracy=routed(seed)) for seed in SEEDS
        ],
        "pruned": [row(78 + 2 * seed, system={"name": "fpgm", "rate": 0.3}) for seed in SEEDS],
        "skipping": [
            row(79, system={"name": "skipnet"}, params=500_000 + 1000 * seed,
                most=900_000 + 1000 * seed)
            for seed in SEEDS
        ],
        "gated": [row(70, system={"name": "deepmoe"}, most=800_000) for _ in SEEDS],
        "narrow": [
            row(77, system={"name": "dense-equal"}, mark="from scratch",
                recipe={**RECIPE, "lr": 7.0})
            for _ in SEEDS
        ],
        "int8": [row(81.5, system={"name": "dense-int8"}, params=1_000_000, bits=8)
                 for _ in SEEDS],
        "oracle": [row(99, system=oracle, notes={"rule": "any leaf that is right"})
                   for _ in SEEDS],
        "random-partition": [
            row(79 + 2 * seed, system=random, accuracy=routed(seed)) for seed in SEEDS[:2]
        ],
        "untrained": [row(10, system={"name": "ffn-moe"}, recipe=None) for _ in SEEDS],
        "broken": [],
        "later": [],
    }  # fmt: skip
    return {
        "schema": 1,
        "task": TASK,
        "provenance": {"command": "sigmabranch compare <x>"},
        "source": {"seed": 0, "accuracy": {"samples": 1000, "top1": 82.0, "top5": 95.0}},
        "rows": {
            name: {str(seed): made for seed, made in enumerate(some)} for name, some in rows.items()
        },
        "groups": {
            "branched": ["sigma-branch"],
            "peers": ["pruned", "skipping", "gated", "broken"],
            "controls": ["narrow", "int8", "oracle"],
            "ablations": ["random-partition", "sigma-branch"],
        },
        "skipped": {"regnety": "no <timm>"},
        "failed": [{"row": "broken", "seed": 0, "reason": "no <gates>"}],
    }


@pytest.fixture
def found() -> dict:
    return made()


def cells(table) -> dict[str, dict[str, str]]:
    """Row → column → cell."""
    return {
        line[0]: dict(zip(table.header, line, strict=True))
        for _, rows in table.groups
        for line in rows
    }


# -- the table -----------------------------------------------------------------------------------


def test_the_source_comes_first_then_each_group_by_accuracy(found):
    table = comparison_table(found)
    assert [(heading, [line[0] for line in rows]) for heading, rows in table.groups] == [
        ("", [REFERENCE]),
        ("Branched", ["sigma-branch"]),  # named in two groups, stands in the first
        ("Peers", ["pruned", "skipping", "gated"]),
        ("Controls", ["oracle", "int8", "narrow"]),
        ("Ablations", ["random-partition"]),
        ("Others", ["untrained"]),
    ]


def test_without_groups_all_rows_are_one(found):
    del found["groups"]
    assert [len(rows) for _, rows in comparison_table(found).groups] == [1, 9]


def test_figures_are_means_over_the_seeds_with_their_deviation(found):
    rows = cells(comparison_table(found))
    assert rows[REFERENCE]["top-1 %"] == "82.00"
    assert rows["sigma-branch"]["top-1 %"] == "81.00 ± 1.00"
    assert rows["sigma-branch"]["gain pp"] == f"{MINUS}2.00 ± 1.00"
    assert rows["pruned"]["gain pp"] == NOTHING
    assert rows["random-partition"]["top-1 %"] == "80.00 ± 1.41 (n = 2)"
    assert rows["pruned"]["time"] == "0.50"


def test_accuracy_on_held_out_samples_has_a_column_where_some_are_held_out(found):
    without = comparison_table(found)
    assert "held out %" not in without.header
    assert not any("Held out" in note for note in without.notes)
    found["source"]["held_out"] = {"samples": 500, "top1": 83.0}
    for seed, made in found["rows"]["sigma-branch"].items():
        made["held_out"] = {"samples": 500, "top1": 70.0 + 2 * int(seed)}
    table = comparison_table(found)
    rows = cells(table)
    assert rows[REFERENCE]["held out %"] == "83.00"
    assert rows["sigma-branch"]["held out %"] == "72.00 ± 2.00"
    assert rows["sigma-branch"]["top-1 %"] == "81.00 ± 1.00"
    assert any("Held out" in note for note in table.notes)


def test_what_depends_on_the_input_shows_its_mean_and_its_largest_over_all_seeds(found):
    rows = cells(comparison_table(found))
    assert rows["skipping"]["active, M"] == "0.501"
    assert rows["skipping"]["at most, M"] == "0.902"
    assert rows["skipping"]["MACs at most, M"] == "4.510"
    assert rows["skipping"]["read, MB"] == "2.004"
    assert rows["pruned"]["at most, M"] == NOTHING
    assert rows["int8"]["read, MB"] == "1.000"  # a byte a parameter
    assert rows[REFERENCE]["read, MB"] == "4.000"


def test_columns_without_a_figure_are_left_out(found):
    found["rows"] = {"pruned": found["rows"]["pruned"]}
    header = comparison_table(found).header
    assert not {"at most, M", "gain pp", "balance", "note"} & set(header)
    assert {"active, M", "top-1 %", "time"} <= set(header)


def test_footnotes_say_how_a_row_departs(found):
    table = comparison_table(found)
    notes = dict(re.match(r"(\[\d+\]) (.*)\.", note).groups() for note in table.notes
                 if note.startswith("["))  # fmt: skip
    rows = cells(table)
    assert notes[rows["narrow"]["note"]] == "from scratch"
    assert notes[rows["untrained"]["note"]] == "not trained"
    assert notes[rows["int8"]["note"]] == "8 bits per weight"
    rule, ceiling = re.findall(r"\[\d+\]", rows["oracle"]["note"])
    assert "any leaf that is right" in notes[rule]
    assert "ceiling" in notes[ceiling]
    assert rows["sigma-branch"]["note"] == NOTHING


def test_the_notes_name_seeds_failures_and_the_one_convention(found):
    notes = comparison_table(found).notes
    assert notes[-1] == "How it was counted."
    assert "Not made yet: later." in notes
    assert "Failed: broken, seed 0: no <gates>." in notes
    assert "Left out: regnety: no <timm>." in notes
    assert any("seeds 0, 1, 2" in note for note in notes)


# -- what a table refuses ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 7.0), ("epochs", 999), ("betas", [0.1, 0.2]), ("ema_decay", 0.5)]
)
def test_another_recipe_without_a_mark_is_refused(found, field, value):
    found["rows"]["pruned"]["2"]["recipe"] = {**RECIPE, field: value}
    with pytest.raises(ConfigError, match=rf"one recipe: row pruned has {field} "):
        comparison_table(found)
    found["rows"]["pruned"]["2"]["mark"] = "its own schedule"
    assert "its own schedule" in " ".join(comparison_table(found).notes)


def test_settings_of_a_method_are_no_other_recipe(found):
    recipe = {**RECIPE, "resp_weight": 0.0, "eval_every": 9, "compile": True}
    for made_row in found["rows"]["pruned"].values():
        made_row["recipe"] = recipe
    assert cells(comparison_table(found))["pruned"]["note"] == NOTHING


def test_seeds_of_different_settings_are_not_averaged(found):
    found["rows"]["pruned"]["1"]["system"] = {"name": "fpgm", "rate": 0.4}
    with pytest.raises(CheckpointError, match="pruned has different settings"):
        comparison_table(found)


def test_other_test_sets_and_conventions_are_refused(found):
    other = copy.deepcopy(found)
    found["rows"]["gated"]["1"]["accuracy"]["samples"] = 999
    with pytest.raises(CheckpointError, match="gated, seed 1, was measured on 999"):
        comparison_table(found)
    other["rows"]["gated"]["1"]["cost"]["convention"] = "Otherwise."
    with pytest.raises(CheckpointError, match="another convention"):
        comparison_table(other)


def test_a_comparison_of_another_version_or_without_rows_is_refused(found):
    with pytest.raises(CheckpointError, match="schema 2"):
        comparison_table({**found, "schema": 2})
    with pytest.raises(ConfigError, match=r"no row .*; broken, seed 0: no <gates>"):
        comparison_table({**found, "rows": {"broken": {}}})


# -- pictures ------------------------------------------------------------------------------------


def test_the_front_holds_what_nothing_beats_on_both_axes():
    points = [
        SimpleNamespace(x=Range(x, x), y=y)
        for x, y in ((1, 50), (2, 40), (2, 60), (3, 60), (4, 70), (5, 69))
    ]
    assert pareto_front(points) == [(1, 50), (2, 60), (4, 70)]


def test_ceilings_are_on_no_front_and_outliers_do_not_set_the_scale(found):
    figure = accuracy_by_bytes(read_comparison(found))
    plot = figure.axes[0]
    low, high = plot.get_ylim()
    assert low > 60 and high < 90  # not down to the untrained row's 10, not up to the oracle's 99
    front = next(line for line in plot.lines if line.get_linestyle() == "--")
    assert max(front.get_ydata()) == 82  # the source network, not the oracle
    key = " ".join(text.get_text() for text in figure.axes[1].texts)
    assert "99.00" in key and "10.00" in key


def test_every_row_is_numbered_once_inside_the_plot(found):
    figure = accuracy_by_bytes(read_comparison(found))
    plot = figure.axes[0]
    assert sorted(int(text.get_text()) for text in plot.texts) == list(range(10))
    figure.draw_without_rendering()
    frame = plot.get_window_extent()
    boxes = [text.get_window_extent() for text in plot.texts]
    assert all(frame.x0 <= box.x0 and box.y1 <= frame.y1 for box in boxes)


@pytest.mark.parametrize("heap", [2, 8, 30])
def test_numbers_of_crowded_points_neither_meet_nor_cross(heap):
    rng = np.random.default_rng(heap)
    at = {n: (100 + rng.normal(), 200 + 10 * rng.normal()) for n in range(heap)}
    at |= {heap + n: (300.0, 100.0 + 40 * n) for n in range(4)}
    placed = place_numbers(at, np.array([[0, 0], [400, 400]]))
    assert placed.keys() == at.keys()
    places = np.array([placed[number] for number in at])
    apart = np.abs(places[:, None] - places)
    near = (apart[..., 0] < 12) & (apart[..., 1] < 9)
    assert near.sum() == len(at)  # each only meets itself
    assert places.min() >= 0 and places.max() <= 400
    for side in {x for x, _ in placed.values()} if heap > 2 else ():
        column = [number for number, (x, _) in placed.items() if x == side and number < heap]
        assert sorted(column, key=lambda n: at[n][1]) == sorted(column, key=lambda n: placed[n][1])


def test_the_columns_of_a_heap_meet_no_other_heap_and_hide_no_point():
    at = {n: (100.0, 200.0 + 2 * n) for n in range(8)}
    at |= {8 + n: (97.0, 183.0 - 2 * n) for n in range(8)}  # its columns would rise into the first
    at |= {16: (120.0, 205.0)}  # where the first heap's right column would be
    placed = place_numbers(at, np.array([[0, 0], [400, 400]]))
    places, points = (np.array([given[number] for number in at]) for given in (placed, at))
    near = np.abs(places[:, None] - places) < (12, 9)
    assert near.all(axis=2).sum() == len(at)
    assert not (np.abs(places[:, None] - points) < (9, 7)).all(axis=2).any()


def test_rows_with_a_tree_have_a_map_each(found):
    figure = leaf_maps(read_comparison(found))
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in maps] == ["sigma-branch", "random-partition"]
    opacity = maps[0].images[0].get_array()[..., 3]
    main = opacity.argmax(axis=1)
    assert (np.diff(main) >= 0).all()  # grouped by main leaf
    assert np.allclose(opacity.sum(axis=1), 1)


# -- files ---------------------------------------------------------------------------------------


class _Ids(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.sources, self.tables = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.tables += tag == "table"
        self.ids += [value for name, value in attrs if name == "id"]
        self.sources += [v for name, v in attrs if name in ("src", "href") and v[:1] != "#"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "report"
    return write_comparison(made(), folder)


def test_the_folder_holds_the_table_in_three_forms_and_every_picture_twice(written):
    table, page = written
    paths = [path for path in page.parent.rglob("*.*") if path.name != ".sigmabranch"]
    names = {str(path.relative_to(page.parent)) for path in paths}
    assert names == {
        *("index.html", "comparison.csv", "comparison.md", "comparison.tex"),
        *(f"figures/{name}.{suffix}" for name in ("accuracy-bytes", "accuracy-macs", "leaves")
          for suffix in ("png", "svg")),
    }  # fmt: skip
    assert page.with_name("comparison.md").read_text() == table.to_markdown()
    assert page.with_name("comparison.tex").read_text() == table.to_latex()


def test_the_page_is_whole_without_a_network_and_escapes_what_it_is_given(written):
    page = written[1].read_text()
    parser = _Ids()
    parser.feed(page)
    assert parser.sources == [] and "@import" not in page
    assert len(parser.ids) == len(set(parser.ids))
    assert parser.tables == 2  # the comparison and the ablations
    assert page.count("<svg") == 3
    assert "no &lt;gates&gt;" in page and "<gates>" not in page and "compare <x>" not in page
    assert "pruned, 80.00%, reads about as much or less; over 3 common seeds" in page
    # The oracle is more accurate and reads no more either, but is no system.
    assert "int8, 81.50%, reads about as much or less; over 3 common seeds" in page


def test_a_page_without_trees_or_ablations_leaves_them_out(found, tmp_path):
    found["rows"] = {"pruned": found["rows"]["pruned"]}
    _, page = write_comparison(found, tmp_path)
    assert not (tmp_path / "figures" / "leaves.svg").exists()
    assert "What each part contributes" not in page.read_text()


def test_a_spreadsheet_reads_the_numbers(found):
    table = comparison_table(found)
    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    rows = {line["row"]: line for line in lines}
    assert rows["pruned"]["group"] == "Peers"
    assert float(rows["skipping"]["at most, M"]) == 0.902
    assert rows["pruned"]["at most, M"] == ""
    assert rows["sigma-branch"]["gain pp"].startswith("-2.00")


# -- published figures ---------------------------------------------------------------------------


def counted(params: int, macs: int, **more) -> dict:
    dense = {"params": 25_557_032, "macs": 4_111_512_576}
    return {
        "net": {"active_params": params, "macs": macs},
        "dense": dense,
        "convention": "C.",
        **more,
    }


def test_printed_rows_stand_above_the_counts_that_may_explain_them():
    table = published_table(
        {
            "fpgm rate=0.3 inner": counted(16_950_000, 2_650_000_000),
            "fpgm rate=0.3 official": counted(15_900_000, 2_376_000_000),
        }
    )
    heading, rows = table.groups[0]
    assert "Sigma-Branch paper" in heading
    names = [line[0] for line in rows]
    at = names.index("FPGM-30")
    assert rows[at][1:] == (*[NOTHING] * 3, "16.96 M", f"{MINUS}42.2%")
    assert names[at + 1 : at + 3] == ["  fpgm rate=0.3 inner", "  fpgm rate=0.3 official"]
    assert rows[at + 1][4] == f"16,950,000 ({MINUS}33.68%)"
    note = next(note for note in table.notes if note.startswith("FPGM-30 (the Sigma-Branch"))
    assert f"to the printed parameters fpgm rate=0.3 inner ({MINUS}0.06%)" in note
    assert "to the printed FLOPs fpgm rate=0.3 official" in note
    assert "mixes two conventions" in note


def test_both_ends_of_a_dynamic_network_are_shown_and_unknown_counts_refused():
    ends = {"least": {"active_params": 8, "macs": 9}, "most": {"active_params": 80, "macs": 90}}
    names = [
        line[0]
        for _, rows in published_table({"skipnet": counted(80, 90, paths=ends)}).groups
        for line in rows
    ]
    assert names.index("  skipnet, at least") == names.index("SkipNet+SP") + 1
    with pytest.raises(ConfigError, match="no printed row refers to 'fpgm'"):
        published_table({"fpgm": counted(1, 1)})


def test_without_counts_every_printed_row_is_there():
    rows = [line for _, some in published_table({}).groups for line in some]
    assert [line[0] for line in rows] == [row.title for row in PUBLISHED]


def test_ablations_are_paired_by_seed_and_the_papers_stand_beside_them(found):
    table = ablation_table(found)
    rows = {line[0]: line[1:] for line in table.groups[0][1]}
    assert rows["sigma-branch"] == (
        NOTHING, "74.82", NOTHING, "0.965", "81.00 ± 1.00", NOTHING, "0.900 ± 0.000",
    )  # fmt: skip
    # 79 - 80 and 81 - 81; the branched network's third seed has no partner.
    assert rows["random-partition"] == (
        "conversion.channels=random", "73.95", f"{MINUS}0.87 pp", NOTHING, "80.00 ± 1.41",
        f"{MINUS}0.50 ± 0.71 pp (n = 2)", "0.900 ± 0.000",
    )  # fmt: skip
    assert rows["λ = 0"] == (
        "finetune.resp_weight=0", "73.34", f"{MINUS}1.48 pp", NOTHING, "not run", NOTHING, NOTHING,
    )  # fmt: skip
    assert "levels do not compare" in table.notes[0]


def test_a_tree_of_another_size_is_an_ablation_too(found):
    for name, share in (("sigma-branch", None), ("random-partition", None), ("pruned", 0.25)):
        for some in found["rows"][name].values():
            some["system"] |= {"active_share": share}
    for some in found["rows"]["pruned"].values():
        some["system"] = {"name": "sigma-branch", "settings": [], "active_share": 0.25}
    rows = {line[0]: line[1:] for line in ablation_table(found).groups[0][1]}
    assert list(rows) == ["sigma-branch", "pruned", "random-partition", "λ = 0"]
    assert rows["pruned"][0] == "active_share=0.25"
    assert rows["sigma-branch"][0] == NOTHING


def test_rows_of_a_version_without_a_field_and_of_one_with_it_are_read(found):
    for some in found["rows"]["sigma-branch"].values():
        some["system"] = {"name": "sigma-branch", "settings": []}
    assert read_comparison(found).branched.changes == ()
    for some in found["rows"]["sigma-branch"].values():
        some["system"] = {"name": "sigma-branch", "settings": [], "trunk_left": 0}
    compared = read_comparison(found)
    assert compared.branched is None
    assert [entry.changes for entry in compared.ablations] == [
        ("trunk_left=0",), ("conversion.channels=random",),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "what", [[], "text", {"schema": 1}, {"schema": 1, "failed": [], "rows": {"a": {"0": {}}}}]
)
def test_what_is_no_comparison_is_refused_in_one_line(what):
    with pytest.raises(CheckpointError, match="this is no comparison"):
        read_comparison(what)


def test_a_tile_compares_with_the_best_rival_over_common_seeds(found, tmp_path):
    del found["rows"]["pruned"]["0"]
    _, page = write_comparison(found, tmp_path)
    text = page.read_text()
    # 81 - 80 and 82 - 82: the mean over all seeds of each would say 0 points.
    assert "reads about as much or less; over 2 common seeds" in text


def test_ablations_need_the_network_that_they_change(found):
    del found["rows"]["sigma-branch"]
    with pytest.raises(ConfigError, match="branched network, which is not among the rows"):
        ablation_table(found)
