"""ConvNeXts (Liu et al., 2022, arXiv 2201.03545) with timm's parameter names.

A block mixes each channel over its neighbourhood, then all channels at each position, and adds the
result, scaled per channel. Norms run over the channels of one position, so a branch that keeps some
channels normalises by other statistics than the dense network: its cuts are not exact.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sigmabranch.backbones.base import Backbone, check_image
from sigmabranch.backbones.pools import GlobalAveragePool
from sigmabranch.backbones.vit import Mlp
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.fields import from_fields, to_fields

_EPS = 1e-6
_INIT_STD = 0.02
_INIT_SCALE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvNeXtSpec:
    """Shape of a ConvNeXt; ConvNeXt-T by default.

    Attributes:
        layers: blocks per stage.
        widths: channels per stage.
        strides: of each stage against the one before it, of the first against the stem.
        patch: side of a patch, each of which becomes a position.
        kernel: side of the depthwise convolutions, odd.
        mlp_ratio: hidden width of the feed-forward layers, in widths.
        in_channels: channels of the image.
        classes: length of the output.
    """

    family: ClassVar[str] = "convnext"

    layers: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    patch: int = 4
    kernel: int = 7
    mlp_ratio: float = 4.0
    in_channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        if not len(self.layers) == len(self.widths) == len(self.strides) > 0:
            raise ConfigError("a ConvNeXt needs as many layers as widths and strides, at least one")
        sizes = (*self.layers, *self.widths, *self.strides, self.patch, self.kernel)
        if min(*sizes, self.in_channels, self.classes) < 1:
            raise ConfigError("every size of a ConvNeXt must be at least 1")
        if not 0 < self.mlp_ratio < math.inf or min(map(self.hidden, self.widths)) < 1:
            raise ConfigError(
                f"a ConvNeXt's mlp_ratio of {self.mlp_ratio} leaves a hidden layer without units"
            )
        if self.kernel % 2 == 0:
            raise ConfigError(f"a ConvNeXt's kernel must be odd, got {self.kernel}")

    def hidden(self, width: int) -> int:
        """Hidden width of the feed-forward layers of a stage of ``width`` channels."""
        return round(width * self.mlp_ratio)

    def build(self) -> ConvNeXt:
        """A freshly initialised network of this shape."""
        return ConvNeXt(self)

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise :class:`DataError` unless one input of ``shape`` fits the network."""
        check_image(shape, self.in_channels)
        smallest = self.patch * math.prod(self.strides)
        if min(shape[1:]) < smallest:
            raise DataError(
                f"the images have {shape[1]} x {shape[2]} pixels but the network needs at least "
                f"{smallest} on each side: use smaller --set model.patch or model.strides"
            )

    def narrowed(self, factor: float, nudge: int) -> ConvNeXtSpec:
        """All widths times ``factor``; the last stage ``nudge`` channels wider."""
        widths = [max(1, round(width * factor)) for width in self.widths]
        widths[-1] = max(1, widths[-1] + nudge)
        return replace(self, widths=tuple(widths))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {name: to_fields(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ConvNeXtSpec:
        """Inverse of :meth:`to_dict`; unknown keys raise :class:`ConfigError`."""
        return from_fields(cls, "ConvNeXt", value)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of a feature map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise convolution, norm, the feed-forward layer and the scaled sum."""

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, hidden)
        self.gamma = nn.Parameter(torch.full((width,), _INIT_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        mixed_BHWC = self.conv_dw(x).permute(0, 2, 3, 1)
        mixed_BHWC = self.gamma * self.mlp(self.norm(mixed_BHWC))
        return x + mixed_BHWC.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A ConvNeXt of the given shape: (B, in_channels, H, W) float → (B, classes) logits."""

    def __init__(self, spec: ConvNeXtSpec) -> None:
        super().__init__()
        self.skeleton_source = {"builder": spec.family, "config": spec.to_dict()}
        width = spec.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(spec.in_channels, width, spec.patch, spec.patch),
            ChannelNorm(width, eps=_EPS),
        )
        self.stages = nn.Sequential()
        for layers, outputs, stride in zip(spec.layers, spec.widths, spec.strides, strict=True):
            blocks = [Block(outputs, spec.hidden(outputs), spec.kernel) for _ in range(layers)]
            self.stages.append(_stage(width, outputs, stride, blocks))
            width = outputs
        self.global_pool = GlobalAveragePool()
        norm, fc = nn.LayerNorm(width, eps=_EPS), nn.Linear(width, spec.classes)
        self.head = nn.Sequential(OrderedDict(norm=norm, fc=fc))
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, classes)."""
        return self.head(self.global_pool(self.stages(self.stem(x))))

    def _initialise(self) -> None:
        """Small normal weights and zero biases, as its authors do."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=_INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def convnext_backbone(model: nn.Module) -> Backbone | None:
    """Where to cut a :class:`ConvNeXt`; None for any other module."""
    if not isinstance(model, ConvNeXt):
        return None
    stages = tuple(f"stages.{name}" for name, _ in model.stages.named_children())
    return Backbone(
        model=model,
        chain=("stem", *stages),
        stages=stages,
        pool=GlobalAveragePool(),
        head=("head.norm", "head.fc"),
        source=model.skeleton_source,
    )


def build_convnext(config: Mapping[str, Any]) -> ConvNeXt:
    """A freshly initialised ConvNeXt from the JSON form of its spec."""
    return ConvNeXt(ConvNeXtSpec.from_dict(config))


def _stage(inputs: int, outputs: int, stride: int, blocks: list[Block]) -> nn.Sequential:
    """Norm and strided convolution where the shape changes, then the blocks."""
    downsample: nn.Module = nn.Identity()
    if inputs != outputs or stride > 1:
        downsample = nn.Sequential(
            ChannelNorm(inputs, eps=_EPS), nn.Conv2d(inputs, outputs, stride, stride)
        )
    # A plain sequence, which a package stores and reads block by block.
    return nn.Sequential(OrderedDict(downsample=downsample, blocks=nn.Sequential(*blocks)))
