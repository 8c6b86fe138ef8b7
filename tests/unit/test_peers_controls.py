"""Controls: what they cost, what they share with the branched network, and their bench."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sigmabranch as sb
from sigmabranch.errors import ConfigError
from sigmabranch.measure import cost, count_parameters, evaluate, latency
from sigmabranch.net import SigmaBranchNet
from sigmabranch.peers import (
    CONTROLS,
    GROUPS,
    SYSTEMS,
    dense_of_size,
    find_rows,
    find_system,
    run_control,
    sizing,
)
from sigmabranch.peers.compare import run_row
from sigmabranch.peers.efficient import Efficient
from sigmabranch.peers.quantized import quantize
from sigmabranch.peers.rerouted import FlatNet, HashRouter
from sigmabranch.peers.sizing import active_params, dense_within
from sigmabranch.tasks import TASKS, Chain, count_task, find_task
from sigmabranch.training import FinetuneRecipe, branched_loss
from sigmabranch.tree import node_key

pytest.importorskip("sklearn")
pytest.importorskip("fvcore")


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Widths of three or four leave no network within one percent."""
    monkeypatch.setattr(sizing, "TOLERANCE", 0.1)


@pytest.fixture(scope="module")
def net(dense, batches) -> SigmaBranchNet:
    torch.manual_seed(0)
    spec = sb.ConversionSpec(centred=True, restarts=2)
    return sb.convert(dense, batches, sb.TreeSpec(projection_dim=8), spec=spec)


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_narrow_dense_network_meets_its_size(name):
    spec = TASKS[name].model
    with torch.device("meta"):
        whole = sum(p.numel() for p in spec.build().parameters())
        narrow = dense_of_size(spec, whole // 3).build()
    found = sum(p.numel() for p in narrow.parameters())
    assert found == pytest.approx(whole / 3, rel=0.01)


@pytest.mark.parametrize("name", ["digits-resnet", "cifar100-vit", "modelnet40-pointnet2"])
def test_the_largest_network_within_a_size_never_exceeds_it(name):
    spec = TASKS[name].model
    with torch.device("meta"):
        whole = sum(p.numel() for p in spec.build().parameters())
        narrow = dense_within(spec, whole // 3).build()
    found = sum(p.numel() for p in narrow.parameters())
    assert 0.97 * (whole // 3) < found <= whole // 3


def test_a_size_out_of_reach_is_refused(task):
    with pytest.raises(ConfigError, match="the narrowest has"):
        dense_within(task.model, 10)
    with pytest.raises(ConfigError, match="no narrower network"):
        dense_of_size(task.model, 10**9)


def test_controls_of_equal_size_and_equal_operations_are_that(monkeypatch):
    monkeypatch.setattr(sizing, "TOLERANCE", 0.01)
    task = find_task("digits-resnet")
    branched = count_task(task)["net"]
    by_size = find_system("dense-equal").count(task)["net"]
    by_macs = find_system("dense-equal-macs").count(task)["net"]
    assert by_size["active_params"] == pytest.approx(branched["active_params"], rel=0.01)
    assert by_macs["macs_flop_counter"] == pytest.approx(branched["macs_flop_counter"], rel=0.01)
    assert by_macs["active_params"] > by_size["active_params"]


def test_a_counted_control_has_the_keys_of_a_counted_task(task):
    ours = count_task(task)
    for name in ("dense-equal", "single-path", "flat-routing", "hash-routing", "sigma-branch"):
        counted = find_system(name).count(task)
        assert counted.keys() == ours.keys() | {"peer"}, name
        # What is routed is counted of trees alone.
        assert counted["net"].keys() | {"routed_macs_share"} == ours["net"].keys(), name
        assert counted["peer"]["name"] == find_system(name).name
        json.dumps(counted)


# -- other routes --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "hash"])
def test_hard_and_soft_passes_reach_the_same_leaf_under_other_routers(net, batches, kind):
    x = batches[0][0]
    if kind == "flat":
        other: SigmaBranchNet = FlatNet(net).eval()
        with torch.no_grad():
            latent_BD = other.router(()).latent(other.trunk(x))
            other.router(()).gate.weight.copy_(latent_BD[:4] - latent_BD.mean(0))
            other.router(()).gate.bias.copy_(-other.router(()).gate.weight @ latent_BD.mean(0))
    else:
        other = copy.deepcopy(net)
        for number, node in enumerate(net.tree.inner):
            router = net.router(node)
            hashed = HashRouter(router.channels, router.projection[0], number)
            other.routers[node_key(node)] = hashed
    with torch.no_grad():
        soft, hard = other.soft(x), other.hard(x)
        single = torch.stack([other.hard(row[None]).leaf[0] for row in x])
    assert torch.equal(other.leaf_of(soft), hard.leaf)
    assert torch.equal(single, hard.leaf)
    assert len(hard.leaf.unique()) > 1
    chosen = soft.logits[torch.arange(len(x)), hard.leaf]
    torch.testing.assert_close(hard.logits, chosen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(soft.log_prob.exp().sum(1), torch.ones(len(x)))


def test_a_flat_net_charges_one_router_to_a_path(net, batches):
    flat = FlatNet(net)
    counted = cost(flat, batches[0][0])["net"]
    path = flat.path(flat.tree.leaves[0])
    assert counted["active_params"] == sum(p.numel() for p in path.parameters())
    assert len(path.routers) == 1
    routers = sum(p.numel() for p in flat.routers.parameters())
    shared = sum(p.numel() for n, p in net.named_parameters() if not n.startswith("routers"))
    assert counted["total_params"] == shared + routers


def test_a_hash_tells_images_apart_but_not_their_kind():
    router = HashRouter(16, nn.Identity(), seed=3)
    x = torch.randn(2000, 16)
    branch = router(x).argmax(1)
    assert 0.45 < branch.float().mean() < 0.55
    near = router(x + 0.3 * torch.randn(2000, 16)).argmax(1)
    assert 0.4 < (near == branch).float().mean() < 0.6
    assert torch.equal(router(x).argmax(1), branch)
    assert torch.equal(router(x + 1e-6).argmax(1)[:50], branch[:50])


# -- schedules of the loss -----------------------------------------------------------------------


def test_leaves_share_first_and_specialise_later():
    torch.manual_seed(0)
    soft = torch.randn(6, 4, 5), torch.randn(6, 4).log_softmax(1)
    y = torch.arange(6) % 5
    late = FinetuneRecipe(share_first=0.5)
    early = branched_loss(soft, y, late, progress=0.0)
    halfway = branched_loss(soft, y, late, progress=0.25)
    after = branched_loss(soft, y, late, progress=0.5)
    assert torch.allclose(early.weight, torch.full((6, 4), 0.25))
    assert torch.allclose(halfway.weight, (soft[1].exp() + 0.25) / 2)
    plain = branched_loss(soft, y, FinetuneRecipe(), progress=0.5)
    assert torch.equal(after.total, plain.total)
    assert not torch.equal(early.total, plain.total)


# -- eight bits ----------------------------------------------------------------------------------


def test_an_eight_bit_network_agrees_with_the_dense_one(dense, batches):
    quantized = quantize(dense, [x for x, _ in batches], batches[0][0][:1])
    with torch.no_grad():
        ours, theirs = quantized(batches[0][0]), dense(batches[0][0])
    assert 0 < (ours - theirs).abs().max() < 0.15 * theirs.abs().max()
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.8


# -- rows ----------------------------------------------------------------------------------------


def test_an_unknown_peer_row_or_setting_is_refused(task):
    with pytest.raises(ConfigError, match=r"unknown peer 'fpgn'.*known are"):
        find_system("fpgn")
    with pytest.raises(ConfigError, match="unknown single-path key 'matsch': did you mean match"):
        find_system("single-path", {"matsch": "epochs"})
    with pytest.raises(ConfigError, match="choose one of epochs, training"):
        find_system("single-path", {"match": "hours"})
    with pytest.raises(ConfigError, match="no leaf 7"):
        find_rows(task, ["rerouted"], {"rerouted": {"rule": "7"}})
    with pytest.raises(ConfigError, match="'regnety', which is not compared"):
        find_rows(task, ["single-path"], {"regnety": {}})


def test_a_row_that_is_impossible_is_skipped_in_a_group_and_refused_by_name(task):
    rows, skipped = find_rows(task, ["controls"], {})
    assert "regnety" in skipped
    assert "718 parameters" in skipped["regnety"]
    assert "regnety" not in rows
    with pytest.raises(ConfigError, match="no RegNetY is as small as 718 parameters"):
        find_rows(task, ["regnety"], {})


def test_a_transformer_is_compared_with_what_it_can_have():
    task = find_task("cifar100-vit")
    rows, skipped = find_rows(task, ["peers", "controls"], {})
    assert {"ffn-moe", "ffn-moe-untrained", "dense-continued", "single-path"} <= set(rows)
    assert {"fpgm", "skipnet"} <= skipped.keys()
    narrow, _ = find_rows(task, ["dense-equal"], {"dense-equal": {"params": 636_044}})
    assert narrow["dense-equal"].count(task)["net"]["active_params"] == pytest.approx(
        636_044, rel=0.01
    )


def test_widths_are_solved_for_a_share_of_the_dense_network(task):
    wide = task.with_settings(["model.planes=[2,8,12]"])
    row = find_system("sigma-branch", {"active_share": 0.3})
    net = row.count(wide)
    assert net["net"]["active_params"] == pytest.approx(0.3 * net["dense"]["params"], rel=0.05)
    with pytest.raises(ConfigError, match="no widths of the tree make a path 2%"):
        find_system("sigma-branch", {"active_share": 0.02}).check(wide)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        find_system("sigma-branch", {"active_share": 1.5})


@pytest.mark.parametrize("share", [15, 20, 25])
def test_a_smaller_tree_has_controls_of_its_own_size(share):
    rows = {name: find_system(f"active-{share}{name}") for name in ("", "-path", "-dense")}
    rows["-distilled"] = taught = find_system(f"active-{share}-distilled")
    assert [row.name for row in rows.values()] == [
        "sigma-branch", "single-path", "dense-equal", "dense-equal",
    ]  # fmt: skip
    assert {row.active_share for row in rows.values()} == {share / 100}
    assert taught == rows["-dense"].changed({"distill_weight": 0.5})
    assert all(GROUPS["sizes"][f"active-{share}{name}"] == row for name, row in rows.items())


def test_a_small_network_is_narrowed_further_from_one_factor(monkeypatch):
    monkeypatch.setattr(sizing, "TOLERANCE", 0.01)
    spec = find_task("cifar100-small").with_settings(
        ["model.layers=[1,1]", "model.planes=[12,24]", "model.strides=[1,2]"]
    ).model  # fmt: skip
    narrow = dense_of_size.__wrapped__(spec, 12_397)
    assert count_parameters([narrow.build()]) == pytest.approx(12_397, rel=0.01)
    with pytest.raises(ConfigError, match="no narrower network has 10 parameters"):
        dense_of_size.__wrapped__(spec, 10)


def test_a_control_has_one_size(task):
    for name in ("dense-equal", "single-path"):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            find_system(name, {"active_share": 1.5})
    with pytest.raises(ConfigError, match="set one"):
        find_system("dense-equal", {"active_share": 0.2, "params": 1000})


def test_controls_of_a_smaller_tree_are_trained_at_its_size(task, tmp_path):
    task = task.with_settings(["model.planes=[2,8,12]"])
    chain = Chain(task, tmp_path, device="cpu")
    path, dense = (
        run_row(name, find_system(name, {"active_share": 0.3}), chain)["cost"]["net"]
        for name in ("single-path", "dense-equal")
    )
    size = active_params(find_system("sigma-branch", {"active_share": 0.3}).task(task))
    assert path["active_params"] < size
    assert dense["active_params"] == pytest.approx(size, rel=sizing.TOLERANCE)


def test_every_row_survives_json():
    rows = {name: row for group in GROUPS.values() for name, row in group.items()}
    for name, row in {**rows, **{name: kind() for name, kind in SYSTEMS.items()}}.items():
        settings = json.loads(json.dumps(row.to_dict()))
        assert settings.pop("name") == row.name
        assert SYSTEMS[row.name]().changed(settings) == row, name
        assert row.summary


def test_an_ablation_changes_the_method_and_nothing_that_is_shared():
    for name in ("digits-resnet", "cifar100-small"):
        task = find_task(name)
        for row in GROUPS["ablations"].values():
            # Solving for widths takes seconds.
            changed = row.changed({"active_share": None, "same_size": False}).task(task)
            assert changed.dense == task.dense
            assert changed.finetune.epochs == task.finetune.epochs
    with pytest.raises(ConfigError, match="share data and source network"):
        find_system("sigma-branch", {"settings": ["dense.epochs=9"]}).check(task)


def test_an_ablation_that_changes_nothing_is_left_out(task):
    rows, skipped = find_rows(task, ["ablations"], {})
    alike = {"centred", "node-scale", "sharp"}
    assert alike <= skipped.keys()
    assert not alike & rows.keys()
    assert all("digits-resnet is set like that already" in skipped[name] for name in alike)
    with pytest.raises(ConfigError, match="sigma-branch again"):
        find_rows(task, ["sharp"], {})
    SYSTEMS["sigma-branch"]().check(task)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_tree_of_another_depth_has_as_large_a_path(depth):
    task, row = find_task("digits-resnet"), find_system(f"depth-{depth}")
    changed = row.task(task)
    assert changed.tree.depth == depth
    active = [count_task(each)["net"]["active_params"] for each in (task, changed)]
    assert active[1] == pytest.approx(active[0], rel=0.05)
    with pytest.raises(ConfigError, match="set one"):
        row.changed({"active_share": 0.5})


def test_settings_leave_a_peer_its_size_unless_they_are_about_it():
    task = find_task("cifar100-small")
    sized, _ = find_rows(task, ["hrank", "l1"], {})
    rows, _ = find_rows(task, ["hrank", "l1"], {"hrank": {"samples": 7}, "l1": {"rate": 0.2}})
    assert rows["hrank"] == sized["hrank"].changed({"samples": 7})
    assert rows["l1"].rate == 0.2 != sized["l1"].rate
    gates, _ = find_rows(task, ["skipnet"], {"skipnet": {"rate_weight": 1.0}})
    assert gates["skipnet"].rate_weight == 1.0
    assert gates["skipnet"].mode == "rate"
    published, _ = find_rows(task, ["hrank"], {"hrank": {"rates": 62}})
    assert published["hrank"].rate is None


# -- the bench -----------------------------------------------------------------------------------


def test_the_chain_and_controls_run_and_are_read_back(task, tmp_path):
    chain = Chain(task, tmp_path)
    net = chain.branched()
    alike = {"always-leaf-1", "always-leaf-2", "class-leaf"}
    possible = [name for name in CONTROLS if name not in {"regnety", *alike}]
    found = {name: run_control(chain, name) for name in possible}
    active = count_task(task)["net"]["active_params"]
    routers = sum(p.numel() for n in ((), (0,)) for p in net.router(n).parameters())
    assert found["single-path"]["params"] == active - routers
    assert found["dense-equal"]["params"] == pytest.approx(active, rel=0.1)
    assert found["dense-continued"]["params"] == count_task(task)["dense"]["params"]
    assert found["hash-routing"]["params"] == active - routers
    figures = chain.measured()["branched"]
    assert found["oracle-leaf"]["top1"] == figures["oracle_leaf"]
    assert found["random-routing"]["top1"] == pytest.approx(sum(figures["always_leaf"]) / 4)
    for name, measured in found.items():
        assert measured["epochs"] == (3 if name == "single-path-compute" else 2), name
        assert 0 <= measured["top1"] <= 100
    assert {name: run_control(Chain(task, tmp_path), name) for name in possible} == found


def test_a_network_is_timed_on_one_input_after_the_other():
    seen = []

    class Seeing(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    inputs = torch.arange(3.0)[:, None]
    found = latency(Seeing(), nn.Identity(), inputs)
    assert all(x.shape == (1, 1) for x in seen)
    assert {float(x) for x in seen} == {0.0, 1.0, 2.0}
    assert found["ratio"] == pytest.approx(found["ms"] / found["reference_ms"])


@pytest.mark.parametrize("centred", [True, False])
def test_a_flat_router_is_aimed_where_the_tree_sends_inputs(dense, batches, centred):
    spec = sb.ConversionSpec(centred=centred, restarts=2)
    net = sb.convert(dense, batches, sb.TreeSpec(projection_dim=32), spec=spec)
    torch.manual_seed(0)
    flat = FlatNet(net).eval()
    bench = SimpleNamespace(
        task=SimpleNamespace(conversion=spec),
        device=torch.device("cpu"),
        calibration=lambda: SimpleNamespace(part=lambda *_: batches),
    )
    flat.aim(net, bench)
    with torch.no_grad():
        alike = [float((flat.hard(x).leaf == net.hard(x).leaf).float().mean()) for x, _ in batches]
        latent_ND = torch.cat([flat.router(()).latent(flat.trunk(x)) for x, _ in batches])
        gate = flat.router(()).gate
        mean_score = gate(latent_ND.mean(0))
    assert sum(alike) / len(alike) > 0.7
    if centred:  # a common direction of all latents favours no leaf
        torch.testing.assert_close(mean_score, torch.zeros_like(mean_score), atol=1e-5, rtol=0)


def test_evaluation_follows_a_flat_nets_own_choice(net, batches):
    flat = FlatNet(net).eval()
    with torch.no_grad():
        flat.router(()).gate.bias.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0]))
    assert evaluate(flat, batches)["usage"] == [0.0, 1.0, 0.0, 0.0]


def test_sizes_are_found_where_widths_cannot_be_computed_without_values(monkeypatch):
    task, row, unique = find_task("cifar100-small"), Efficient(), torch.unique
    expected = row._size(task, 0.5)

    def older(x, *args, **kwargs):
        if x.is_meta:
            raise NotImplementedError("no kernel")
        return unique(x, *args, **kwargs)

    monkeypatch.setattr(torch, "unique", older)
    assert row._size(task, 0.5) == expected
