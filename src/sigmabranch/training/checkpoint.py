"""Checkpoints that are complete or absent, and that resume only the run they came from.

A folder holds ``state.json`` and the tensors that it names. The tensors are written first, under
a new name; replacing ``state.json`` makes them the checkpoint; only then are older tensors
removed. A crash at any moment leaves one checkpoint intact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sigmabranch.errors import CheckpointError
from sigmabranch.files import atomic_write, read_json, sha256, write_json

SCHEMA = 1
MANIFEST = "state.json"
KEYS = {"schema", "step", "seconds", "history", "identity", "tensors", "sha256"}


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
    payload = folder / f"step-{checkpoint.step:09d}.pt"
    with atomic_write(payload) as temporary:
        try:
            torch.save(checkpoint.tensors, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise CheckpointError(
                f"cannot write {payload}: {_one_line(error)}; free space or choose another folder"
            ) from error
        digest = sha256(temporary)
    write_json(
        folder / MANIFEST,
        {
            "schema": SCHEMA,
            "step": checkpoint.step,
            "seconds": checkpoint.seconds,
            "history": checkpoint.history,
            "identity": checkpoint.identity,
            "tensors": payload.name,
            "sha256": digest,
        },
    )
    for old in folder.glob("step-*.pt"):
        if old != payload:
            old.unlink(missing_ok=True)


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
    state = read_json(manifest)
    if not isinstance(state, dict) or state.get("schema") != SCHEMA or set(state) != KEYS:
        raise CheckpointError(f"{manifest} is not a checkpoint of this version; start anew")
    if identity is not None:
        check_identity(state["identity"], identity, manifest)
    payload = folder / Path(str(state["tensors"])).name
    try:
        intact = sha256(payload) == state["sha256"]
    except OSError as error:
        raise CheckpointError(f"cannot read {payload}: {error.strerror}; start anew") from error
    if not intact:
        raise CheckpointError(f"{payload} is damaged: its SHA-256 differs from {MANIFEST}'s")
    try:
        tensors = torch.load(payload, map_location="cpu", weights_only=True)
    except Exception as error:  # a zip, pickle or allow-list error, according to what is broken
        raise CheckpointError(f"{payload} is damaged: {_one_line(error)}") from error
    return Checkpoint(
        step=state["step"],
        seconds=state["seconds"],
        history=state["history"],
        identity=state["identity"],
        tensors=tensors,
    )


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
