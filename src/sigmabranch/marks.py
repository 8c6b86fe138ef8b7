"""Whose a file is: no file is written over that was not written by us.

Sealed JSON says so itself, and a manifest speaks for the files that it lists. Of other files a
folder keeps a list, ``.sigmabranch``, which a name joins before the file is written.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sigmabranch.errors import CheckpointError
from sigmabranch.seals import has_seal, is_digest, is_ours

MANIFEST = "manifest.json"
_LIST = ".sigmabranch"
_TITLE = "Files that sigmabranch has written here, and may write over:\n"
# What tells a folder of an earlier version, none of whose files is marked: file → some of its keys.
_EARLIER: Mapping[str, set[str]] = {
    "manifest.json": {"format", "schema"},
    "state.json": {"schema", "step", "history", "identity"},
    "task.json": {"task", "seed"},
    "source/task.json": {"task", "seed"},
    "settings.json": {"task", "seed", "knobs"},
    "simulation.json": {"latency", "stream", "persistence"},
}


def check_free(path: Path | str) -> None:
    """Refuse a path at which something would be lost that we did not write.

    Raises:
        CheckpointError: there is such a thing.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: choose another name")
    if not (path.is_file() and _is_own(path)):
        raise CheckpointError(
            f"{path} is damaged, or was not written by sigmabranch, and would be lost: move it "
            "away or choose another place"
        )


def claim(path: Path) -> None:
    """Note that the file at ``path`` will be ours, unless that is known."""
    if path.name in _claimed(path.parent):
        return
    line = f"{zlib.crc32(path.name.encode()):08x} {path.name}\n"
    with open(path.parent / _LIST, "ab") as file:
        # One write, which other processes' writes do not divide.
        file.write(((_TITLE if not file.tell() else "") + line).encode())
        file.flush()
        os.fsync(file.fileno())


def listed(folder: Path) -> dict[str, str]:
    """File → SHA-256, as the manifest of ours in ``folder`` has it; none if there is no such."""
    found = _parsed(folder / MANIFEST)
    if not (is_ours(found) or _is_earlier(MANIFEST, found)):
        return {}
    parts = found.get("files"), found.get("nodes")
    named = [*parts[0].items()] if isinstance(parts[0], dict) else []
    nodes = parts[1] if isinstance(parts[1], list) else []
    named += [(node.get("file"), node) for node in nodes if isinstance(node, dict)]
    named = [(name, said) for name, said in named if isinstance(said, dict)]
    return {
        name: said["sha256"]
        for name, said in named
        if isinstance(name, str) and Path(name).name == name and is_digest(said.get("sha256"))
    }


def _is_own(path: Path) -> bool:
    content = _parsed(path)
    if is_ours(content) or _is_earlier(path.name, content):
        return True
    if path.name == MANIFEST or has_seal(content):  # another's, or altered
        return False
    if path.name in _claimed(path.parent) or path.name in listed(path.parent):
        return True
    return _is_result(content) or any(_is_of_earlier(place) for place in [*path.parents][:3])


def _claimed(folder: Path) -> set[str]:
    """The names on the folder's list whose line is whole."""
    try:
        lines = (folder / _LIST).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return set()
    entries = (line.partition(" ") for line in lines)
    return {name for crc, _, name in entries if crc == f"{zlib.crc32(name.encode()):08x}"}


def _is_of_earlier(folder: Path) -> bool:
    return any(_is_earlier(name, _parsed(folder / name)) for name in _EARLIER)


def _is_earlier(name: str, content: Any) -> bool:
    """Whether a file of this name and content was written before such files had their marks."""
    keys = _EARLIER.get(name)
    if keys is None or not isinstance(content, dict) or not content.keys() >= keys:
        return False
    if name == MANIFEST and not str(content["format"]).startswith("sigmabranch"):
        return False
    return "written_by" not in content


def _is_result(content: Any) -> bool:
    """Whether an object without mark says, as our results do, which command made it."""
    made = content.get("provenance") if isinstance(content, dict) else None
    return isinstance(made, dict) and made.keys() >= {"command", "commit", "hardware"}


def _parsed(path: Path) -> Any:
    """The JSON object in a file, or None if there is no such."""
    try:
        with open(path, "rb") as file:
            begins = file.read(1) == b"{"  # weights are long
            return json.loads(b"{" + file.read()) if begins else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (ValueError, RecursionError):
        return None
