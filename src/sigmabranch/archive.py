"""A network on disk: a folder with a manifest, one safetensors file and JSON beside it.

The manifest names every file with its size and SHA-256 and is written last, so a folder whose
manifest checks out is complete. No pickle is ever written or read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sigmabranch import files
from sigmabranch.errors import CheckpointError

SCHEMA = 1
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"


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
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
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
    header = {"format": "sigmabranch", "schema": SCHEMA}
    contents[MANIFEST] = files.json_bytes({**header, **described, "files": listed})
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
    manifest = files.read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != "sigmabranch":
        raise CheckpointError(f"{folder / MANIFEST} was not written by sigmabranch")
    check_schema(manifest, folder, SCHEMA)
    if kind is not None and manifest.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a {manifest.get('kind')} network, need a {kind} one")
    listed = manifest.get("files")
    if not isinstance(listed, dict) or WEIGHTS not in listed:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it lists no weights; copy it again")
    for name, expected in listed.items():
        check_file(folder, name, expected)
    return manifest


def check_schema(manifest: Mapping[str, Any], folder: Path, schema: int) -> None:
    """Raise :class:`CheckpointError` unless the manifest is of the schema that this code reads."""
    if manifest.get("schema") != schema:
        raise CheckpointError(
            f"{folder} has schema {manifest.get('schema')}, this version reads {schema}: "
            "use the version that wrote it"
        )


def check_file(folder: Path, name: str, expected: Mapping[str, Any], *, read: bool = True) -> None:
    """Whether a file that a manifest names is there and is the one that was written.

    Args:
        folder: of the manifest.
        name: of the file, in the folder itself.
        expected: its ``bytes`` and ``sha256``.
        read: compare the content, not only the length.

    Raises:
        CheckpointError: it is missing, elsewhere or damaged.
    """
    path = folder / name
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
