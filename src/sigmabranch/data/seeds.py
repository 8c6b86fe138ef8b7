"""Random numbers as a function of a seed and a position, so that no generator state is stored.

What a sample draws depends on the seed and on the sample alone: not on the batch it is in, the
process or the device that draws it, or on how often the run was interrupted.

B samples, D draws.
"""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part and on their order.

    The first 63 bits of BLAKE2b over the parts, each a signed 64-bit integer.
    """
    packed = struct.pack(f"<{len(parts)}q", *parts)
    digest = hashlib.blake2b(packed, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_bits(seed: int, index_B: Tensor, draws: int) -> Tensor:
    """Independent 32-bit numbers for each sample, equal on every device.

    Args:
        seed: any non-negative integer below 2**64.
        index_B: int64 sample numbers below 2**32.
        draws: how many numbers each sample needs.

    Returns:
        (B, draws) int64 in [0, 2**32), on the device of ``index_B``.
    """
    state_B = _mix(_mix(index_B ^ (seed & _WORD)) ^ (seed >> 32))
    step_D = torch.arange(1, draws + 1, device=index_B.device) * _GOLDEN
    return _mix((state_B[:, None] + step_D) & _WORD)


def below(bits: Tensor, bound: int) -> Tensor:
    """Map 32-bit numbers to integers in [0, ``bound``), uniformly to within 2**-32."""
    return (bits * bound) >> 32


def uniform(bits: Tensor) -> Tensor:
    """Map 32-bit numbers to float32 in [0, 1), in steps of 2**-24."""
    return (bits >> 8).to(torch.float32) * 2**-24


def _mix(x: Tensor) -> Tensor:
    # A 32-bit xor-shift-multiply bijection held in int64. Both multipliers are below 2**31, so no
    # product reaches 2**63 and no signed overflow is relied on.
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)
