"""``sigmabranch recipe`` and ``sigmabranch table`` as a user meets them."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from shell import Done

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sklearn", "lightning_fabric", "jinja2")),
    reason="needs the data, train and report extras",
)

RESULT = {"task": {}, "seed": 0, "branched": {}}


@pytest.fixture(scope="module")
def done(shell, tmp_path_factory) -> dict[str, Done]:
    """Every command's end, by name."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "broken.json").write_text(json.dumps(RESULT), encoding="utf-8")
    (folder / "cut").mkdir()
    (folder / "cut" / "half.json").write_text('{"task": ', encoding="utf-8")
    commands = {
        "text": ["recipe", "cifar100-resnet50"],
        "changed": ["recipe", "cifar100-resnet50", "--set", "finetune.resp_weight=0.5", "--json"],
        "unknown task": ["recipe", "cifar100-resnet5"],
        "unknown setting": ["recipe", "digits-resnet", "--set", "finetune.lambda=1"],
        "unknown table": ["table", "second"],
        "no folder": ["table", "main", "--results", str(folder / "nowhere")],
        "broken": ["table", "main", "--results", str(folder)],
        "cut short": ["table", "main", "--results", str(folder / "cut")],
        "two formats": ["table", "main", "--results", str(folder), "--json", "--latex"],
    }
    return {name: shell.run(*command, cwd=folder) for name, command in commands.items()}


def test_a_recipe_is_printed_with_a_source_for_every_constant(done):
    code, out, err = done["text"]
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert lines["lr"][1:] == ["0.1", "ours"]
    assert lines["epochs"][1:] == ["60", "the", "paper"]
    assert lines["stem"][1:] == ["cifar", "the", "paper's", "counts"]


def test_a_changed_constant_is_ours_beside_the_papers(done):
    code, out, err = done["changed"]
    assert (code, err, out.count("\n")) == (0, "", 1)
    printed = json.loads(out)
    assert printed["task"] == "cifar100-resnet50"
    assert printed["of_the_paper"] is True
    (changed,) = [item for item in printed["constants"] if "paper" in item]
    assert (changed["name"], changed["value"], changed["paper"]) == ("resp_weight", 0.5, 0.3)
    assert changed["source"] == "ours"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown task", "unknown task 'cifar100-resnet5'"),
        ("unknown setting", "lambda"),
        ("unknown table", "unknown table 'second'"),
        ("no folder", "nowhere"),
        ("broken", "broken.json"),
        ("cut short", "half.json is damaged"),
        ("two formats", "choose one of --json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(done, name, words):
    code, out, err = done[name]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
