"""Networks on disk: exact round trips, and one line for whatever is wrong with a file."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle

import pytest
import torch
from torch import nn

import sigmabranch as sb
from sigmabranch import files
from sigmabranch.archive import MANIFEST, WEIGHTS, sealed
from sigmabranch.backbones import GlobalAveragePool
from sigmabranch.errors import CheckpointError
from sigmabranch.saving import load_dense, load_net, save_dense

TREE = sb.TreeSpec(leaves=((0,), (1, 0), (1, 1)), projection_dim=16)


@pytest.fixture(scope="module")
def net(dense, batches):
    return sb.convert(dense, batches, TREE)


@pytest.fixture
def folder(net, tmp_path):
    net.save(tmp_path / "net", {"task": "none"})
    return tmp_path / "net"


def edit(folder, **changes):
    """Rewrite the manifest, with the files' present sizes and digests and a hash that fits."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest | changes)))


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(
        torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine
    )


def refused(load, *arguments, **options) -> str:
    """The message of the one-line :class:`CheckpointError` that loading ends with."""
    with pytest.raises(CheckpointError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- round trips ---------------------------------------------------------------------------------


def test_a_branched_network_comes_back_exactly(net, folder, batches):
    again = sb.load(folder)
    assert same(net, again)
    assert not again.training
    assert (again.tree, again.record, again.source) == (net.tree, net.record, net.source)
    x = batches[0][0]
    with torch.no_grad():
        assert torch.equal(again.soft(x).logits, net.soft(x).logits)
        assert torch.equal(again.hard(x).leaf, net.hard(x).leaf)
    assert {k: p.to_dict() for k, p in again.plans.items()} == {
        k: p.to_dict() for k, p in net.plans.items()
    }


def test_a_loaded_network_can_be_trained_and_saved_again(folder, tmp_path, batches):
    again = sb.load(folder)
    again.train().soft(batches[0][0]).logits.sum().backward()
    assert all(p.grad is not None for p in again.specializers.parameters())
    again.save(tmp_path / "second")
    assert same(again, sb.load(tmp_path / "second"))


def test_saving_twice_writes_the_same_bytes(net, folder, tmp_path):
    net.save(tmp_path / "twin", {"task": "none"})
    for name in os.listdir(folder):
        assert (folder / name).read_bytes() == (tmp_path / "twin" / name).read_bytes()


def test_a_network_of_other_dtypes_keeps_them(net, tmp_path):
    half = copy.deepcopy(net).half()
    half.save(tmp_path)
    assert same(half, sb.load(tmp_path))


def test_a_dense_network_comes_back_exactly(dense, tmp_path, batches):
    save_dense(dense, tmp_path, {"seed": 1})
    again = load_dense(tmp_path)
    assert same(dense, again)
    with torch.no_grad():
        assert torch.equal(again(batches[0][0]), dense(batches[0][0]))
    assert json.loads((tmp_path / MANIFEST).read_text())["notes"] == {"seed": 1}


def test_nothing_is_left_behind_but_the_files_of_the_manifest(folder):
    assert sorted(os.listdir(folder)) == [MANIFEST, "record.json", WEIGHTS]


class Own(nn.Module):
    """A network that no adapter knows, with tied weights in its trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.two.weight = self.one.weight
        self.stem = nn.Sequential(self.one, self.two)
        self.first = nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.classify = nn.Linear(12, 5)

    def forward(self, x):
        return self.classify(self.last(self.first(self.stem(x))).mean((2, 3)))


def own_backbone() -> sb.Backbone:
    torch.manual_seed(0)
    return sb.Backbone(
        model=Own().eval(),
        chain=("stem", "first", "last"),
        stages=("first", "last"),
        pool=GlobalAveragePool(),
        head=("classify",),
    )


def test_a_network_of_ones_own_comes_back_through_a_skeleton(tmp_path, batches):
    backbone = own_backbone()
    net = sb.convert(backbone, batches, sb.TreeSpec.balanced(1, projection_dim=8))
    net.save(tmp_path)
    assert "pass one of the same shape as skeleton" in refused(sb.load, tmp_path)
    skeleton = own_backbone()
    again = sb.load(tmp_path, skeleton=skeleton)
    with torch.no_grad():
        x = batches[0][0]
        assert torch.equal(again.soft(x).logits, net.soft(x).logits)
    assert not any(p.is_meta for p in skeleton.model.parameters())


def test_the_skeleton_is_left_as_it_was(dense, folder):
    skeleton = copy.deepcopy(dense)
    sb.load(folder, skeleton=skeleton)
    assert same(skeleton, dense)


def test_a_skeleton_of_another_shape_is_refused(folder):
    other = sb.ResNet(sb.ResNetSpec(layers=(1, 1, 1, 1), planes=(2, 2, 2, 2), classes=5))
    assert "does not describe this network" in refused(sb.load, folder, skeleton=other)
    deeper = sb.ResNet(sb.ResNetSpec(stem="cifar", in_channels=1, classes=5))
    assert "does not fit its manifest" in refused(sb.load, folder, skeleton=deeper)


# -- damage --------------------------------------------------------------------------------------


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [WEIGHTS, "record.json"])
@pytest.mark.parametrize("place", [0, -2])
def test_a_flipped_bit_is_found(folder, name, place):
    flip(folder / name, place)
    assert f"{name} is damaged: its SHA-256 differs" in refused(sb.load, folder)


@pytest.mark.parametrize("left", [0, 100])
def test_truncated_weights_are_found(folder, left):
    os.truncate(folder / WEIGHTS, left)
    assert f"{WEIGHTS} is damaged: {left} bytes instead of" in refused(sb.load, folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (MANIFEST, "holds no saved network"),
        (WEIGHTS, "is missing: copy the whole folder"),
        ("record.json", "is missing: copy the whole folder"),
    ],
)
def test_a_missing_file_is_named(folder, name, reason):
    (folder / name).unlink()
    message = refused(sb.load, folder)
    assert reason in message
    assert name in message


def test_a_missing_folder_is_named(tmp_path):
    assert "nowhere holds no saved network" in refused(sb.load, tmp_path / "nowhere")


def test_a_file_outside_the_folder_is_not_touched(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    secret = folder.parent / "secret"
    secret.write_text("x")
    listed = {**manifest["files"], "../secret": {"bytes": 1, "sha256": "0" * 64}}
    (folder / MANIFEST).write_text(json.dumps(sealed({**manifest, "files": listed})))
    assert "outside its own folder" in refused(sb.load, folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "has schema 2, this version reads 1"),
        ({"schema": None}, "has schema None"),
        ({"format": "other"}, "was not written by sigmabranch"),
        ({"kind": "dense"}, "does not fit its manifest"),
        ({"kind": None}, "holds a network of kind 'None'"),
        ({"files": {}}, "lists no weights"),
        ({"files": None}, "lists no weights"),
        ({"tree": {"leaves": [[0]]}}, "does not describe this network"),
        ({"tree": {"leaves": [[]]}}, "a node '0' that its tree does not have"),
        ({"tree": None}, "does not describe this network"),
        ({"plans": {}}, "does not describe this network"),
        ({"plans": {"7": {}}}, "'7'"),
        ({"router_channels": {}}, "does not describe this network"),
        ({"source": {"builder": "pickle"}}, "unknown network builder 'pickle'"),
        ({"source": {"builder": "resnet", "config": {"depth": 5}}}, "'depth'"),
        ({"source": "resnet"}, "does not describe this network"),
        ({"source": ["resnet"]}, "does not describe this network"),
        ({"source": {"builder": "resnet", "config": 5}}, "does not describe this network"),
        ({"notes": "none"}, "notes must be dict, got 'none'"),
        ({"router_channels": {"root": -3, "1": 4}}, "does not describe this network"),
        ({"router_channels": {"root": "many", "1": 4}}, "does not describe this network"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(folder, changes, reason):
    edit(folder, **changes)
    assert reason in refused(sb.load, folder)


@pytest.mark.parametrize("said", [7, None, [], {}, {"bytes": 4}, {"bytes": "4", "sha256": "0"}])
def test_a_file_of_which_the_manifest_says_too_little_is_refused(folder, said):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["record.json"] = said
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    assert "does not say the bytes and sha256 of 'record.json'" in refused(sb.load, folder)


def test_a_flipped_bit_of_the_manifest_is_found(folder):
    text = (folder / MANIFEST).read_text()
    assert '"strides": [' in text
    before, after = text.split('"strides": [', 1)
    (folder / MANIFEST).write_text(f'{before}"strides": [{after.replace("2", "3", 1)}')
    assert f"{MANIFEST} is damaged: its SHA-256 differs" in refused(sb.load, folder)


def test_a_network_saved_before_manifests_had_a_hash_loads(net, folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    earlier = {n: part for n, part in manifest.items() if n not in ("written_by", "sha256")}
    (folder / MANIFEST).write_text(json.dumps(earlier))
    assert same(net, sb.load(folder))


@pytest.mark.parametrize("gone", ["written_by", "sha256"])
def test_a_hash_cannot_get_lost(folder, gone):
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest[gone]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert f"{MANIFEST} is damaged: its SHA-256 differs" in refused(sb.load, folder)


@pytest.mark.parametrize("name", [MANIFEST, "record.json"])
def test_json_that_nobody_writes_is_refused(folder, name):
    (folder / name).write_text('{"format":' * 50_000)
    edit(folder) if name != MANIFEST else None
    assert f"{name} is damaged: not valid JSON" in refused(sb.load, folder)


def test_a_manifest_with_a_number_that_is_none_is_refused(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"notes": float("nan")}))
    assert "is damaged: it holds NaN" in refused(sb.load, folder)


def test_a_network_never_replaces_something_else(net, dense, folder, tmp_path):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    assert "would be lost: choose another folder" in refused(save_dense, dense, folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    (tmp_path / MANIFEST).write_text('{"name": "a web page"}')
    assert "would be lost" in refused(net.save, tmp_path)
    net.save(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_manifest_that_is_no_manifest_is_refused(folder, text):
    (folder / MANIFEST).write_text(text)
    assert MANIFEST in refused(sb.load, folder)


def test_weights_of_another_tree_are_refused(dense, batches, folder, tmp_path):
    other = sb.convert(dense, batches, sb.TreeSpec.balanced(1, projection_dim=16))
    other.save(tmp_path / "other")
    (folder / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    edit(folder)
    assert "does not fit its manifest" in refused(sb.load, folder)


def test_a_branched_network_is_no_dense_one(folder):
    assert "holds a branched network, need a dense one" in refused(load_dense, folder)


def test_a_dense_network_is_no_branched_one(dense, tmp_path):
    save_dense(dense, tmp_path)
    assert "holds a dense network, need a branched one" in refused(load_net, tmp_path)


class Evil:
    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_under_the_name_of_the_weights_is_not_run(folder, tmp_path, write):
    mark = tmp_path / "executed"
    with open(folder / WEIGHTS, "wb") as file:
        write(Evil(mark), file)
    edit(folder)
    assert "does not fit its manifest" in refused(sb.load, folder)
    assert not mark.exists()


# -- disks ---------------------------------------------------------------------------------------


@pytest.fixture(params=[MANIFEST, "record.json", WEIGHTS])
def full_disk(request, monkeypatch):
    """The disk is full as soon as one of the files is flushed to it."""
    whole = files.Path.write_bytes

    def write(path, content):
        if request.param in path.name:
            whole(path, content[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(path, content)

    monkeypatch.setattr(files.Path, "write_bytes", write)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_no_part_of_a_network(net, tmp_path):
    message = refused(net.save, tmp_path / "net")
    assert "No space left on device; free space or choose another folder" in message
    assert os.listdir(tmp_path / "net") == []


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_what_was_there(net, tmp_path):
    (tmp_path / "other").write_text("old")
    refused(net.save, tmp_path)
    assert (tmp_path / "other").read_text() == "old"
    assert os.listdir(tmp_path) == ["other"]


def test_what_json_cannot_hold_is_refused_before_anything_is_written(net, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        net.save(tmp_path / "net", {"loss": float("nan")})
    assert not (tmp_path / "net").exists()


def test_a_folder_that_cannot_be_made_is_named(net, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(net.save, tmp_path / "file" / "net")
