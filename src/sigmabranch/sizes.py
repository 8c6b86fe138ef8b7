"""Sizes as people write them."""

from __future__ import annotations

from sigmabranch.errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(size: int | str) -> int:
    """Bytes from a number or from text such as ``"42MB"`` (10⁶) or ``"40MiB"`` (2²⁰).

    Raises:
        ConfigError: not a positive size.
    """
    text = str(size).strip().upper()
    number = text.rstrip("KMGIB")
    unit = text[len(number) :].strip() or "B"
    try:
        count = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ConfigError(f"{size!r} is no size: write bytes, or for example 42MB or 40MiB")
    return count
