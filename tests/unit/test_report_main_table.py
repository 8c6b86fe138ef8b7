"""The main table: every group of runs a block of its own, and no convention mixed with another."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from sigmabranch.cli import table as verb
from sigmabranch.report import Table, main_rows, main_table
from sigmabranch.report.tables import NOTHING
from sigmabranch.tasks import PAPER, TASKS, Result, Task, group_results

COST = {
    "dense": {"params": 1000, "macs": 50_000, "flops_doubled": 100_400},
    "net": {"total_params": 1200, "active_params": 400, "macs": 40_000, "flops_doubled": 80_320},
}
CIFAR = TASKS["cifar100-resnet50"]
# The package has a function of this name.
MODULE = sys.modules["sigmabranch.report.main_table"]
ACCURACIES = ("Top-1 %", "Top-5 %", "Balance")


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Counting takes seconds and is proved elsewhere."""
    monkeypatch.setattr(MODULE, "count_task", lambda task: COST)


def run(task: Task, seed: int, top1: float, *, cost: dict = COST, samples: int = 10_000) -> Result:
    dense = {"samples": samples, "top1": 70 + top1 / 10, "top5": 90.0, "loss": top1}
    branched = {"samples": samples, "top1": top1, "top5": 93.5, "balance": 0.95}
    content = {"cost": cost, "dense": dense, "branched": branched}
    return Result(file=f"{task.name}-{seed}.json", task=task, seed=seed, content=content)


def table(*runs: Result) -> Table:
    return main_table(main_rows(group_results(runs), "results"))


def blocks(made: Table) -> dict[str, dict[str, tuple[str, ...]]]:
    """Heading → first cell → the others."""
    return {heading: {row[0]: row[1:] for row in rows} for heading, rows in made.groups}


def ours(made: Table) -> list[str]:
    return [heading for heading, _ in made.groups if heading.startswith("ours")]


def test_without_results_every_task_is_not_run_and_its_command_is_given():
    made = table()
    assert ours(made) == []
    assert [heading for heading, _ in made.groups] == [paper.title for paper in PAPER.values()]
    for name in PAPER:
        assert blocks(made)[PAPER[name].title]["Top-1 %"][1::2] == ("not run", "not run")
        assert f"sigmabranch run {name} " in " ".join(made.notes)


def test_seeds_are_averaged_beside_the_papers_figures():
    made = table(run(CIFAR, 0, 76.0), run(CIFAR, 1, 77.0), run(CIFAR, 2, 78.0))
    (heading,) = ours(made)
    assert heading == (
        "ours, 3 runs (seed 0, 1, 2): 200 + 60 epochs (the paper's schedule), "
        "weights of the last epoch, 10,000 test samples"
    )
    rows = blocks(made)[heading]
    assert rows["Top-1 %"] == ("76.99", "77.70 ± 0.10", "76.92", "77.00 ± 1.00")
    assert rows["Top-5 %"] == ("94.65", "90.00 ± 0.00", "95.30", "93.50 ± 0.00")
    assert rows["Balance"] == (NOTHING, NOTHING, "0.935", "0.950 ± 0.000")
    assert not set(ACCURACIES) & set(blocks(made)["CIFAR-100 / ResNet-50"])
    assert "run cifar100-resnet50" not in " ".join(made.notes)


def test_a_short_schedule_says_so_and_stands_alone():
    short = CIFAR.with_settings(["dense.epochs=10", "finetune.epochs=5", "dense.lr=0.2"])
    made = table(run(CIFAR, 0, 76.0), run(short, 0, 50.0), run(short, 1, 52.0))
    full, brief = ours(made)
    assert blocks(made)[full]["Top-1 %"][3] == "76.00"
    assert blocks(made)[brief]["Top-1 %"][3] == "51.00 ± 1.41"
    assert "2 runs (seed 0, 1): 10 of 200 + 5 of 60 epochs (not the paper's schedule)" in brief
    assert brief.endswith("; dense.lr 0.2 (task: 0.1)")
    assert "of 200" not in full


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("finetune.ema_decay=0.999", "last epoch, branched: moving average"),
        ("data.test_limit=100", "data.test_limit 100 (task: null)"),
        ("conversion.channels=random", "conversion.channels random (task: activation)"),
    ],
)
def test_other_weights_data_or_conversion_are_named_and_keep_the_schedule(setting, words):
    made = table(run(CIFAR, 0, 76.0), run(CIFAR.with_settings([setting]), 0, 60.0))
    _, other = ours(made)
    assert words in other
    assert "(the paper's schedule)" in other


@pytest.mark.parametrize(
    "setting", ["dense.batch_size=128", "finetune.warmup_epochs=0", "dense.schedule=constant"]
)
def test_a_schedule_is_the_papers_only_in_full(setting):
    (heading,) = ours(table(run(CIFAR.with_settings([setting]), 0, 60.0)))
    assert "(not the paper's schedule)" in heading


def test_smaller_test_sets_are_not_averaged_in():
    made = table(run(CIFAR, 0, 76.0), run(CIFAR, 1, 60.0, samples=500))
    assert [heading.partition("epoch, ")[2] for heading in ours(made)] == [
        "10,000 test samples",
        "500 test samples",
    ]


def test_a_group_of_another_network_shows_its_own_counts():
    cost = {**COST, "net": {**COST["net"], "active_params": 300}}
    narrow = CIFAR.with_settings(["tree.round_to=8"])
    made = table(run(CIFAR, 0, 76.0), run(narrow, 0, 70.0, cost=cost))
    usual, changed = ours(made)
    assert "Parameters run" not in blocks(made)[usual]
    assert blocks(made)[changed]["Parameters run"] == (NOTHING, "1,000", NOTHING, "300")


def test_a_dense_network_shared_by_several_runs_shows_how_many_there_were():
    runs = [run(CIFAR, seed, 76.0 + seed) for seed in range(2)]
    for each in runs:
        each.content["dense"].update(runs[0].content["dense"])
    made = table(*runs)
    (heading,) = ours(made)
    assert blocks(made)[heading]["Top-1 %"][1] == "77.60 (n = 1)"


def test_results_of_other_tasks_are_passed_over():
    assert ours(table(run(TASKS["digits-resnet"], 0, 99.0))) == []


def test_resnets_are_counted_in_fvcores_convention_alone():
    rows = blocks(table())["CIFAR-100 / ResNet-50"]
    assert rows["FLOPs, 1 per multiply-add"] == ("1.305 G", "50,000", "0.888 G", "40,000")
    assert "FLOPs, 2 per multiply-add" not in rows


def test_both_conventions_are_shown_where_the_papers_is_another():
    made = table()
    rows = [row for heading, rows in made.groups if "ModelNet40" in heading for row in rows]
    named = {row[0]: row[1:] for row in rows}
    assert named["FLOPs, 1 per multiply-add"] == (NOTHING, "50,000", NOTHING, "40,000")
    assert named["FLOPs, 2 per multiply-add"] == ("1.148 G", "100,400", "1.030 G", "80,320")
    assert [row[3:] for row in rows if row[0] == "  saved"] == [
        ("58.3%", "60.00%"),
        (NOTHING, "20.00%"),
        ("10.3%", "20.00%"),
    ]
    assert any(note.startswith("ModelNet40 / PointNet++: the paper's FLOPs") for note in made.notes)


def test_a_cost_without_the_doubled_count_leaves_its_cells_empty(monkeypatch):
    plain = {
        net: {key: value for key, value in part.items() if key != "flops_doubled"}
        for net, part in COST.items()
    }
    monkeypatch.setattr(MODULE, "count_task", lambda task: plain)
    rows = blocks(table())["ModelNet40 / PointNet++"]
    assert rows["FLOPs, 2 per multiply-add"] == ("1.148 G", NOTHING, "1.030 G", NOTHING)
    assert rows["  saved"][2:] == ("10.3%", NOTHING)


# -- the command ---------------------------------------------------------------------------------


def test_the_command_prints_one_object_text_markdown_or_latex(tmp_path, capsys):
    seeds = [run(CIFAR, 0, 76.0), run(CIFAR, 1, 77.0)]
    for each in seeds:
        content = {**each.content, "task": each.task.to_dict(), "seed": each.seed}
        (tmp_path / each.file).write_text(json.dumps(content), encoding="utf-8")

    def printed(**options: bool) -> str:
        verb.command("main", tmp_path, **options)
        return capsys.readouterr().out

    rows = {row["task"]: row for row in json.loads(printed(as_json=True))["rows"]}
    (made,) = rows["cifar100-resnet50"]["runs"]
    assert (made["n"], made["seeds"], made["paper_schedule"]) == (2, [0, 1], True)
    assert made["branched"]["top1"] == {"mean": 76.5, "sd": pytest.approx(0.5**0.5), "n": 2}
    command = rows["imagenet-resnet50"]["command"]
    assert command.endswith(f"--result {tmp_path}/imagenet-resnet50-seed0.json")
    text = "76.50 ± 0.71"
    assert f"   {text}\n" in printed()
    assert f"| {text} |" in printed(markdown=True)
    assert r"& 76.50 $\pm$ 0.71 \\" in printed(latex=True)


# -- LaTeX ---------------------------------------------------------------------------------------


def test_latex_escapes_what_means_something_to_it():
    made = Table(
        header=("a_b", "%"),
        groups=(("A & B #1", (("x^2 {y}", "1 ± 2"),)), ("", (("~", "\N{MINUS SIGN}1"),))),
        notes=("run --data $X \\ now",),
    )
    assert made.to_latex() == (
        "\\begin{tabular}{lr}\n"
        "\\toprule\n"
        "a\\_b & \\% \\\\\n"
        "\\midrule\n"
        "\\multicolumn{2}{p{0.9\\linewidth}}{A \\& B \\#1} \\\\\n"
        "x\\textasciicircum{}2 \\{y\\} & 1 $\\pm$ 2 \\\\\n"
        "\\midrule\n"
        "\\textasciitilde{} & $-$1 \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n\n"
        "run -{}-data \\$X \\textbackslash{} now\n"
    )
