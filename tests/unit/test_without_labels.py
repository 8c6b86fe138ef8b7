"""Inputs without labels: what can be done with them, and one line for what cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sigmabranch as sb
from sigmabranch.errors import CheckpointError, ConfigError, DataError, SigmaBranchError

TREE = sb.TreeSpec(projection_dim=8)
SPEC = sb.ConversionSpec(restarts=2, norm_samples=64)
RECIPE = sb.FinetuneRecipe(
    epochs=2, lr=0.02, warmup_epochs=0, distill_weight=1.0, distill_temperature=2.0
)


@pytest.fixture(scope="module")
def inputs(batches) -> list[Tensor]:
    return [x for x, _ in batches]


@pytest.fixture(scope="module")
def net(dense, inputs) -> sb.SigmaBranchNet:
    return sb.convert(dense, inputs, TREE, spec=SPEC)


def tuned(net, dense, loader, recipe=RECIPE, **options):
    """A fine-tuned copy of the network, and what became of it."""
    own = copy.deepcopy(net)
    return own, sb.finetune(own, loader, recipe, teacher=dense, device="cpu", **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def refused(call, *arguments, **options) -> str:
    with pytest.raises(SigmaBranchError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- fine-tuning ---------------------------------------------------------------------------------


def test_a_teacher_alone_trains_whatever_form_the_inputs_have(net, dense, batches, inputs):
    wrong = [(x, torch.randint(5, (len(x),))) for x in inputs]
    loaders = {
        "tensors": (inputs, {}),
        "one-tuples": ([(x,) for x in inputs], {}),
        "a data loader": (DataLoader(TensorDataset(torch.cat(inputs)), 32), {}),
        "labels to ignore": (batches, {"labels": False}),
        "wrong labels to ignore": (wrong, {"labels": False}),
    }
    results = {
        name: tuned(net, dense, loader, **options) for name, (loader, options) in loaders.items()
    }
    first, _ = results["tensors"]
    assert not same(first, net)
    for name, (other, result) in results.items():
        assert result.complete
        assert same(first, other), name


def test_figures_that_need_labels_are_absent_and_the_rest_is_there(net, dense, inputs, batches):
    recipe = sb.FinetuneRecipe(**{**RECIPE.to_dict(), "balance_weight": 0.1})
    _, blind = tuned(net, dense, inputs, recipe)
    _, told = tuned(net, dense, batches, recipe)
    mine, theirs = set(blind.history[-1]), set(told.history[-1])
    assert theirs - mine == {"train_top1", "cls"}
    assert mine - theirs == {"train_as_teacher"}
    record = blind.history[-1]
    expected = record["distill"] + 0.3 * record["resp"] + 0.1 * record["balance_loss"]
    assert record["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_leaves_come_to_say_what_the_teacher_says(net, dense, inputs):
    recipe = sb.FinetuneRecipe(
        **{**RECIPE.to_dict(), "epochs": 25, "lr": 0.05, "node_grad_scale": True}
    )
    own, result = tuned(net, dense, inputs, recipe)
    first, last = result.history[0], result.history[-1]
    assert last["distill"] < 0.5 * first["distill"]
    assert last["train_as_teacher"] > first["train_as_teacher"]
    with torch.no_grad():
        x = torch.cat(inputs)
        teacher = dense(x).argmax(1)
        before, after = ((each(x).argmax(1) == teacher).sum() for each in (net, own))
    assert after > before


def test_a_step_can_be_done_in_passes(net, dense, inputs):
    _, whole = tuned(net, dense, inputs)
    own, parts = tuned(net, dense, inputs, accumulate=2)
    assert parts.complete and not same(own, net)
    # Dropout differs, and batch norms see half the samples.
    assert parts.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=0.2)


def test_a_stopped_run_goes_on_as_if_nothing_had_been(net, dense, inputs, tmp_path):
    uninterrupted, _ = tuned(net, dense, inputs)
    steps = iter(range(100))
    _, stopped = tuned(net, dense, inputs, folder=tmp_path, stop=lambda: next(steps) == 3)
    assert not stopped.complete and stopped.epoch == 1
    resumed, result = tuned(net, dense, inputs, folder=tmp_path)
    assert result.complete
    assert same(resumed, uninterrupted)


def test_a_run_that_ignores_labels_is_not_continued_with_them(net, dense, batches, tmp_path):
    tuned(net, dense, batches, labels=False, folder=tmp_path)
    with pytest.raises(CheckpointError, match="labels"):
        tuned(net, dense, batches, folder=tmp_path)


def test_a_dense_student_learns_from_a_teacher_alone(dense, inputs):
    recipe = sb.Recipe(epochs=1, lr=0.01, warmup_epochs=0, distill_weight=1.0)
    student = copy.deepcopy(dense)
    result = sb.train(student, inputs, recipe, teacher=dense, device="cpu")
    assert not same(student, dense)
    assert "train_top1" not in result.history[0]
    assert "set it to 1" in refused(sb.train, student, inputs, sb.Recipe(epochs=1), device="cpu")


def test_without_labels_and_teacher_the_message_says_what_to_do(net, dense, inputs, batches):
    plain = sb.FinetuneRecipe(epochs=1)
    half = sb.FinetuneRecipe(epochs=1, distill_weight=0.5)
    own = copy.deepcopy(net)
    assert refused(sb.finetune, own, inputs, plain, device="cpu") == (
        "the loader gives no labels, and recipe distill_weight is 0: set it to 1 and give a "
        "teacher, or yield (inputs, labels)"
    )
    assert "distill_weight is 0.5" in refused(
        sb.finetune, own, inputs, half, teacher=dense, device="cpu"
    )
    assert "distill_weight is 0:" in refused(
        sb.finetune, own, batches, plain, labels=False, device="cpu"
    )
    with pytest.raises(ConfigError, match="needs a teacher: give one"):
        sb.finetune(own, inputs, RECIPE, device="cpu")
    assert same(own, net)


@pytest.mark.parametrize(
    "strange",
    [
        lambda x: {"image": x},
        lambda x: (x, torch.zeros(len(x)).long(), x),
        lambda x: (x, None),
        lambda x: (),
        lambda x: x.numpy(),
    ],
    ids=["dict", "triple", "pair with nothing", "empty", "array"],
)
def test_batches_of_another_form_are_refused_by_all(net, dense, inputs, strange):
    loader = [strange(x) for x in inputs]
    wanted = "each batch of the loader must be a"
    assert wanted in refused(sb.convert, dense, loader, TREE)
    assert wanted in refused(tuned, net, dense, loader)
    assert wanted in refused(tuned, net, dense, loader, labels=False)
    assert wanted in refused(sb.evaluate, net, loader)


def test_a_batch_of_two_inputs_is_not_taken_for_a_pair(net, dense, inputs):
    twos = inputs[0].split(2)
    _, result = tuned(net, dense, twos[:4])
    assert result.complete
    assert "distill_weight is 0" in refused(
        sb.finetune, copy.deepcopy(net), twos[:4], sb.FinetuneRecipe(epochs=1), device="cpu"
    )


# -- conversion ----------------------------------------------------------------------------------


def test_conversion_by_latents_is_the_same_with_labels_and_without(net, dense, batches, inputs):
    told = sb.convert(dense, batches, TREE, spec=SPEC)
    assert told.record == net.record
    assert same(told, net)
    tuples = sb.convert(dense, [(x,) for x in inputs], TREE, spec=SPEC)
    assert same(tuples, net)
    again = sb.rebuild(dense, net.record, inputs)
    assert same(again, net)


def test_conversion_without_labels_knows_no_class(net):
    assert net.record["samples"] == 96
    assert all(split["class_branch"] is None for split in net.record["splits"].values())


def test_classes_are_not_clustered_without_labels(dense, inputs, batches):
    spec = sb.ConversionSpec(clusters="classes", restarts=2)
    assert "clusters=classes needs labels" in refused(sb.convert, dense, inputs, TREE, spec=spec)
    told = sb.convert(dense, batches, TREE, spec=spec)
    assert "clusters=classes needs labels" in refused(sb.rebuild, dense, told.record, inputs)


# -- measuring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: [x]])
def test_measuring_needs_labels(net, dense, inputs, form):
    loader = [form(x) for x in inputs]
    for measure, network in ((sb.evaluate, net), (sb.evaluate_dense, dense)):
        with pytest.raises(DataError, match=r"must be a pair \(inputs, labels\)"):
            measure(network, loader)
