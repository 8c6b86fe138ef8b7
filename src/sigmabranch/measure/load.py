"""Networks that read different weights for different inputs: what one input costs them.

Shapes: B batch, G choices.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Load(NamedTuple):
    """What each input of a batch made a network read and compute at batch 1.

    Attributes:
        active_params: (B,) int64; what is always read included.
        macs: (B,) int64, in the convention of :data:`sigmabranch.measure.cost.CONVENTION`.
        choices: (B, G) bool: which of its optional parts (blocks, channels, leaves, experts) it
            used.
    """

    active_params: Tensor
    macs: Tensor
    choices: Tensor


@runtime_checkable
class Dynamic(Protocol):
    """A network whose active weights depend on the input."""

    def with_load(self, x: Tensor) -> tuple[Tensor, Load]:
        """Logits (B, V) and the load of each input, in eval mode."""

    def bounds(self) -> dict[str, dict[str, int]]:
        """``{"least": {"active_params", "macs"}, "most": {...}}`` over all possible choices."""

    def __call__(self, x: Tensor) -> Any:
        """Logits (B, V)."""
