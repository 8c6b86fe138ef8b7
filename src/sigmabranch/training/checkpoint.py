"""Checkpoints that are complete or absent, and that resume only the run they came from.

A folder holds ``state.json`` and the file of tensors that it names by its hash. The tensors are
written first, under a name that no other tensors have; replacing ``state.json`` makes both the
checkpoint; only then are older tensors removed. A crash at any moment leaves one checkpoint intact.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sigmabranch import files
from sigmabranch.errors import CheckpointError
from sigmabranch.seals import is_digest
from sigmabranch.temporaries import temporary_file

SCHEMA = 2
MANIFEST = "state.json"
KEYS = {"schema", "step", "seconds", "history", "identity", "tensors"}
# Earlier checkpoints: no hash of the whole, and that of the tensors beside their name.
_EARLIER_SCHEMA, _EARLIER_KEYS = 1, KEYS | {"sha256"}
_ADVICE = "start anew in another folder"
_PAYLOAD = re.compile(r"step-\d{9,}-([0-9a-f]{16})\.pt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The state of a run between two optimizer steps.

    Attributes:
        step: optimizer steps done.
        seconds: time spent in the unfinished epoch.
        history: one record per finished epoch.
        identity: what makes this run this run; a resume needs the same.
        tensors: nested dictionaries of tensors and plain numbers.
    """

    step: int
    seconds: float
    history: list[dict[str, Any]]
    identity: Mapping[str, Any]
    tensors: dict[str, Any]


def save_checkpoint(folder: Path | str, checkpoint: Checkpoint) -> None:
    """Make ``checkpoint`` the one in ``folder``.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; the previous checkpoint
            is still there.
    """
    folder = Path(folder)
    last = _last_payload(folder)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        payload, digest = _write_tensors(folder, checkpoint)
    files.write_json(
        folder / MANIFEST,
        {
            "schema": SCHEMA,
            "step": checkpoint.step,
            "seconds": checkpoint.seconds,
            "history": checkpoint.history,
            "identity": checkpoint.identity,
            "tensors": {"file": payload.name, "sha256": digest},
        },
    )
    with files.writing(folder):
        for old in {*folder.glob("step-*.pt")} - {payload}:
            if old.name == last or _is_payload(old):
                old.unlink(missing_ok=True)


def _write_tensors(folder: Path, checkpoint: Checkpoint) -> tuple[Path, str]:
    """The file of a checkpoint's tensors, and its SHA-256."""
    with temporary_file(folder, "step") as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint.tensors, file)
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise CheckpointError(
                f"cannot write {folder}: {_one_line(error)}; free space or choose another folder"
            ) from error
        digest = files.sha256(temporary)
        payload = folder / f"step-{checkpoint.step:09d}-{digest[:16]}.pt"
        files.publish(temporary, payload)
    return payload, digest


def _last_payload(folder: Path) -> str | None:
    """Name of the tensors of the checkpoint that is about to be replaced, if there is one."""
    manifest = folder / MANIFEST
    files.check_free(manifest)
    if not manifest.exists():
        return None
    tensors = files.parse_json(manifest)["tensors"]
    return tensors["file"] if isinstance(tensors, dict) else str(tensors)


def _is_payload(path: Path) -> bool:
    """Whether a file is one of ours, left by a process that ended before it was a checkpoint."""
    match = _PAYLOAD.fullmatch(path.name)
    return match is not None and files.sha256(path).startswith(match[1])


def load_checkpoint(
    folder: Path | str, identity: Mapping[str, Any] | None = None
) -> Checkpoint | None:
    """The checkpoint in ``folder``, its tensors on the CPU, or None if there is none.

    Args:
        folder: where :func:`save_checkpoint` wrote.
        identity: if given, the checkpoint's must be equal to it.

    Raises:
        CheckpointError: damaged files, or the checkpoint of another run; the message names the
            first setting that differs.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    state = files.parse_json(manifest, _ADVICE)
    payload, digest = _checked(state, manifest)
    if identity is not None:
        check_identity(state["identity"], identity, manifest)
    try:
        intact = files.sha256(payload) == digest
    except OSError as error:
        raise CheckpointError(f"cannot read {payload}: {error.strerror}; {_ADVICE}") from error
    if not intact:
        raise CheckpointError(
            f"{payload} is damaged: its SHA-256 differs from {MANIFEST}'s; {_ADVICE}"
        )
    try:
        tensors = torch.load(payload, map_location="cpu", weights_only=True)
    except Exception as error:  # a zip, pickle or allow-list error, according to what is broken
        raise CheckpointError(f"{payload} is damaged: {_one_line(error)}; {_ADVICE}") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{payload} holds no checkpoint; {_ADVICE}")
    return Checkpoint(
        step=state["step"],
        seconds=state["seconds"],
        history=state["history"],
        identity=state["identity"],
        tensors=tensors,
    )


def _checked(state: Any, manifest: Path) -> tuple[Path, str]:
    """The file of the tensors and its SHA-256, once the state is known to be one."""
    schema = state.get("schema") if isinstance(state, dict) else None
    if schema == _EARLIER_SCHEMA and state.keys() == _EARLIER_KEYS:
        name, digest = state["tensors"], state["sha256"]
    else:
        state = files.unsealed(state, manifest, _ADVICE)
        if schema != SCHEMA or state.keys() != KEYS:
            raise CheckpointError(f"{manifest} is not a checkpoint of this version; {_ADVICE}")
        named = state["tensors"] if isinstance(state["tensors"], dict) else {}
        name, digest = named.get("file"), named.get("sha256")
    if not (type(name) is str and Path(name).name == name and is_digest(digest)):
        raise CheckpointError(f"{manifest} is damaged: it names no tensors beside it; {_ADVICE}")
    if wrong := next((key for key, fits in _FORMS.items() if not fits(state[key])), None):
        raise CheckpointError(f"{manifest} is damaged: {wrong} cannot be so; {_ADVICE}")
    return manifest.with_name(name), digest


_FORMS: Mapping[str, Callable[[Any], bool]] = {
    "step": lambda step: type(step) is int and step >= 0,
    "seconds": lambda value: type(value) in (int, float) and 0 <= value < math.inf,
    "history": lambda rows: isinstance(rows, list) and all(isinstance(row, dict) for row in rows),
    "identity": lambda value: isinstance(value, dict),
}


def check_identity(found: Any, wanted: Mapping[str, Any], where: Path) -> None:
    """Refuse a checkpoint whose identity is not ``wanted``.

    Raises:
        CheckpointError: naming the first difference.
    """
    difference = _difference(found, json.loads(json.dumps(wanted)), "")
    if difference:
        raise CheckpointError(
            f"{where} belongs to another run: {difference}; "
            "use the same settings, or another folder"
        )


def _difference(found: Any, wanted: Any, path: str) -> str | None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            inner = _difference(found.get(key), wanted.get(key), f"{path}.{key}".lstrip("."))
            if inner:
                return inner
        return None
    return None if found == wanted else f"its {path} is {found}, this run's {wanted}"


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
