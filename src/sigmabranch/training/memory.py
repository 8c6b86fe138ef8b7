"""What to do when memory runs out: find what fits, and say which option makes it fit."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

_CPU_WORDS = ("not enough memory", "can't allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: that of an accelerator, or the CPU's."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_WORDS)
    )


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fits(attempt: Callable[[], object]) -> bool:
    """Whether ``attempt`` has enough memory; other failures pass through."""
    release()
    try:
        attempt()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def largest_fitting(attempt: Callable[[int], object], size: int) -> int:
    """The first of size/2, size/4, … 1 samples for which ``attempt`` has memory; 0 if none."""
    while size > 1:
        size //= 2
        if fits(lambda samples=size: attempt(samples)):  # type: ignore[misc]
            return size
    return 0
