"""Vision transformers (Dosovitskiy et al., 2021, arXiv 2010.11929) with timm's parameter names.

Blocks normalise first; there is no class token: the head reads the mean of all tokens.

Shapes: B batch, T tokens, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigmabranch.backbones.base import Backbone, check_image
from sigmabranch.backbones.chain import chain_backbone
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.fields import from_fields, to_fields

_EPS = 1e-6
_INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTSpec:
    """Shape of a vision transformer; a small one for 32×32 images by default.

    Attributes:
        image_size: side of the image in pixels.
        patch: side of a patch, each of which becomes a token.
        width: length of a token.
        depth: blocks.
        heads: of each attention; they divide the width.
        mlp_ratio: hidden width of the feed-forward layers, in widths.
        in_channels: channels of the image.
        classes: length of the output.
    """

    family: ClassVar[str] = "vit"

    image_size: int = 32
    patch: int = 4
    width: int = 128
    depth: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    in_channels: int = 3
    classes: int = 100

    def __post_init__(self) -> None:
        sizes = (self.image_size, self.patch, self.width, self.depth, self.heads, self.in_channels)
        if min(*sizes, self.classes) < 1 or not 0 < self.mlp_ratio < math.inf or self.hidden < 1:
            raise ConfigError("every size of a ViT must be at least 1, its mlp_ratio above 0")
        if self.image_size % self.patch:
            raise ConfigError(
                f"patches of {self.patch} pixels do not tile an image of {self.image_size}: "
                "choose a patch that divides image_size"
            )
        if self.width % self.heads:
            raise ConfigError(
                f"{self.heads} heads cannot share a width of {self.width}: choose a multiple"
            )

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward layers."""
        return round(self.width * self.mlp_ratio)

    def build(self) -> ViT:
        """A freshly initialised network of this shape."""
        return ViT(self)

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise :class:`DataError` unless one input of ``shape`` fits the network."""
        check_image(shape, self.in_channels)
        if shape[1] != shape[2]:
            raise DataError(f"the network takes square images, these are {shape[1]} x {shape[2]}")
        if shape[1] != self.image_size:
            raise DataError(
                f"the images have {shape[1]} x {shape[2]} pixels but the network is made for "
                f"squares of {self.image_size}: use --set model.image_size={shape[1]}"
            )

    def narrowed(self, factor: float, nudge: int) -> ViTSpec:
        """Width and hidden width times ``factor``, heads as they are; ``nudge`` hidden units more.

        The width must remain a multiple of the heads. The hidden width makes up for that rounding:
        a block's 4·width² + 2·width·hidden weights shrink by ``factor``².
        """
        width = self.heads * max(1, round(self.width * factor / self.heads))
        block = factor**2 * self.width * (4 * self.width + 2 * self.hidden)
        hidden = round((block - 4 * width**2) / (2 * width)) + nudge
        return replace(self, width=width, mlp_ratio=max(1, hidden) / width)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {name: to_fields(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ViTSpec:
        """Inverse of :meth:`to_dict`; unknown keys raise :class:`ConfigError`."""
        return from_fields(cls, "ViT", value)


class PatchEmbed(nn.Module):
    """One token for each patch of the image, row by row."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, side, side) → (B, T, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention over the tokens of each image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        qkv_BT3Hd = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q_BHTd, k_BHTd, v_BHTd = qkv_BT3Hd.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd)
        return self.proj(mixed_BHTd.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The feed-forward layer: each token by itself."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention, then the feed-forward layer, each normalised before and added."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A transformer of the given shape: (B, in_channels, side, side) → (B, classes) logits."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.skeleton_source = {"builder": spec.family, "config": spec.to_dict()}
        tokens = (spec.image_size // spec.patch) ** 2
        self.patch_embed = PatchEmbed(spec.in_channels, spec.width, spec.patch)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, spec.width))
        blocks = [Block(spec.width, spec.heads, spec.hidden) for _ in range(spec.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(spec.width, eps=_EPS)
        self.head = nn.Linear(spec.width, spec.classes)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, side, side) → (B, classes)."""
        token_BTD = self.blocks(self.patch_embed(x) + self.pos_embed)
        return self.head(self.norm(token_BTD).mean(dim=1))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of two or more dimensions that are no weights."""
        return {"pos_embed"}

    def _initialise(self) -> None:
        """Small normal weights and zero biases; the patches' convolution keeps torch's."""
        nn.init.trunc_normal_(self.pos_embed, std=_INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD)
                nn.init.zeros_(module.bias)


def vit_backbone(model: nn.Module) -> Backbone | None:
    """Where to cut a :class:`ViT`: at every block; None for any other module."""
    if not isinstance(model, ViT):
        return None
    weight = model.patch_embed.proj.weight
    side = weight.shape[-1] * math.isqrt(model.pos_embed.shape[1])
    example = torch.zeros(1, weight.shape[1], side, side, device=weight.device)
    return replace(chain_backbone(model, example), source=model.skeleton_source)


def build_vit(config: Mapping[str, Any]) -> ViT:
    """A freshly initialised ViT from the JSON form of its spec."""
    return ViT(ViTSpec.from_dict(config))
