"""Tasks as data, and what a chain refuses before it writes its first file."""

from __future__ import annotations

import json
import os

import pytest
import torch

from sigmabranch import files
from sigmabranch.backbones import ResNet
from sigmabranch.errors import CheckpointError, ConfigError, ConversionError, DataError
from sigmabranch.saving import save_dense
from sigmabranch.tasks import TASKS, Chain, Stopped, Task, count_task, find_task
from sigmabranch.tree import TreeSpec

pytest.importorskip("sklearn")


@pytest.fixture
def untrained(task, tmp_path):
    """A saved dense network of the task."""
    torch.manual_seed(0)
    notes = {"task": task.to_dict(), "seed": 0}
    save_dense(ResNet(task.model), tmp_path / "source" / "dense", notes)
    return tmp_path / "source" / "dense"


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_survives_json(task):
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("finetune.lr=0.5", lambda t: t.finetune.lr == 0.5),
        ("dense.lr=1", lambda t: t.dense.lr == 1.0),
        ("resp_prior=true", lambda t: t.finetune.resp_prior is True),
        ("projection_dim=7", lambda t: t.tree.projection_dim == 7),
        ("tree.depth=3", lambda t: t.tree.leaves == TreeSpec.balanced(3).leaves),
        ("leaves=[[0],[1,0],[1,1]]", lambda t: t.tree.leaves == ((0,), (1, 0), (1, 1))),
        ("tree.widths=[8,16]", lambda t: t.tree.widths == (8, 16)),
        ("clusters=classes", lambda t: t.conversion.clusters == "classes"),
        ('clusters="classes"', lambda t: t.conversion.clusters == "classes"),
        ("resp_weight_end=null", lambda t: t.finetune.resp_weight_end is None),
        ("dense.betas=[0.5,0.9]", lambda t: t.dense.betas == (0.5, 0.9)),
        (" data.train_limit = 9 ", lambda t: t.data.train_limit == 9),
    ],
)
def test_a_setting_reaches_its_field_and_no_other(setting, found):
    task = find_task("digits-resnet")
    changed = task.with_settings([setting])
    assert found(changed)
    before, after = task.to_dict(), changed.to_dict()
    different = [name for name in before if before[name] != after[name]]
    assert len(different) <= 1


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("lr", "takes key=value"),
        ("lr=0.1", r"ambiguous: write dense\.lr or finetune\.lr"),
        ("finetune.lrr=0.1", r"did you mean finetune\.lr"),
        ("resp_wieght=0.1", "did you mean resp_weight"),
        ("zzz=1", "sections are data, model"),
        ("dense.lr=fast", "lr must be float"),
        ("dense.epochs=1.5", "epochs must be int"),
        ("dense.epochs=0", "epochs must be at least 1"),
        ("tree.depth=two", "whole number"),
        ("tree.depth=0", "from 1 to 10"),
        ("tree.projection_dim=1.5", "projection_dim must be int"),
        ("tree.widths=[8]", "1 entries for 2 levels"),
        ("model.classes=ten", "classes must be int"),
        ("model.planes=8", "planes must be tuple"),
        ("data.name=mnist", "unknown data set 'mnist'"),
        ("data.image_size=64", "8 x 8 pixels, not 64"),
        ("data.train_limit=0", "at least 1"),
        ("data.held_out=0", "held_out must be at least 1"),
        ("conversion.samples=1.5", "samples must be int"),
        ("shared_fraction=2", r"in \[0, 1\]"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(setting, reason):
    with pytest.raises(ConfigError, match=reason):
        find_task("digits-resnet").with_settings([setting])


@pytest.mark.parametrize("change", [{"tree": None}, {"dense": {"lr": "x"}}, {"name": 5, "data": 3}])
def test_json_that_is_no_task_is_refused(change):
    with pytest.raises(ConfigError):
        Task.from_dict({**find_task("digits-resnet").to_dict(), **change})


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"digits-resnet, shapes-pointnet2.*mean digits-resnet"):
        find_task("digit-resnet")


def test_counting_a_tree_that_does_not_fit_is_refused(task):
    with pytest.raises(ConfigError, match="only 12"):
        count_task(task.with_settings(["tree.widths=[13,4]"]))


# -- chains --------------------------------------------------------------------------------------


def written(folder) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.mark.parametrize(
    ("settings", "options", "error"),
    [
        (["tree.widths=[99,99]"], {}, ConfigError),
        (["tree.depth=3"], {}, ConfigError),
        (["tree.cuts=[\"layer2\",\"fc\"]"], {}, ConfigError),
        (["model.block=basic", "model.strides=[1,1,1]", "model.planes=[4,4,4]",
          "tree.cuts=[\"layer2\",\"layer3\"]", "tree.entry=project"], {}, ConversionError),
        (["model.classes=7"], {}, DataError),
        (["model.in_channels=3"], {}, DataError),
        (["data.name=cifar100"], {}, DataError),
        ([], {"device": "abacus"}, ConfigError),
        ([], {"start": {"dense": "nowhere"}}, CheckpointError),
    ],
    ids=["wide", "deep", "cut", "shortcut", "classes", "channels", "data", "device", "start"],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_file(
    task, tmp_path, settings, options, error
):
    with pytest.raises(error):
        Chain(task.with_settings(settings), tmp_path / "out", **options)
    assert written(tmp_path / "out") == []


def test_a_folder_of_other_settings_or_seed_is_refused(task, tmp_path):
    Chain(task, tmp_path)
    Chain(task, tmp_path)
    with pytest.raises(CheckpointError, match=r"task\.finetune\.lr is .* there and 0\.7 here"):
        Chain(task.with_settings(["finetune.lr=0.7"]), tmp_path)
    with pytest.raises(CheckpointError, match="seed is 0 there and 1 here"):
        Chain(task, tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="in use"):
        Chain(task, tmp_path, resume=False)


def test_a_start_is_copied_without_its_training(task, untrained, tmp_path):
    (untrained / "state.json").write_text("{}")
    (untrained / "step-000000001.pt").write_text("")
    chain = Chain(task, tmp_path / "out", start={"dense": untrained})
    assert written(tmp_path / "out" / "dense") == ["manifest.json", "weights.safetensors"]
    assert torch.equal(chain.dense().fc.weight, Chain(task, untrained.parent).dense().fc.weight)


def test_a_copy_that_was_cut_short_is_made_again(task, untrained, tmp_path):
    Chain(task, tmp_path / "out", start={"dense": untrained})
    folder = tmp_path / "out" / "dense"
    (folder / "manifest.json").unlink()
    digest = files.sha256(folder / "weights.safetensors")
    (folder / "weights.safetensors").rename(folder / f".weights.safetensors.{digest[:16]}.pending")
    Chain(task, tmp_path / "out", start={"dense": untrained}).dense()
    assert written(folder) == ["manifest.json", "weights.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["task.json", "result.json", "dense/weights.safetensors", "dense/state.json",
     "dense/metrics.csv", "converted/record.json", "branched/manifest.json"],
)  # fmt: skip
def test_files_of_others_stay_and_are_refused_before_any_work(task, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"mine": 1}')
    with pytest.raises(CheckpointError, match="choose another"):
        Chain(task, tmp_path)
    assert path.read_text() == '{"mine": 1}'
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_a_start_of_another_kind_task_or_content_is_refused(task, untrained, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="holds a dense network, need a branched one"):
        Chain(task, out, start={"converted": untrained})
    with pytest.raises(CheckpointError, match=r"another task: model\.planes"):
        Chain(task.with_settings(["model.planes=[2,3,5]"]), out, start={"dense": untrained})
    save_dense(ResNet(task.model), tmp_path / "loose")
    with pytest.raises(CheckpointError, match="another task"):
        Chain(task, out, start={"dense": tmp_path / "loose"})
    assert written(out) == []
    Chain(task, out, start={"dense": untrained})
    save_dense(ResNet(task.model), tmp_path / "other", {"task": task.to_dict(), "seed": 0})
    with pytest.raises(CheckpointError, match="already holds another network"):
        Chain(task, out, start={"dense": tmp_path / "other"})


def test_a_chain_without_time_stops_with_a_checkpoint_and_goes_on(task, tmp_path):
    with pytest.raises(Stopped, match="the time limit is reached; the same command continues"):
        Chain(task, tmp_path, max_minutes=0).dense()
    assert "state.json" in written(tmp_path / "dense")
    assert "manifest.json" not in written(tmp_path / "dense")
    Chain(task, tmp_path).dense()
    assert "manifest.json" in written(tmp_path / "dense")


# -- trees that route most of the arithmetic -------------------------------------------------------


@pytest.mark.parametrize(("cuts", "depth"), [(["layer1", "layer2"], 2), (["layer1"], 1)])
def test_a_tree_that_begins_early_goes_through_the_whole_chain(task, tmp_path, cuts, depth):
    early = task.with_settings(
        [f"tree.depth={depth}", f"tree.cuts={json.dumps(cuts)}", "model.planes=[8,8,8]",
         "model.stem_width=8"]
    )  # fmt: skip
    counted = count_task(early)
    assert counted["net"]["routed_macs_share"] > 0.5
    chain = Chain(early, tmp_path, device="cpu")
    measured = chain.measured()
    assert measured["cost"]["net"] == counted["net"]
    assert measured["branched"]["samples"] == len(chain.dataset.test)
    assert len(measured["branched"]["leaves"]) == 2**depth


# -- held-out samples ----------------------------------------------------------------------------


def test_a_training_is_watched_on_the_held_out_samples_and_ends_as_without_them(task, tmp_path):
    """Measured by their number: 30 are held out, and the test split has others."""
    held = Chain(task.with_settings(["data.held_out=30"]), tmp_path / "held", device="cpu")
    trained = held.dense()
    assert [epoch["samples"] for epoch in held.history("dense")] == [30]
    assert held.dense_accuracy()["samples"] == len(held.dataset.test) != 30
    assert held.dense_accuracy("held-out")["samples"] == 30
    net = held.converted()
    assert held.accuracy(net)["samples"] == len(held.dataset.test)
    assert held.accuracy(net, "held-out")["samples"] == 30
    rest = Chain(task, tmp_path / "rest", device="cpu")
    assert torch.equal(trained.fc.weight, rest.dense().fc.weight)
    with pytest.raises(ConfigError, match=r"set data\.held_out"):
        rest.dense_accuracy("held-out")


def test_a_task_saved_before_samples_could_be_held_out_is_still_the_same(task, tmp_path):
    Chain(task, tmp_path, device="cpu")
    saved = json.loads((tmp_path / "task.json").read_text())
    saved = {name: saved[name] for name in ("task", "seed")}  # and without a seal
    del saved["task"]["data"]["held_out"], saved["task"]["finetune"]["upcycle"]
    assert Task.from_dict(saved["task"]) == task
    (tmp_path / "task.json").write_text(json.dumps(saved))
    Chain(task, tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match="held_out is None there and 30 here"):
        Chain(task.with_settings(["data.held_out=30"]), tmp_path, device="cpu")


# -- recipes that could only fail later ----------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["dense.distill_weight=0.5"], "teacher"),
        (["finetune.class_target=true", "finetune.resp_prior=false"], "clusters=classes"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_anything_is_written(
    task, tmp_path, settings, named
):
    with pytest.raises(ConfigError, match=named):
        Chain(task.with_settings(settings), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_dense_network_of_another_recipe_is_not_taken_for_the_tasks_own(
    task, untrained, tmp_path
):
    longer = task.with_settings(["dense.epochs=7"])
    with pytest.raises(CheckpointError, match="epochs is 1 there and 7 here"):
        Chain(longer, tmp_path / "run", device="cpu", start={"dense": untrained})
