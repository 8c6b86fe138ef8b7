"""JSON that holds its own hash: whatever is altered is found, and the file is known as ours.

Files of earlier versions hold no hash, or one without our name; they are read all the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sigmabranch.errors import CheckpointError

# The entries of an object that say whose it is, and the hash of everything else in it.
_MARK, _SEAL = "written_by", "sha256"
_NAME = "sigmabranch"
_DIGEST = re.compile("[0-9a-f]{64}")


def json_bytes(value: Any) -> bytes:
    """``value`` as the bytes of a JSON file; NaN and infinity are refused."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object with our name and the hash of everything else, in place of those it may have had.

    Raises:
        ValueError: NaN or infinity, which JSON cannot hold.
    """
    rest = {_MARK: _NAME} | {n: part for n, part in content.items() if n not in (_MARK, _SEAL)}
    return {**rest, _SEAL: _hash(rest)}


def is_digest(value: Any) -> bool:
    """Whether a value is a SHA-256 in hex, and nothing that could be a path."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def has_seal(content: Any) -> bool:
    """Whether an object claims to be sealed, with or without right."""
    return isinstance(content, Mapping) and (content.get(_MARK) == _NAME or _SEAL in content)


def is_ours(content: Any) -> bool:
    """Whether a value is an object that :func:`sealed` made, unaltered."""
    try:
        return has_seal(content) and content.get(_MARK) == _NAME and content == sealed(content)
    except (ValueError, RecursionError):  # which Python reads, but nobody writes
        return False


def unsealed(content: Any, path: Path | str, advice: str) -> Any:
    """The value without name and hash, which fits if there is one.

    Args:
        content: any JSON value.
        path: where it comes from, and
        advice: what to do about damage, for the message.

    Raises:
        CheckpointError: it was altered.
    """
    if not has_seal(content):
        return content
    rest = {name: part for name, part in content.items() if name != _SEAL}
    try:
        fits = _hash(rest) == content.get(_SEAL)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: it holds NaN or infinity, or is nested too deep; {advice}"
        ) from error
    if not fits:
        raise CheckpointError(f"{path} is damaged: its SHA-256 differs; {advice}")
    return {name: part for name, part in rest.items() if name != _MARK}


def _hash(rest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_bytes(rest)).hexdigest()
