"""A network on disk: a folder with a manifest, one safetensors file and JSON beside it.

The manifest names every file with its size and SHA-256; replacing it makes them the network, so a
folder whose manifest checks out is complete. It holds its own hash; folders written before that are
read all the same. No pickle is ever written or read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sigmabranch import files
from sigmabranch.errors import CheckpointError
from sigmabranch.marks import MANIFEST
from sigmabranch.seals import has_seal, is_digest, json_bytes, sealed, unsealed

FORMAT, SCHEMA = "sigmabranch", 1
WEIGHTS = "weights.safetensors"
_COPY = "copy it again"

Kind = TypeVar("Kind")


def write_archive(
    folder: Path | str,
    state: Mapping[str, Tensor],
    described: Mapping[str, Any],
    documents: Mapping[str, Any] | None = None,
) -> None:
    """Write a network's tensors and description; a crash leaves those that were there, or these.

    Args:
        folder: created if absent.
        state: tensors by name, stored in their own dtype.
        described: further JSON-able entries of the manifest.
        documents: file name → JSON-able content of files beside the weights.

    Raises:
        CheckpointError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    check_free(folder, format=FORMAT, schema=SCHEMA, kind=described.get("kind"))
    # Copies: tensors that share memory could not be stored.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    contents = {WEIGHTS: safetensors.torch.save(tensors)}
    contents |= {name: json_bytes(content) for name, content in (documents or {}).items()}
    listed = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    header = {"format": FORMAT, "schema": SCHEMA}
    manifest = json_bytes(sealed({**header, **described, "files": listed}))
    files.write_together(folder, {**contents, MANIFEST: manifest})


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
    manifest = files.parse_json(path, _COPY)
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        raise CheckpointError(stranger)
    check_schema(manifest, folder, schema)
    if always and not has_seal(manifest):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is missing; {_COPY}")
    return cast("dict[str, Any]", unsealed(manifest, path, _COPY))


def check_free(folder: Path | str, *, format: str, schema: int, kind: str | None = None) -> None:
    """Refuse a folder whose manifest would be lost: one of another format, schema or kind.

    Raises:
        CheckpointError: there is such a manifest, or one that cannot be read.
    """
    path = Path(folder) / MANIFEST
    files.check_free(path)
    if not path.exists():
        return
    found = files.parse_json(path)
    if [found.get(name) for name in ("format", "schema", "kind")] != [format, schema, kind]:
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
        expected: what the manifest says of it, which must be its ``bytes`` and ``sha256``; one that
            waits for its name gets it.
        read: compare the content, not only the length.

    Raises:
        CheckpointError: it is missing, elsewhere or damaged, or the manifest says something else.
    """
    path = folder / name
    said = expected if isinstance(expected, dict) else {}
    if type(said.get("bytes")) is not int or not is_digest(said.get("sha256")):
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged: it does not say the bytes and sha256 of {name!r}"
        )
    if Path(name).name != name:
        raise CheckpointError(f"{folder / MANIFEST} names {name!r} outside its own folder")
    with files.writing(path):
        files.settle(path, expected["sha256"])
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: copy the whole folder again")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: {size} bytes instead of {expected['bytes']}; copy it again"
        )
    if read and _digest(path) != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs; copy it again")


def _digest(path: Path) -> str:
    try:
        return files.sha256(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def fill(model: nn.Module, folder: Path | str) -> None:
    """Give a skeleton the archive's tensors, in place of its own (which may be on meta).

    Raises:
        CheckpointError: names or shapes differ.
    """
    path = Path(folder) / WEIGHTS
    try:
        model.load_state_dict(safetensors.torch.load_file(path), assign=True)
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} does not fit its manifest: {reason}") from error
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(
                f"{path} does not hold {name}, which the network computes when it is made"
            )
