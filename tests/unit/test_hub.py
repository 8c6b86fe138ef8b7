"""Networks on the Hub: through the real client, to and from a Hub on this machine."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import sigmabranch as sb
from hub_server import LocalHub
from sigmabranch import cli
from sigmabranch.archive import MANIFEST, WEIGHTS
from sigmabranch.errors import CheckpointError, ConfigError, MissingDependency
from sigmabranch.measure import evaluate_dense
from sigmabranch.saving import load_net
from sigmabranch.seals import json_bytes, sealed

constants = pytest.importorskip("huggingface_hub.constants")

TREE = sb.TreeSpec(leaves=((0,), (1, 0), (1, 1)), projection_dim=8)
NAME, SECRET, NOTHING = "me/tree", "hf_secretsecret", "\N{EN DASH}"
FILES = {MANIFEST, "record.json", WEIGHTS}


@pytest.fixture(scope="module")
def net(dense, batches) -> sb.SigmaBranchNet:
    return sb.convert(dense, batches, TREE, spec=sb.ConversionSpec(restarts=2))


@pytest.fixture
def local(monkeypatch, tmp_path):
    """An empty Hub on this machine, and a client that knows no other and has an empty cache."""
    with LocalHub().running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        pattern = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


def refused(call, *arguments, **options) -> str:
    """The message of the one-line error that a call ends with."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    return message


def downloaded(server: LocalHub) -> set[str]:
    return {path.rpartition("/")[2] for _, path in server.asked if "/resolve/" in path}


# -- there and back ------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_pushed_comes_back_bit_for_bit(local, net, batches):
    address = sb.push_to_hub(net, NAME)
    assert address.startswith(f"{local.address}/{NAME}/")
    assert local.commits == 1
    assert set(local.repositories[NAME].branches["main"]) == FILES | {"README.md"}
    again = sb.from_hub(NAME)
    assert same(net, again)
    assert (again.tree, again.record, again.source) == (net.tree, net.record, net.source)
    ours, theirs = net.hard(batches[0][0]), again.hard(batches[0][0])
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_folder_goes_up_as_it_is_with_its_notes(local, net, tmp_path):
    net.save(tmp_path / "net", {"seed": 7})
    (tmp_path / "net" / "checkpoint.pt").write_bytes(b"not a part of the network")
    before = {path.name: path.read_bytes() for path in (tmp_path / "net").iterdir()}
    sb.push_to_hub(tmp_path / "net", NAME)
    stored = local.repositories[NAME].branches["main"]
    assert {name: stored[name] for name in FILES} == {name: before[name] for name in FILES}
    assert "checkpoint.pt" not in stored
    assert json.loads(stored[MANIFEST])["notes"] == {"seed": 7}
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "net").iterdir()}


def test_a_branch_holds_a_network_of_its_own(local, net, dense, batches):
    other = sb.convert(dense, batches, replace(TREE, leaves=((0,), (1,))))
    sb.push_to_hub(net, NAME)
    sb.push_to_hub(other, NAME, revision="small")
    sb.push_to_hub(other, NAME, revision="small", commit_message="again")
    assert len(sb.from_hub(NAME).tree.leaves) == 3
    assert same(sb.from_hub(NAME, "small"), other)


def test_a_network_of_ones_own_comes_back_through_a_skeleton(local, net, dense):
    own = copy.deepcopy(net)
    own.source = None
    sb.push_to_hub(own, NAME)
    card = local.repositories[NAME].branches["main"]["README.md"].decode()
    assert f'sb.from_hub("{NAME}", skeleton=dense)' in card
    assert "pipeline_tag" not in card
    assert "pass one of the same shape as skeleton" in refused(sb.from_hub, NAME)
    assert same(sb.from_hub(NAME, skeleton=dense), own)


def test_a_network_in_the_cache_needs_no_hub(local, net, monkeypatch):
    sb.push_to_hub(net, NAME)
    sb.from_hub(NAME)
    asked = len(local.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(sb.from_hub(NAME), net)
    assert len(local.asked) == asked
    assert "out of reach" in refused(sb.from_hub, "me/other")
    assert len(local.asked) == asked


@torch.no_grad()
@pytest.mark.parametrize("kind", ["path", "dense"])
def test_a_network_without_branches_goes_there_and_back(local, dense, batches, kind):
    net = sb.single_path(dense, batches, TREE) if kind == "path" else dense
    sb.push_to_hub(net, NAME, evaluation=sb.evaluate(net, batches), dataset="digits")
    again = sb.from_hub(NAME)
    assert type(again) is type(net) and same(net, again)
    card = local.repositories[NAME].branches["main"]["README.md"].decode()
    assert f'sb.from_hub("{NAME}")' in card and "top-1 %" in card and "pipeline_tag" in card
    assert not any(word in card for word in ("## Tree", "explain", "routing gain", "one path an"))
    assert f"{sum(p.numel() for p in net.parameters()):,}" in card


def test_figures_of_a_tree_are_refused_for_a_path(net, dense, batches):
    path = sb.single_path(dense, batches, TREE)
    with pytest.raises(ConfigError, match="the evaluation is of a network with leaves"):
        sb.model_card(path, evaluation=sb.evaluate(net, batches))


# -- what is not trusted -------------------------------------------------------------------------


def test_code_and_pickles_beside_a_network_are_never_downloaded(local, net, tmp_path):
    sb.push_to_hub(net, NAME)
    strangers = ("evil.pkl", "pytorch_model.bin", "modeling.py", "sub/weights.safetensors")
    for name in strangers:
        local.repositories[NAME].branches["main"][name] = b"x"
    sb.from_hub(NAME)
    assert downloaded(local) == FILES
    kept = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert kept == FILES


def test_a_manifest_that_names_a_pickle_does_not_get_it(local, net):
    sb.push_to_hub(net, NAME)
    stored = local.repositories[NAME].branches["main"]
    manifest = json.loads(stored[MANIFEST])
    manifest["files"]["evil.pkl"] = {"bytes": 1, "sha256": "0" * 64}
    stored |= {MANIFEST: json_bytes(sealed(manifest)), "evil.pkl": b"x"}
    assert "evil.pkl is missing" in refused(sb.from_hub, NAME)
    assert "evil.pkl" not in downloaded(local)


@pytest.mark.parametrize("name", [WEIGHTS, "record.json"])
def test_a_damaged_download_is_refused(local, net, name):
    sb.push_to_hub(net, NAME)
    stored = local.repositories[NAME].branches["main"]
    content = bytearray(stored[name])
    content[-2] ^= 1
    stored[name] = bytes(content)
    message = refused(sb.from_hub, NAME)
    assert message.startswith(f"{NAME} on the Hub: ")
    assert f"{name} is damaged: its SHA-256 differs" in message


def test_a_repository_without_a_network_is_refused(local, net):
    sb.push_to_hub(net, NAME)
    del local.repositories[NAME].branches["main"][MANIFEST]
    assert "manifest.json is missing" in refused(sb.from_hub, NAME)


# -- refusals ------------------------------------------------------------------------------------


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(local, net):
    sb.push_to_hub(net, NAME)
    assert "no such repository, or not for you" in refused(sb.from_hub, "me/nothing")
    assert "no revision 'v7'" in refused(sb.from_hub, NAME, "v7")
    assert "Repo id must be" in refused(sb.from_hub, "a/b/c")
    assert "Repo id must be" in refused(sb.push_to_hub, net, "a/b/c")
    for status in (401, 403):
        local.refuse = status
        assert "log in with 'hf auth login'" in refused(sb.from_hub, "me/nothing")
        assert "log in with 'hf auth login'" in refused(sb.push_to_hub, net, "me/new")
    assert set(local.repositories) == {NAME}


def test_no_way_to_the_hub_is_one_line(net, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert "out of reach" in refused(sb.from_hub, NAME)
    assert "check the name and the connection" in refused(sb.push_to_hub, net, NAME)


def test_what_shall_be_private_does_not_join_what_is_public(local, net):
    sb.push_to_hub(net, NAME)
    assert "exists and is public" in refused(sb.push_to_hub, net, NAME, private=True)
    assert local.commits == 1
    sb.push_to_hub(net, "me/hidden", private=True)
    sb.push_to_hub(net, "me/hidden", private=True)
    assert local.repositories["me/hidden"].private


def test_a_folder_that_is_no_whole_network_is_refused_before_the_hub_is_asked(local, net, tmp_path):
    net.save(tmp_path / "net")
    (tmp_path / "net" / WEIGHTS).write_bytes(b"")
    assert "is damaged" in refused(sb.push_to_hub, tmp_path / "net", NAME)
    assert "holds no saved network" in refused(sb.push_to_hub, tmp_path / "none", NAME)
    assert local.asked == []


def test_the_missing_package_is_named(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: sb.from_hub(NAME),
        lambda: sb.push_to_hub(net, NAME),
        lambda: sb.model_card(net),
    ):
        with pytest.raises(MissingDependency, match=r"sigma-branch\[hub\]"):
            call()


# -- the card ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures(net, dense, batches) -> dict:
    pytest.importorskip("fvcore")
    return {
        "evaluation": sb.evaluate(net, batches),
        "dense_evaluation": evaluate_dense(dense, batches),
        "cost": sb.count(net, batches[0][0], dense=dense),
    }


def test_every_figure_of_the_card_is_one_that_was_handed_in_or_counted(net, figures):
    card = sb.model_card(net, **figures, dataset="five-images", license="mit", repo_id=NAME)
    cost, branched = figures["cost"], figures["evaluation"]
    dense = figures["dense_evaluation"]
    both = [cost["dense"]["params"], cost["net"]["active_params"], cost["net"]["total_params"]]
    rows = {line.split("|")[1].strip(): line for line in card.splitlines() if "|" in line[:1]}
    assert cells(rows["parameters"]) == [f"{value:,}" for value in both]
    assert cells(rows["MB as fp32"]) == [f"{4 * value / 1e6:.3f}" for value in both]
    macs = [f"{cost[part]['macs']:,}" for part in ("dense", "net")]
    assert cells(rows["multiply-adds"]) == [*macs, NOTHING]
    assert cells(rows["top-1 %"]) == [f"{dense['top1']:.2f}", f"{branched['top1']:.2f}", NOTHING]
    assert "on 96 samples of five-images" in card
    assert f"routes shuffled: {branched['routing_gain']:+.2f} points" in card
    for leaf, share in zip(branched["leaves"], branched["usage"], strict=True):
        (line,) = (line for line in card.splitlines() if f"leaf {leaf}: " in line)
        assert line.endswith(f"{share:.1%} of the inputs")
    assert f"with {net.record['samples']} calibration samples" in card


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_the_header_is_what_the_hub_reads(net, figures):
    from huggingface_hub import ModelCard

    card = ModelCard(sb.model_card(net, **figures, dataset="five", license="mit", repo_id=NAME))
    data = card.data
    assert (data.library_name, data.license) == ("sigmabranch", "mit")
    assert data.pipeline_tag == "image-classification"
    assert data.metrics == ["accuracy"]
    (result,) = data.eval_results
    assert result.dataset_name == "five"
    assert result.metric_value == pytest.approx(figures["evaluation"]["top1"] / 100, abs=1e-6)


def test_what_was_not_measured_is_said_and_has_no_row(net, figures):
    from huggingface_hub import ModelCard

    bare = sb.model_card(net)
    head, missing = bare.split("## What was not")
    assert "- accuracy\n" in missing and "- multiply-adds\n" in missing
    assert "| parameters |" in head and "top-1" not in head and "multiply-adds" not in head
    assert "dense |" not in head and "of the inputs" not in head
    data = ModelCard(bare).data
    assert data.license is None and data.eval_results is None and data.metrics is None
    partly = sb.model_card(net, evaluation=figures["evaluation"])
    assert "| top-1 % |" in partly
    assert "accuracy of the dense network" in partly.split("## What was not")[1]
    assert ModelCard(partly).data.eval_results is None  # of which data, nobody said


def test_figures_of_another_network_are_refused(net, dense, batches, figures):
    other = sb.convert(dense, batches, replace(TREE, leaves=((0,), (1,))))
    with pytest.raises(ConfigError, match="the evaluation is of a network with leaves"):
        sb.model_card(other, evaluation=figures["evaluation"])
    with pytest.raises(ConfigError, match="the cost is of a network with"):
        sb.model_card(other, cost=figures["cost"])
    with pytest.raises(ConfigError, match="leaves None"):
        sb.model_card(net, evaluation=figures["dense_evaluation"])


def test_a_card_needs_no_network(net, monkeypatch):
    import socket

    def no_network(*_, **__):
        raise AssertionError("the card asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert sb.model_card(net).startswith("---\n")


# -- the command line ----------------------------------------------------------------------------


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sigmabranch", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@pytest.fixture
def run_folder(net, task, figures, tmp_path):
    """What ``sigmabranch run`` leaves, as far as push reads it."""
    origin = {"task": task.to_dict(), "seed": 3}
    net.save(tmp_path / "branched", origin)
    measured = {
        "cost": figures["cost"],
        "dense": figures["dense_evaluation"],
        "branched": figures["evaluation"],
    }
    (tmp_path / "task.json").write_text(json.dumps(origin))
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    return tmp_path


def test_the_command_pushes_a_run_with_its_figures(
    local, run_folder, net, figures, monkeypatch, capsys
):
    code, out, err = run(
        monkeypatch, capsys, "push", run_folder / "branched", NAME, "--private", "--json"
    )
    assert code == 0, err
    said = json.loads(out)
    assert said["repo_id"] == NAME
    assert said["url"].startswith(local.address)
    assert said["top1"] == figures["evaluation"]["top1"]
    assert local.repositories[NAME].private
    card = local.repositories[NAME].branches["main"]["README.md"].decode()
    assert "96 samples of digits" in card
    assert "| multiply-adds |" in card
    assert same(sb.from_hub(NAME), net)


def test_figures_of_another_run_stay_behind(local, run_folder, monkeypatch, capsys):
    origin = json.loads((run_folder / "task.json").read_text())
    (run_folder / "task.json").write_text(json.dumps({**origin, "seed": 4}))
    code, out, _ = run(monkeypatch, capsys, "push", run_folder / "branched", NAME)
    assert code == 0
    assert "without figures" in out
    assert "top-1" not in local.repositories[NAME].branches["main"]["README.md"].decode()


def test_a_network_without_a_task_is_pushed_without_figures(
    local, net, tmp_path, monkeypatch, capsys
):
    net.save(tmp_path / "net")
    code, out, _ = run(monkeypatch, capsys, "push", tmp_path / "net", NAME)
    assert code == 0
    assert "without figures" in out
    assert load_net(tmp_path / "net").tree == sb.from_hub(NAME).tree


def test_bad_input_of_the_command_is_one_line_and_exit_code_2(
    local, run_folder, monkeypatch, capsys
):
    def fails(*arguments) -> str:
        code, out, err = run(monkeypatch, capsys, "push", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    assert "holds no saved network" in fails(run_folder / "nothing", NAME)
    assert "Repo id must be" in fails(run_folder / "branched", "a/b/c")
    assert "Missing argument" in fails(run_folder / "branched")
    local.refuse = 401
    assert "log in with 'hf auth login'" in fails(run_folder / "branched", NAME)
    (run_folder / "measured.json").write_text("{")
    assert "is damaged" in fails(run_folder / "branched", NAME)
