"""The script that fetches public data: from an archive on this machine, never from the network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "prepare_data.py"


def prepare(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def archive(modelnet, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("archive") / "modelnet40_ply_hdf5_2048"
    return Path(shutil.make_archive(str(base), "zip", modelnet))


def test_an_archive_is_unpacked_checked_and_put_into_place(archive, tmp_path):
    done = prepare("modelnet40", tmp_path / "in" / "data", "--url", archive.as_uri())
    assert done.returncode == 0, done.stderr
    assert "31 training and 12 test samples" in done.stdout
    inside = tmp_path / "in" / "data" / "modelnet40_ply_hdf5_2048"
    assert (inside / "ply_data_train0.h5").is_file()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["data"]


@pytest.mark.parametrize("fault", ["truncated", "foreign", "absent", "in the way"])
def test_nothing_is_kept_of_what_is_no_data_set(archive, tmp_path, fault):
    place, target = tmp_path / "archives", tmp_path / "in" / "data"
    place.mkdir()
    copy = place / archive.name
    if fault == "truncated":
        copy.write_bytes(archive.read_bytes()[:-500])
    elif fault == "foreign":
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "note.txt").write_text("no clouds")
        shutil.make_archive(str(copy.with_suffix("")), "zip", tmp_path / "other")
    elif fault == "in the way":
        shutil.copy(archive, copy)
        target.mkdir(parents=True)
    done = prepare("modelnet40", target, "--url", copy.as_uri())
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert "Traceback" not in done.stderr
    kept = [path for path in tmp_path.glob("in/**/*") if path != target]
    assert kept == []
