"""What routers and statistics see of a feature: one number per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sigmabranch.errors import ConfigError, ConversionError


class GlobalAveragePool(nn.Module):
    """Mean over all positions: (B, C, ...) → (B, C); a pooled feature passes through."""

    def __init__(self) -> None:
        super().__init__()
        # A module, not mean(): the counter charges adaptive pooling, and so does the paper.
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, ...) → (B, C)."""
        if feature.ndim == 4:
            return self.pool(feature).flatten(1)
        return feature if feature.ndim == 2 else feature.flatten(2).mean(2)


class TokenMean(nn.Module):
    """Mean over all positions where channels come last: (B, ..., C) → (B, C)."""

    def forward(self, feature: Tensor) -> Tensor:
        """(B, ..., C) → (B, C)."""
        return feature if feature.ndim == 2 else feature.flatten(1, -2).mean(1)


class FirstToken(nn.Module):
    """The first token, which is the class token where there is one: (B, T, C) → (B, C)."""

    def forward(self, feature: Tensor) -> Tensor:
        """(B, T, C) → (B, C)."""
        return feature[:, 0]


class PoolByRank(nn.Module):
    """One pool for features of each number of dimensions, where maps become tokens on the way."""

    def __init__(self, pools: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.pools = nn.ModuleDict({str(rank): pool for rank, pool in pools.items()})

    def forward(self, feature: Tensor) -> Tensor:
        """(B, ...) → (B, C)."""
        return feature if feature.ndim == 2 else self.pools[str(feature.ndim)](feature)


def pool_of(name: str, dim: int) -> nn.Module:
    """The pool called ``"mean"`` or ``"first"`` for features whose channels lie along ``dim``.

    Raises:
        ConfigError: another name, or the first token where there are no tokens.
    """
    if name == "mean":
        return GlobalAveragePool() if dim == 1 else TokenMean()
    if name == "first" and dim != 1:
        return FirstToken()
    raise ConfigError(f"no pool {name!r} for channels along dimension {dim}: use mean")


def channel_dim(shapes: Sequence[tuple[int, ...]]) -> int:
    """The dimension of the channels (1 or the last), from one feature's shapes without batch.

    Channels are what does not grow with the input; at one size, what is unlike all other sides.

    Raises:
        ConversionError: the shapes do not tell.
    """
    shape, last = shapes[0], len(shapes[0])
    if last < 2:
        return 1
    larger = shapes[-1]
    stays = [dim for dim in (1, last) if shape[dim - 1] == larger[dim - 1]]
    if len(stays) == 2 and last == 2:
        return last  # tokens of a network that takes one size
    if len(stays) == 2:
        stays = [dim for dim in stays if shape.count(shape[dim - 1]) == 1]
    if len(stays) != 1:
        raise ConversionError(
            f"which dimension of a feature of shape {shape} holds the channels cannot be told: "
            "describe the network with a sigmabranch.Backbone"
        )
    return stays[0]
