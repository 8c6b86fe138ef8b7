"""Checkpoints: complete or absent, and only for the run they came from."""

from __future__ import annotations

import json
import resource

import pytest
import torch

from sigmabranch import files
from sigmabranch.errors import CheckpointError
from sigmabranch.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

IDENTITY = {"recipe": {"epochs": 3, "betas": (0.9, 0.999)}, "task": "digits", "tree": {"leaves": 4}}


def state(step=7, size=3, **fields):
    values = {
        "step": step,
        "seconds": 1.5,
        "history": [{"epoch": 1, "loss": 0.1 + 0.2}],
        "identity": IDENTITY,
        "tensors": {"model": {"w": torch.arange(float(size))}, "lr": [0.1, None], "names": ["a"]},
    }
    return Checkpoint(**{**values, **fields})


def test_round_trip_keeps_every_bit(tmp_path):
    save_checkpoint(tmp_path, state())
    loaded = load_checkpoint(tmp_path, IDENTITY)
    assert loaded.step == 7
    assert loaded.history == [{"epoch": 1, "loss": 0.1 + 0.2}]
    assert torch.equal(loaded.tensors["model"]["w"], torch.arange(3.0))
    assert loaded.tensors["lr"] == [0.1, None]


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "nothing", IDENTITY) is None


def test_only_the_newest_is_kept(tmp_path):
    for step in (7, 14, 21):
        save_checkpoint(tmp_path, state(step))
    state_json, payload = sorted(path.name for path in tmp_path.iterdir())
    assert state_json == "state.json" and payload.startswith("step-000000021-")
    assert load_checkpoint(tmp_path).step == 21


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task": "cifar"}, "task is digits, this run's cifar"),
        ({"recipe": {"epochs": 4, "betas": (0.9, 0.999)}}, "recipe.epochs is 3, this run's 4"),
        ({"tree": {"leaves": 8}}, "tree.leaves is 4"),
        ({"seed": 1}, "seed is None"),
    ],
)
def test_another_runs_checkpoint_is_refused_naming_the_difference(tmp_path, change, named):
    save_checkpoint(tmp_path, state())
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(tmp_path, {**IDENTITY, **change})


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_tensors_are_refused(tmp_path, damage):
    save_checkpoint(tmp_path, state())
    payload = next(tmp_path.glob("*.pt"))
    raw = bytearray(payload.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        payload.write_bytes(raw)
    elif damage == "truncate":
        payload.write_bytes(raw[:-20])
    else:
        payload.unlink()
    with pytest.raises(CheckpointError, match=r"damaged|cannot read"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


def test_manifest_cannot_point_outside_its_folder(tmp_path):
    inside = tmp_path / "inside"
    save_checkpoint(inside, state())
    payload = next(inside.glob("*.pt"))
    payload.rename(tmp_path / payload.name)
    manifest = files.read_json(inside / "state.json")
    manifest["tensors"]["file"] = f"../{payload.name}"
    files.write_json(inside / "state.json", manifest)
    with pytest.raises(CheckpointError, match="names no tensors beside it"):
        load_checkpoint(inside)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickled_code_is_not_run(tmp_path, capsys):
    save_checkpoint(tmp_path, state(tensors={"model": Evil()}))
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_full_disk_is_one_line_and_keeps_the_previous_checkpoint(tmp_path):
    save_checkpoint(tmp_path, state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write") as caught:
            save_checkpoint(tmp_path, state(2, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert load_checkpoint(tmp_path).step == 1
    state_json, payload = sorted(path.name for path in tmp_path.iterdir())
    assert state_json == "state.json" and payload.startswith("step-000000001-")


def earlier(folder):
    """A checkpoint as versions before hashes wrote it."""
    tensors = {"model": {"w": torch.arange(3.0)}}
    torch.save(tensors, folder / "step-000000005.pt")
    digest = files.sha256(folder / "step-000000005.pt")
    state = {"schema": 1, "step": 5, "seconds": 0.5, "history": [{"epoch": 1}],
             "identity": IDENTITY, "tensors": "step-000000005.pt", "sha256": digest}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))


def test_a_checkpoint_of_an_earlier_version_is_read_and_replaced(tmp_path):
    earlier(tmp_path)
    loaded = load_checkpoint(tmp_path, IDENTITY)
    assert (loaded.step, loaded.history) == (5, [{"epoch": 1}])
    save_checkpoint(tmp_path, state(6))
    assert load_checkpoint(tmp_path).step == 6
    assert not (tmp_path / "step-000000005.pt").exists()


def test_every_altered_value_of_the_state_is_found(tmp_path):
    save_checkpoint(tmp_path, state())
    path = tmp_path / "state.json"
    text = path.read_text()
    for before, after in (
        ('"step": 7', '"step": 8'),
        ('"seconds": 1.5', '"seconds": 1.6'),
        ('"epoch": 1', '"epoch": 2'),
        ('"task": "digits"', '"task": "digit5"'),
        ('"written_by"', '"written_bx"'),
        ('"sha256": "', '"sha257": "'),
        ('"schema": 2', '"schema": 1'),
    ):
        assert before in text
        path.write_text(text.replace(before, after))
        with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"step": 1.0}, {"step": True}, {"seconds": None}, {"history": {}},
     {"history": [3]}, {"identity": []}, {"tensors": "step"}, {"tensors": {"file": "../x"}}],
)  # fmt: skip
def test_a_state_that_cannot_be_is_refused_whatever_its_hash(tmp_path, change):
    save_checkpoint(tmp_path, state())
    path = tmp_path / "state.json"
    files.write_json(path, files.read_json(path) | change)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(tmp_path)


def test_the_same_step_saved_again_never_touches_the_tensors_that_are_there(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state())

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state(size=9))
    monkeypatch.undo()
    assert len(load_checkpoint(tmp_path).tensors["model"]["w"]) == 3
    assert len([*tmp_path.glob("*.pt")]) == 2
    save_checkpoint(tmp_path, state(8))
    assert len([*tmp_path.glob("*.pt")]) == 1


def test_tensors_and_states_of_others_stay(tmp_path):
    for name in ("step-1.pt", "step-000000001.pt", f"step-000000001-{'0' * 16}.pt"):
        (tmp_path / name).write_text("mine")
    save_checkpoint(tmp_path, state())
    assert len([path for path in tmp_path.glob("*.pt") if path.read_bytes() == b"mine"]) == 3
    (tmp_path / "state.json").write_text('{"state": "mine"}')
    with pytest.raises(CheckpointError, match="would be lost"):
        save_checkpoint(tmp_path, state(8))
    assert (tmp_path / "state.json").read_text() == '{"state": "mine"}'
