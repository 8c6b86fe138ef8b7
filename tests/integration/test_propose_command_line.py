"""``sigmabranch convert --propose``: the data choose the tree, and the network says why."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from conftest import TINY
from sigmabranch.conversion import Proposal

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sklearn", "lightning_fabric", "fvcore")),
    reason="needs the data, train and measure extras",
)

SETTINGS = [part for setting in (*TINY, "data.train_limit=600") for part in ("--set", setting)]
CONVERT = ("convert", "a/dense", "--propose")


@pytest.fixture(scope="module")
def made(shell, tmp_path_factory):
    """A folder with a dense network, and the ends of what is proposed for it."""
    folder = tmp_path_factory.mktemp("propose")
    trained = shell.run("train", "digits-resnet", *SETTINGS, "--out", "a", cwd=folder)
    assert trained.code == 0, trained.err
    commands = {
        "dry": (*CONVERT, "--dry-run", "--json", "--out", "dry"),
        "shown": (*CONVERT, "--dry-run", "--budget", "50%"),
        "free": (*CONVERT, "--json", "--out", "free"),
        "again": (*CONVERT, "--json", "--out", "free"),
        "bounded": (*CONVERT, "--json", "--budget", "50%", "--out", "bounded"),
        "fine": ("finetune", "bounded/converted", "--json", "--out", "bounded"),
        "timm": ("convert", "timm:resnet18", "--propose", "--dry-run"),
        "no budget": ("convert", "a/dense", "--dry-run"),
        "other tree": ("convert", "a/dense", "--out", "free"),
    }
    return folder, {name: shell.run(*command, cwd=folder) for name, command in commands.items()}


def test_a_dry_run_shows_the_proposal_and_writes_nothing(made):
    folder, done = made
    code, out, err = done["dry"]
    assert code == 0, err
    assert Proposal.from_dict(json.loads(out)["proposal"]).samples == 600
    assert not (folder / "dry").exists()
    code, out, err = done["shown"]
    assert code == 0, err
    assert "Where to cut: all 600 samples" in out
    assert "trees meet" in out


def test_the_proposed_tree_is_converted_and_its_record_says_why(made):
    folder, done = made
    proposal = json.loads(done["dry"].out)["proposal"]
    assert done["free"].code == 0, done["free"].err
    assert json.loads(done["free"].out)["proposal"] == proposal
    record = json.loads((folder / "free" / "converted" / "record.json").read_text())
    assert record["proposal"] == proposal
    assert record["tree"] == proposal["tree"]
    assert done["again"].out == done["free"].out


def test_a_budget_keeps_the_proposed_leaves_and_cuts_and_solves_the_widths(made):
    folder, done = made
    proposal = json.loads(done["dry"].out)["proposal"]
    assert done["bounded"].code == 0, done["bounded"].err
    record = json.loads((folder / "bounded" / "converted" / "record.json").read_text())
    for name in ("leaves", "cuts"):
        assert record["tree"][name] == proposal["tree"][name]
    assert record["tree"]["widths"] is not None
    assert done["fine"].code == 0, done["fine"].err
    kept = json.loads((folder / "bounded" / "branched" / "record.json").read_text())
    assert kept["proposal"] == record["proposal"] == proposal


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm", "proposing a tree for timm:resnet18 needs its data"),
        ("no budget", "need a --budget"),
        ("other tree", "was made with other settings (task.tree"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(made, name, words):
    code, out, err = made[1][name]
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
