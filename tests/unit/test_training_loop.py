"""The training loop on networks of a few dozen weights."""

from __future__ import annotations

import copy
import csv
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sigmabranch.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MemoryExhausted,
    NumericError,
)
from sigmabranch.net import SigmaBranchNet
from sigmabranch.routing import Router
from sigmabranch.training import (
    BranchedObjective,
    DenseObjective,
    FabricEngine,
    FinetuneRecipe,
    LoaderBatches,
    Recipe,
    fit,
    loop,
    resolve_device,
)
from sigmabranch.tree import TreeSpec

CLASSES, WIDTH = 4, 6


@pytest.fixture(scope="module")
def engine():
    return FabricEngine("cpu")


@pytest.fixture(scope="module")
def samples():
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(56) % CLASSES
    centre = 3 * torch.randn(CLASSES, WIDTH, generator=draw)
    return centre[y] + torch.randn(56, WIDTH, generator=draw), y


def batches(samples, size=8):
    return LoaderBatches(DataLoader(TensorDataset(*samples), size, shuffle=True), seed=5)


def dense_net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, CLASSES)
    )


def branched_net(norm=True):
    torch.manual_seed(1)
    tree = TreeSpec(projection_dim=4, projection_dropout=0.1 if norm else 0.0)
    return SigmaBranchNet(
        tree=tree,
        trunk=nn.Linear(WIDTH, 8),
        specializers={
            node: nn.Sequential(
                nn.Linear(8, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU()
            )
            for node in tree.specializers
        },
        routers={node: Router(8, nn.Identity(), tree) for node in tree.inner},
        heads={leaf: nn.Linear(8, CLASSES) for leaf in tree.leaves},
        plans={},
        source=None,
        record={},
    )


def recipe(kind=Recipe, **fields):
    defaults = {"epochs": 3, "batch_size": 8, "lr": 0.05, "warmup_epochs": 1, "clip_norm": 5.0}
    return kind(**{**defaults, **fields})


def train_dense(net, samples, plan, **options):
    return fit(net, DenseObjective(plan), batches(samples), plan, **options)


def weights(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_dense_network_learns_and_leaves_its_curve(tmp_path, engine, samples):
    x, y = samples

    def accuracy(model):
        assert not model.training
        return {"top1": 100 * (model(x).argmax(1) == y).float().mean()}

    net, plan = dense_net(), recipe(epochs=8)
    result = train_dense(net, samples, plan, folder=tmp_path, engine=engine, evaluate=accuracy)
    assert result.complete
    assert result.epoch == len(result.history) == 8
    assert not net.training
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    assert result.history[-1]["top1"] > 80
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 9)]
    assert {"seconds", "lr", "loss", "train_top1", "grad_norm", "top1"} <= set(rows[0])


def test_branched_network_learns_with_every_addition_on(tmp_path, engine, samples):
    x, y = samples
    plan = recipe(
        FinetuneRecipe,
        epochs=8,
        resp_weight_end=1.0,
        resp_temperature_end=0.5,
        resp_prior=True,
        balance_weight=0.1,
        node_grad_scale=True,
        distill_weight=0.3,
    )
    net = branched_net()
    objective = BranchedObjective(plan, teacher=dense_net())
    result = fit(net, objective, batches(samples), plan, folder=tmp_path, engine=engine)
    assert result.history[-1]["cls"] < 0.7 * result.history[0]["cls"]
    assert {"resp", "balance_loss", "distill", "train_max_p", "train_max_r"} <= set(
        result.history[0]
    )
    assert (net(x).argmax(1) == y).float().mean() > 0.8


def test_node_scaling_changes_nodes_and_not_the_loss_of_the_first_step(tmp_path, engine, samples):
    ends = []
    for scale in (False, True):
        plan = recipe(FinetuneRecipe, epochs=1, node_grad_scale=scale, clip_norm=0.0)
        net = branched_net()
        whole = batches(samples, size=56)
        start = copy.deepcopy(net.state_dict())
        result = fit(
            net, BranchedObjective(plan), whole, plan, folder=tmp_path / str(scale), engine=engine
        )
        moved = {name: net.state_dict()[name] - start[name] for name in ("trunk.weight",)}
        moved |= {"head": net.state_dict()["heads.0-0.weight"] - start["heads.0-0.weight"]}
        ends.append((result.history[0]["loss"], moved))
    assert ends[0][0] == ends[1][0]
    # Nesterov and decay aside the head's step is divided by P, the trunk's is unchanged.
    assert ends[1][1]["head"].norm() > 2.0 * ends[0][1]["head"].norm()
    torch.testing.assert_close(ends[1][1]["trunk.weight"], ends[0][1]["trunk.weight"])


@pytest.mark.parametrize("stop_at", [1, 4, 7, 10, 20])
def test_stopped_and_resumed_run_equals_the_uninterrupted_one(tmp_path, engine, samples, stop_at):
    plan = recipe(FinetuneRecipe, ema_decay=0.8, balance_weight=0.1, node_grad_scale=True)

    def run(folder, stop=None):
        net = branched_net()
        result = fit(
            net,
            BranchedObjective(plan),
            batches(samples),
            plan,
            folder=tmp_path / folder,
            engine=engine,
            evaluate=lambda model: {"norm": float(weights(model).norm())},
            stop=stop,
        )
        return net, result

    whole_net, whole = run("whole")
    asked = iter(range(1, 1000))
    _, part = run("parts", stop=lambda: next(asked) == stop_at)
    assert not part.complete
    assert part.epoch == stop_at // 7
    net, rest = run("parts")
    assert rest.complete
    assert torch.equal(weights(net), weights(whole_net))
    assert without_seconds(rest.history) == without_seconds(whole.history)


def test_a_run_made_part_by_part_equals_the_one_made_at_once(tmp_path, engine, samples):
    plan, whole, net = recipe(epochs=3), dense_net(), dense_net()
    expected = train_dense(whole, samples, plan, folder=tmp_path / "whole", engine=engine)
    for until, complete in ((1, False), (2, False), (2, False), (9, True)):
        found = train_dense(
            net, samples, plan, folder=tmp_path / "parts", engine=engine, until=until
        )
        assert (found.epoch, found.complete, found.reason) == (min(until, 3), complete, "")
        assert not net.training
    assert torch.equal(weights(net), weights(whole))
    assert without_seconds(found.history) == without_seconds(expected.history)


def test_complete_run_called_again_returns_its_weights_without_a_step(tmp_path, engine, samples):
    plan = recipe(ema_decay=0.8)
    nets = [dense_net(), dense_net()]
    for net in nets:
        result = train_dense(net, samples, plan, folder=tmp_path, engine=engine)
        assert result.complete
    assert torch.equal(weights(nets[0]), weights(nets[1]))


def test_run_that_may_not_resume_starts_anew(tmp_path, engine, samples):
    for epochs in (2, 3):
        plan = recipe(epochs=epochs)
        result = train_dense(
            dense_net(), samples, plan, folder=tmp_path, engine=engine, resume=False
        )
        assert result.epoch == epochs


@pytest.mark.parametrize(
    ("change", "named"), [({"epochs": 4}, "recipe.epochs"), ({"lr": 0.1}, "recipe.lr")]
)
def test_another_recipe_does_not_resume(tmp_path, engine, samples, change, named):
    for plan in (recipe(), recipe(**change)):
        call = (dense_net(), DenseObjective(plan), batches(samples), plan)
        if plan == recipe():
            fit(*call, folder=tmp_path, engine=engine)
        else:
            with pytest.raises(CheckpointError, match=named):
                fit(*call, folder=tmp_path, engine=engine)


def test_network_of_other_shape_does_not_resume(tmp_path, engine, samples):
    plan = recipe()
    call = (DenseObjective(plan), batches(samples), plan)
    fit(dense_net(), *call, folder=tmp_path, engine=engine)
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        fit(nn.Linear(WIDTH, CLASSES), *call, folder=tmp_path, engine=engine)
    assert "\n" not in str(caught.value)


def test_passes_change_neither_weights_nor_curve_nor_what_a_checkpoint_belongs_to(
    tmp_path, engine, samples
):
    plan = recipe(FinetuneRecipe, batch_size=24, node_grad_scale=True)  # 56 samples: 24, 24 and 8
    ends = []
    for name, passes in (("one", (1, 1)), ("two", (5, 2))):
        net = branched_net(norm=False)
        for accumulate, stop_at in zip(passes, (4, None), strict=True):
            asked = iter(range(1, 100))
            result = fit(
                net,
                BranchedObjective(plan),
                batches(samples, 24),
                plan,
                folder=tmp_path / name,
                engine=engine,
                accumulate=accumulate,
                stop=lambda asked=asked, at=stop_at: next(asked) == at,
            )
        ends.append((weights(net), without_seconds(result.history)))
    torch.testing.assert_close(ends[0][0], ends[1][0])
    assert len(ends[0][1]) == 3
    for row, expected in zip(ends[1][1], ends[0][1], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_less_than_one_pass_is_refused(tmp_path, engine, samples):
    plan = recipe()
    call = (dense_net(), DenseObjective(plan), batches(samples), plan)
    with pytest.raises(ConfigError, match="accumulate is 0"):
        fit(*call, folder=tmp_path, engine=engine, accumulate=0)


class Hungry(DenseObjective):
    """Runs out of memory above ``most`` samples at once, after the first ``easy`` calls."""

    most, easy, error = 3, 0, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def __call__(self, model, x, y, progress):
        self.easy -= 1
        if self.easy < 0 and len(y) > self.most:
            raise self.error
        return super().__call__(model, x, y, progress)


@pytest.mark.parametrize(
    "error",
    [
        Hungry.error,
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_says_what_fits_and_with_that_option_the_run_goes_on(
    tmp_path, engine, samples, error
):
    plan = recipe(batch_size=14)
    call = (batches(samples, 14), plan)
    hungry = Hungry(plan)
    hungry.easy, hungry.error = 5, error  # then comes the second step of the second epoch
    with pytest.raises(MemoryExhausted) as caught:
        fit(nn.Linear(WIDTH, CLASSES), hungry, *call, folder=tmp_path, engine=engine)
    message = str(caught.value)
    assert message.startswith("out of memory with 14 samples per pass; 3 fit: use --accumulate 5;")
    assert "\n" not in message
    assert loop.load_checkpoint(tmp_path).step == 4
    rest = fit(
        nn.Linear(WIDTH, CLASSES), hungry, *call, folder=tmp_path, engine=engine, accumulate=5
    )
    assert rest.complete


def test_a_sample_too_large_for_the_device_is_told_apart(tmp_path, engine, samples):
    plan, hungry = recipe(), Hungry(recipe())
    hungry.most = 0
    with pytest.raises(MemoryExhausted, match="a single one does not fit"):
        fit(dense_net(), hungry, batches(samples), plan, folder=tmp_path, engine=engine)


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(tmp_path, engine, samples):
    plan, hungry = recipe(), Hungry(recipe())
    hungry.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        fit(dense_net(), hungry, batches(samples), plan, folder=tmp_path, engine=engine)


def test_another_training_set_does_not_resume(tmp_path, engine, samples):
    x, y = samples
    plan = recipe()
    call = (dense_net(), DenseObjective(plan))
    fit(*call, batches(samples), plan, folder=tmp_path, engine=engine)
    with pytest.raises(CheckpointError, match=r"training_data\.samples is 56, this run's 55"):
        fit(*call, batches((x[:-1], y[:-1])), plan, folder=tmp_path, engine=engine)


def test_moving_average_is_evaluated_and_returned(tmp_path, engine, samples):
    seen = []
    plan = recipe(ema_decay=0.95)
    net = dense_net()
    train_dense(
        net,
        samples,
        plan,
        folder=tmp_path,
        engine=engine,
        evaluate=lambda model: seen.append(weights(model)) or {},
    )
    assert torch.equal(seen[-1], weights(net))
    stored = torch.load(next(tmp_path.glob("*.pt")), weights_only=True)
    assert not torch.equal(stored["model"]["0.weight"], net.state_dict()["0.weight"])


@pytest.mark.parametrize(("capability", "enabled"), [("AVX2", False), ("AVX512", True)])
def test_a_cpu_that_only_emulates_bf16_computes_in_fp32(engine, monkeypatch, capability, enabled):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with engine.autocast("bf16"):
        assert torch.is_autocast_enabled("cpu") == enabled
    with engine.autocast("fp32"):
        assert not torch.is_autocast_enabled("cpu")


def test_bf16_run_keeps_fp32_weights_and_learns(tmp_path, engine, samples, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    plan = recipe(FinetuneRecipe, epochs=6, precision="bf16")
    net = branched_net()
    result = fit(
        net, BranchedObjective(plan), batches(samples), plan, folder=tmp_path, engine=engine
    )
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_nan_loss_names_epoch_and_step_and_leaves_the_last_checkpoint(tmp_path, engine, samples):
    plan = recipe()
    objective = DenseObjective(plan)
    calls = iter(range(1, 1000))

    class Poisoned(DenseObjective):
        def __call__(self, model, x, y, progress):
            return objective(model, x * (float("nan") if next(calls) == 11 else 1), y, progress)

    with pytest.raises(NumericError, match=r"loss became NaN.*epoch 2, step 4 of 7"):
        fit(dense_net(), Poisoned(plan), batches(samples), plan, folder=tmp_path, engine=engine)
    assert loop.load_checkpoint(tmp_path).step == 7


def test_infinite_weight_is_never_saved(tmp_path, engine, samples):
    plan = recipe(clip_norm=0.0)
    net = dense_net()

    def poison():
        net[4].weight.data.fill_(float("inf"))
        return True

    with pytest.raises(NumericError, match="a weight"):
        train_dense(net, samples, plan, folder=tmp_path, engine=engine, stop=poison)
    assert loop.load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_at_a_step_with_a_checkpoint_and_handlers_return(
    tmp_path, engine, samples, number
):
    before = signal.getsignal(number)
    calls = iter(range(1, 1000))
    plan = recipe()
    result = train_dense(
        dense_net(),
        samples,
        plan,
        folder=tmp_path,
        engine=engine,
        stop=lambda: next(calls) == 9 and signal.raise_signal(number),
    )
    assert not result.complete
    assert number.name in result.reason
    assert loop.load_checkpoint(tmp_path).step in (9, 10)
    assert signal.getsignal(number) is before


def test_time_limit_stops_with_a_checkpoint(tmp_path, engine, samples):
    plan, net = recipe(), dense_net()
    result = train_dense(net, samples, plan, folder=tmp_path, engine=engine, max_minutes=0.0)
    assert not result.complete
    assert "time limit" in result.reason
    assert not net.training
    assert loop.load_checkpoint(tmp_path).step == 1


def test_long_epochs_are_saved_on_the_way(tmp_path, engine, samples, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    steps = []
    plan = recipe(epochs=1)
    train_dense(
        dense_net(),
        samples,
        plan,
        folder=tmp_path,
        engine=engine,
        progress=lambda event: event.kind == "checkpoint" and steps.append(event.step),
    )
    assert steps[:7] == [1, 2, 3, 4, 5, 6, 7]


def test_evaluation_every_second_epoch_and_after_the_last(tmp_path, engine, samples):
    plan = recipe(epochs=5, eval_every=2)
    result = train_dense(
        dense_net(),
        samples,
        plan,
        folder=tmp_path,
        engine=engine,
        evaluate=lambda model: {"top1": 50.0},
    )
    assert [row["epoch"] for row in result.history if "top1" in row] == [2, 4, 5]


SICK = {"top1": 40.0, "mean_max_p": 0.26, "usage": [0.5, 0.5, 0.0, 0.0]}


def test_sick_routing_is_reported_to_the_watcher(tmp_path, engine, samples):
    plan = recipe(FinetuneRecipe, epochs=1)
    seen = []
    call = (branched_net(), BranchedObjective(plan), batches(samples), plan)
    fit(*call, folder=tmp_path, engine=engine, evaluate=lambda model: SICK, progress=seen.append)
    warned = [event.message for event in seen if event.kind == "warning"]
    assert len(warned) == 3
    assert seen[0].kind == "start"
    assert seen[-1].kind == "end"


def test_sick_routing_is_a_python_warning_when_nobody_watches(tmp_path, engine, samples):
    plan = recipe(FinetuneRecipe, epochs=1)
    call = (branched_net(), BranchedObjective(plan), batches(samples), plan)
    with pytest.warns(UserWarning) as caught:
        fit(*call, folder=tmp_path, engine=engine, evaluate=lambda model: SICK)
    assert "dissolved" in str(caught[0].message)
    assert len(caught) == 3


def test_data_that_ends_early_is_refused(tmp_path, engine, samples):
    class Short(LoaderBatches):
        def __len__(self):
            return 9

    plan = recipe()
    short = Short(DataLoader(TensorDataset(*samples), 8))
    with pytest.raises(DataError, match="7 of 9"):
        fit(dense_net(), DenseObjective(plan), short, plan, folder=tmp_path, engine=engine)


def test_an_epoch_that_was_left_at_its_end_records_the_rate_of_its_last_step(
    tmp_path, engine, samples, monkeypatch
):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    plan = recipe()

    def run(folder, evaluate):
        return train_dense(
            dense_net(), samples, plan, folder=folder, engine=engine, evaluate=evaluate
        ).history

    def killed(net):
        raise KeyboardInterrupt

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "left", killed)
    resumed = run(tmp_path / "left", None)
    assert [row["lr"] for row in resumed] == [row["lr"] for row in whole]


def test_global_generator_is_left_as_it_was(tmp_path, engine, samples):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    plan = recipe(epochs=1)
    train_dense(DENSE, samples, plan, folder=tmp_path, engine=engine)
    assert torch.equal(torch.rand(3), expected)


DENSE = dense_net()


def test_objectives_refuse_a_recipe_that_lacks_its_input():
    with pytest.raises(ConfigError, match="teacher"):
        DenseObjective(Recipe(distill_weight=0.5))
    with pytest.raises(ConfigError, match="class clusters"):
        BranchedObjective(FinetuneRecipe(class_target=True))


def test_folder_that_cannot_be_written_is_one_line(tmp_path, engine, samples):
    (tmp_path / "file").write_text("")
    plan = recipe()
    with pytest.raises(CheckpointError, match="cannot write"):
        train_dense(dense_net(), samples, plan, folder=tmp_path / "file" / "run", engine=engine)


def test_device_names():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        resolve_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        resolve_device("cuda")
