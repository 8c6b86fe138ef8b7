"""A search's journal and its lock: sealed, readable by Optuna, and never waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sigmabranch.errors import CheckpointError
from sigmabranch.seals import is_ours
from sigmabranch.search.hold import hold
from sigmabranch.search.journal import Journal
from sigmabranch.search.space import Space

pytest.importorskip("optuna")
KNOBS = Space().knobs([("a",), ("b",)])


def study(folder):
    from sigmabranch.search.study import Study

    return Study(folder / "study.log", KNOBS, 0)


@pytest.fixture
def journal(tmp_path):
    """Of three trials, one of them impossible."""
    made = study(tmp_path)
    for number in range(3):
        assert made.next(5)[0] == number
        found = {"top1": 1.0, "active_params": 2, "macs": 3}
        made.tell(number, None if number == 1 else found)
    return tmp_path / "study.log"


def test_what_was_told_comes_back(journal):
    assert study(journal.parent).finished() == {0: True, 1: False, 2: True}


def test_optunas_own_tools_read_the_journal(journal):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    assert len(optuna.load_study(study_name="search", storage=storage).trials) == 3


def test_a_journal_of_an_earlier_version_is_read_and_sealed(journal):
    entries = [*Journal(journal).read_logs(0)]
    journal.write_text("".join(json.dumps(e, separators=(",", ":")) + "\n" for e in entries))
    assert study(journal.parent).finished() == {0: True, 1: False, 2: True}
    assert all(is_ours(json.loads(line)) for line in journal.read_text().splitlines())
    assert [*Journal(journal).read_logs(0)][: len(entries)] == entries


def test_every_byte_of_a_journal_counts(journal):
    whole = journal.read_bytes()
    entries = [*Journal(journal).read_logs(0)]
    for place in range(0, len(whole), 7):
        journal.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = [*Journal(journal).read_logs(0)]
        except CheckpointError as error:
            assert "restore it or choose another --out" in str(error)
        else:  # the end of the last line, which is as if it had been cut short
            assert found == entries[: len(found)] and len(found) >= len(entries) - 1


def test_a_question_is_in_the_journal_with_all_its_parts_or_not_at_all(tmp_path, journal):
    """Wherever a crash cuts the file, the same is asked again."""
    asked = study(tmp_path).next(5)
    whole = journal.read_bytes()
    places = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for place in (*places[-4:], places[-2] + 9, len(whole) - 1):
        journal.write_bytes(whole[: place + 1])
        again = study(tmp_path)
        assert again.finished() == {0: True, 1: False, 2: True}
        assert again.next(5) == asked


@pytest.mark.parametrize("change", ["swapped", "dropped", "repeated", "unsealed"])
def test_lines_cannot_be_moved(journal, change):
    lines = journal.read_bytes().splitlines(keepends=True)
    if change == "swapped":
        lines[1], lines[2] = lines[2], lines[1]
    elif change == "dropped":
        del lines[1]
    elif change == "repeated":
        lines.insert(1, lines[1])
    else:
        entry = json.loads(lines[1])
        del entry["written_by"], entry["sha256"], entry["after"]
        lines[1] = json.dumps(entry).encode() + b"\n"
    journal.write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match=r"is damaged: line \d"):
        Journal(journal)


@pytest.mark.parametrize("text", ["mine", "mine\n", '{"mine": 1}\n', '{"written_by":"me"', "[1]\n"])
def test_a_file_of_another_stays(tmp_path, text):
    (tmp_path / "study.log").write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        study(tmp_path)
    assert (tmp_path / "study.log").read_text() == text


# -- the lock ------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from sigmabranch.seals import is_ours
from sigmabranch.search.hold import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_at_once_and_says_by_whom_and_since_when(tmp_path, holder):
    words = rf"searched by process {holder.pid} on \S+ since \d{{4}}-.* UTC: wait until that"
    with pytest.raises(CheckpointError, match=words), hold(tmp_path):
        pass


def test_a_killed_search_leaves_no_lock(tmp_path, holder, monkeypatch):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "search.lock").exists()
    monkeypatch.chdir(tmp_path)  # relative folders are no different
    with hold(tmp_path.relative_to(tmp_path)):
        pass
    assert not (tmp_path / "search.lock").exists()


def test_the_lock_of_an_earlier_version_is_not_waited_for(journal):
    os.symlink("study.log", f"{journal}.lock")  # as a killed process left it
    began = time.monotonic()
    assert study(journal.parent).next(5)[0] == 3
    assert time.monotonic() - began < 5


def test_a_lock_file_of_another_stays(tmp_path):
    (tmp_path / "search.lock").write_text("mine")
    with pytest.raises(CheckpointError, match="would be lost"), hold(tmp_path):
        pass
    assert (tmp_path / "search.lock").read_text() == "mine"
