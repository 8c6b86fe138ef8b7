"""A network on disk: a folder with a manifest, one safetensors file and JSON beside it.

The manifest names every file with its size and SHA-256 and is written last, so a folder whose
manifest checks out is complete. It carries its own hash, and so do those of packages and of ONNX
nodes; folders written before that have none and are read all the same. No pickle is ever written
or read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sigmabranch import files
from sigmabranch.errors import CheckpointError

FORMAT, SCHEMA = "sigmabranch", 1
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
# The entry of a manifest that holds its own hash.
_SEAL = "sha256"

Kind = TypeVar("Kind")


def write_archive(
    folder: Path | str,
    state: Mapping[str, Tensor],
    described: Mapping[str, Any],
    documents: Mapping[str, Any] | None = None,
) -> None:
    """Write a network's tensors and description, each file atomically and the manifest last.

    Args:
        folder: created if absent.
        state: tensors by name, stored in their own dtype.
        described: further JSON-able entries of the manifest.
        documents: file name → JSON-able content of files beside the weights.

    Raises:
        CheckpointError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    check_free(folder, FORMAT, described.get("kind"))
    # Copies: tensors that share memory could not be stored.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    contents = {WEIGHTS: safetensors.torch.save(tensors)}
    contents |= {name: files.json_bytes(content) for name, content in (documents or {}).items()}
    listed = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    header = {"format": FORMAT, "schema": SCHEMA}
    contents[MANIFEST] = files.json_bytes(sealed({**header, **described, "files": listed}))
    with ExitStack() as stack:
        # Files are replaced in the reverse of this order, once all of them are written.
        for name in reversed(contents):
            temporary = stack.enter_context(files.atomic_write(folder / name))
            temporary.write_bytes(contents[name])


def read_manifest(folder: Path | str, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a saved network, after checking every file that it names.

    Raises:
        CheckpointError: missing or damaged files, another schema, or not of ``kind``.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        hint = f"try one of {', '.join(inside)} in it" if inside else f"{MANIFEST} is missing"
        raise CheckpointError(f"{folder} holds no saved network: {hint}")
    manifest = read_sealed(
        folder,
        format=FORMAT,
        schema=SCHEMA,
        stranger=f"{folder / MANIFEST} was not written by sigmabranch",
    )
    if kind is not None and manifest.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a {manifest.get('kind')} network, need a {kind} one")
    checked_entry(manifest, "notes", dict, folder)
    listed = manifest.get("files")
    if not isinstance(listed, dict) or WEIGHTS not in listed:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it lists no weights; copy it again")
    for name, expected in listed.items():
        check_file(folder, name, expected)
    return manifest


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the hash of everything else in it, in place of one that it may have had.

    Raises:
        ValueError: NaN or infinity, which JSON cannot hold.
    """
    rest = {name: value for name, value in manifest.items() if name != _SEAL}
    return {**rest, _SEAL: hashlib.sha256(files.json_bytes(rest)).hexdigest()}


def read_sealed(
    folder: Path, *, format: str, schema: int, stranger: str, always: bool = False
) -> dict[str, Any]:
    """The manifest of a folder, without its own hash, which fits if there is one.

    Args:
        folder: holds the manifest.
        format, schema: of the manifest.
        stranger: what to say of a manifest of another format.
        always: refuse a manifest without a hash.

    Raises:
        CheckpointError: no manifest, a damaged one, or another format or schema.
    """
    path = folder / MANIFEST
    manifest = files.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        raise CheckpointError(stranger)
    check_schema(manifest, folder, schema)
    found = manifest.pop(_SEAL, None)
    try:
        expected = sealed(manifest)[_SEAL]
    except (ValueError, RecursionError) as error:  # which Python reads, but nobody writes
        raise CheckpointError(
            f"{path} is damaged: it holds NaN or infinity, or is nested too deep; copy it again"
        ) from error
    if found != expected and (always or found is not None):
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs; copy it again")
    return manifest


def check_free(folder: Path | str, format: str, kind: str | None = None) -> None:
    """Refuse a folder whose manifest would be lost: one of another format or kind.

    One that cannot be read may be replaced.

    Raises:
        CheckpointError: there is such a manifest.
    """
    path = Path(folder) / MANIFEST
    try:
        found = files.read_json(path) if path.is_file() else None
    except CheckpointError:
        return
    if found is None:
        return
    held = (found.get("format"), found.get("kind")) if isinstance(found, dict) else None
    if held != (format, kind):
        raise CheckpointError(
            f"{folder} holds something else, whose {MANIFEST} would be lost: choose another folder"
        )


def checked_entry(manifest: Mapping[str, Any], name: str, kind: type[Kind], folder: Path) -> Kind:
    """One entry of the manifest in ``folder``; :class:`CheckpointError` if it is no ``kind``."""
    value = manifest.get(name)
    if type(value) is not kind:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged: {name} must be {kind.__name__}, got "
            f"{str(value)[:40]!r}"
        )
    return value


def check_schema(manifest: Mapping[str, Any], folder: Path, schema: int) -> None:
    """Raise :class:`CheckpointError` unless the manifest is of the schema that this code reads."""
    if manifest.get("schema") != schema:
        raise CheckpointError(
            f"{folder} has schema {manifest.get('schema')}, this version reads {schema}: "
            "use the version that wrote it"
        )


def check_file(folder: Path, name: str, expected: Any, *, read: bool = True) -> None:
    """Whether a file that a manifest names is there and is the one that was written.

    Args:
        folder: of the manifest.
        name: of the file, in the folder itself.
        expected: what the manifest says of it, which must be its ``bytes`` and ``sha256``.
        read: compare the content, not only the length.

    Raises:
        CheckpointError: it is missing, elsewhere or damaged, or the manifest says something else.
    """
    path = folder / name
    said = expected if isinstance(expected, dict) else {}
    if type(said.get("bytes")) is not int or type(said.get("sha256")) is not str:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged: it does not say the bytes and sha256 of {name!r}"
        )
    if Path(name).name != name:
        raise CheckpointError(f"{folder / MANIFEST} names {name!r} outside its own folder")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: copy the whole folder again")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: {size} bytes instead of {expected['bytes']}; copy it again"
        )
    if read and files.sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs; copy it again")


def fill(model: nn.Module, folder: Path | str) -> None:
    """Give a skeleton the archive's tensors, in place of its own (which may be on meta).

    Raises:
        CheckpointError: names or shapes differ.
    """
    path = Path(folder) / WEIGHTS
    try:
        model.load_state_dict(safetensors.torch.load_file(path), assign=True)
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} does not fit its manifest: {reason}") from error
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(
                f"{path} does not hold {name}, which the network computes when it is made"
            )
