"""Files: complete or absent, sealed, and never written over another's."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from sigmabranch import files
from sigmabranch.errors import CheckpointError
from sigmabranch.marks import check_free
from sigmabranch.seals import is_ours, json_bytes, sealed
from sigmabranch.temporaries import temporary_file, temporary_folder

CONTENT = {"name": "ä", "numbers": [1, 2.5, -0.0, 1e300], "inner": {"flag": True, "none": None}}


def write(path, text):
    with files.atomic_write(path) as temporary:
        temporary.write_text(text)


# -- seals ---------------------------------------------------------------------------------------


def test_sealed_json_comes_back_without_its_seal(tmp_path):
    files.write_json(tmp_path / "a.json", CONTENT)
    assert files.read_json(tmp_path / "a.json") == CONTENT
    assert is_ours(json.loads((tmp_path / "a.json").read_text()))


def test_no_single_character_can_be_altered_unnoticed(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, CONTENT)
    text = path.read_bytes()
    for place in range(len(text)):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        try:
            assert files.read_json(path) == CONTENT  # white space
        except CheckpointError as error:
            assert "is damaged" in str(error)


def test_json_of_earlier_versions_has_no_seal_and_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(CONTENT))
    assert files.read_json(tmp_path / "a.json") == CONTENT
    seal = hashlib.sha256(json_bytes(CONTENT)).hexdigest()  # before it said whose it is
    (tmp_path / "a.json").write_text(json.dumps({**CONTENT, "sha256": seal}))
    assert files.read_json(tmp_path / "a.json") == CONTENT


@pytest.mark.parametrize("text", ["[1, 2]", "3", '"x"', "null"])
def test_json_that_is_no_object_is_read_as_it_is(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert files.read_json(tmp_path / "a.json") == json.loads(text)


# -- whose a file is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "mine", "{", '{"mine": 1}', '{"sha256": "0"}', '{"written_by": "sigmabranch"}']
)
def test_a_file_of_another_is_never_written_over(tmp_path, text):
    for path in (tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "manifest.json"):
        path.write_text(text)
        for replace in (write, lambda path, _: files.write_json(path, CONTENT)):
            with pytest.raises(CheckpointError, match="would be lost: move it away or choose"):
                replace(path, "ours")
        assert path.read_text() == text
    assert len([*tmp_path.iterdir()]) == 3


def test_our_own_files_are_written_over(tmp_path):
    for text in ("one", "two"):
        write(tmp_path / "a.csv", text)
        files.write_json(tmp_path / "a.json", {"text": text})
    assert (tmp_path / "a.csv").read_text() == "two"
    assert files.read_json(tmp_path / "a.json") == {"text": "two"}


def test_an_altered_result_is_not_written_over(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, CONTENT)
    path.write_text(path.read_text().replace("2.5", "3.5"))
    with pytest.raises(CheckpointError, match="is damaged, or was not written by sigmabranch"):
        files.write_json(path, CONTENT)


def test_a_damaged_list_gives_nothing_away(tmp_path):
    write(tmp_path / "a.csv", "ours")
    (tmp_path / "b.csv").write_text("mine")
    marks = tmp_path / ".sigmabranch"
    marks.write_text(marks.read_text().replace("a.csv", "b.csv"))
    for name in ("a.csv", "b.csv"):
        with pytest.raises(CheckpointError, match="would be lost"):
            write(tmp_path / name, "new")


def test_folders_and_devices_are_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "pipe", "link"):
        with pytest.raises(CheckpointError, match="choose another"):
            write(tmp_path / name, "ours")
    assert (tmp_path / "link").is_symlink()


def test_results_of_earlier_versions_are_written_over(tmp_path):
    made = {"command": "x", "commit": None, "hardware": "y", "version": "0.1.0"}
    (tmp_path / "a.json").write_text(json.dumps({"provenance": made}))
    files.write_json(tmp_path / "a.json", CONTENT)
    assert files.read_json(tmp_path / "a.json") == CONTENT


def test_folders_of_earlier_versions_are_ours(tmp_path):
    (tmp_path / "report" / "figures").mkdir(parents=True)
    for name in ("report/report.html", "report/figures/tree.png", "measured.json"):
        (tmp_path / name).write_text("old")
        with pytest.raises(CheckpointError):
            check_free(tmp_path / name)
    (tmp_path / "task.json").write_text('{"task": {}, "seed": 0}')
    for name in ("report/report.html", "report/figures/tree.png", "measured.json"):
        check_free(tmp_path / name)


# -- several files as one ------------------------------------------------------------------------


def together(folder, text):
    manifest = {
        "format": "sigmabranch-test",
        "schema": 1,
        "files": {name: {"sha256": digest(text + name)} for name in ("a", "b")},
    }
    contents = {name: (text + name).encode() for name in ("a", "b")}
    files.write_together(folder, {**contents, "manifest.json": json_bytes(sealed(manifest))})


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def read(folder):
    """What a reader finds: the text of both files, or None where there is no manifest."""
    if not (folder / "manifest.json").exists():
        return None
    for name, said in files.read_json(folder / "manifest.json")["files"].items():
        files.settle(folder / name, said["sha256"])
        assert files.sha256(folder / name) == said["sha256"]
    return (folder / "a").read_text()[:-1]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_manifest_and_its_files_are_replaced_as_one(tmp_path, monkeypatch, old):
    """Whichever move is the last before the power goes."""
    replace, seen = os.replace, set()
    for last in range(7):
        folder, moves = tmp_path / str(last), []
        if old:
            together(folder, old)

        def counted(*paths, moves=moves, last=last):
            if len(moves) == last:
                raise SystemExit
            moves.append(paths)
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            with suppress(SystemExit):
                together(folder, "new")
        seen.add(read(folder))
        assert read(folder) in (old, "new")
        together(folder, "newer")
        assert read(folder) == "newer"
        assert {path.name for path in folder.iterdir()} == {"a", "b", "manifest.json"}
    assert seen == {old, "new"}


# -- temporaries ---------------------------------------------------------------------------------

KILLED = """
import sys, time
from pathlib import Path
from sigmabranch.temporaries import temporary_file, temporary_folder
with temporary_file(Path(sys.argv[1]), "a"), temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "part").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_not_before(tmp_path):
    (tmp_path / ".mine.tmp").write_text("mine")
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    write(tmp_path / "a", "ours")
    assert len([*tmp_path.glob(".*.sigmabranch.tmp")]) == 2  # it lives
    process.send_signal(signal.SIGKILL)
    process.wait()
    write(tmp_path / "a", "ours")
    assert {path.name for path in tmp_path.iterdir()} == {".mine.tmp", ".sigmabranch", "a"}


def test_temporaries_of_one_process_leave_each_other_alone(tmp_path):
    with temporary_file(tmp_path, "a") as one, temporary_folder(tmp_path) as two:
        with temporary_file(tmp_path, "a") as three:
            assert one.exists() and two.is_dir() and three.exists()
        assert one.exists() and not three.exists()
    assert not [*tmp_path.iterdir()]
