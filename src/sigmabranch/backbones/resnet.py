"""ResNets (He et al., 2016) with timm's parameter names, and where any ResNet may be cut.

Bottlenecks are of the v1.5 kind: the stride sits in the 3×3 convolution, which the paper's counts
require. Basic blocks, squeeze-and-excitation and grouped variants of timm and torchvision are cut
by the same adapter, :func:`resnet_backbone`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from sigmabranch.backbones.base import Backbone, check_image
from sigmabranch.backbones.pools import GlobalAveragePool
from sigmabranch.backbones.timm import timm_source
from sigmabranch.errors import ConfigError
from sigmabranch.fields import from_fields, to_fields

_EXPANSION = {"basic": 1, "bottleneck": 4}
_STEMS = {"imagenet": (7, 2), "cifar": (3, 1), "small": (3, 2)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetSpec:
    """Shape of a ResNet.

    Attributes:
        block: ``"bottleneck"`` or ``"basic"``.
        layers: blocks per stage.
        planes: inner width per stage; a bottleneck stage puts out four times as many channels.
        strides: stride of the first block of each stage.
        stem: ``"imagenet"`` (7×7 stride 2 and max-pool), ``"cifar"`` (3×3 stride 1) or ``"small"``
            (3×3 stride 2).
        stem_width: channels after the stem.
        in_channels: channels of the image.
        classes: length of the output.
    """

    family: ClassVar[str] = "resnet"

    block: str = "bottleneck"
    layers: tuple[int, ...] = (3, 4, 6, 3)
    planes: tuple[int, ...] = (64, 128, 256, 512)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    stem: str = "imagenet"
    stem_width: int = 64
    in_channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        if self.block not in _EXPANSION:
            raise ConfigError(f"unknown block {self.block!r}: choose from {sorted(_EXPANSION)}")
        if self.stem not in _STEMS:
            raise ConfigError(f"unknown stem {self.stem!r}: choose from {sorted(_STEMS)}")
        if not len(self.layers) == len(self.planes) == len(self.strides) > 0:
            raise ConfigError("a ResNet needs as many layers as planes and strides, at least one")
        sizes = (*self.layers, *self.planes, *self.strides, self.stem_width, self.in_channels)
        if min(*sizes, self.classes) < 1:
            raise ConfigError("every size of a ResNet must be at least 1")

    def build(self) -> ResNet:
        """A freshly initialised network of this shape."""
        return ResNet(self)

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise :class:`DataError` unless one input of ``shape`` fits the network."""
        check_image(shape, self.in_channels)

    def narrowed(self, factor: float, nudge: int) -> ResNetSpec:
        """All widths times ``factor``; the last stage ``nudge`` planes wider."""
        planes = [max(1, round(width * factor)) for width in self.planes]
        planes[-1] = max(1, planes[-1] + nudge)
        stem_width = max(1, round(self.stem_width * factor))
        return replace(self, planes=tuple(planes), stem_width=stem_width)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` is its inverse."""
        return {name: to_fields(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ResNetSpec:
        """Inverse of :meth:`to_dict`; unknown keys raise :class:`ConfigError`."""
        return from_fields(cls, "ResNet", value)


class Bottleneck(nn.Module):
    """1×1, 3×3 (strided), 1×1 convolution and the shortcut."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * _EXPANSION["bottleneck"]
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.act3(x + shortcut)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions (the first strided) and the shortcut."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.act2(x + shortcut)


class ResNet(nn.Module):
    """A ResNet of the given shape: (B, in_channels, H, W) float → (B, classes) logits."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.skeleton_source = {"builder": spec.family, "config": spec.to_dict()}
        size, stride = _STEMS[spec.stem]
        self.conv1 = nn.Conv2d(
            spec.in_channels, spec.stem_width, size, stride, size // 2, bias=False
        )
        self.bn1 = nn.BatchNorm2d(spec.stem_width)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if spec.stem == "imagenet" else nn.Identity()
        block = {"basic": BasicBlock, "bottleneck": Bottleneck}[spec.block]
        width = spec.stem_width
        shapes = zip(spec.layers, spec.planes, spec.strides, strict=True)
        for number, (blocks, planes, stride) in enumerate(shapes, start=1):
            outputs = planes * _EXPANSION[spec.block]
            first = block(width, planes, stride)
            rest = [block(outputs, planes, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            width = outputs
        self.global_pool = GlobalAveragePool()
        self.fc = nn.Linear(width, spec.classes)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, classes)."""
        for name in _chain(self):
            x = self.get_submodule(name)(x)
        return self.fc(self.global_pool(x))

    def _initialise(self) -> None:
        """He initialisation, and a zero last scale so that every block starts as its shortcut."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)


def resnet_backbone(model: nn.Module) -> Backbone | None:
    """Where to cut a ResNet of this library, timm or torchvision; None for any other module."""
    if not all(hasattr(model, name) for name in ("conv1", "bn1", "layer1", "fc")):
        return None
    chain = _chain(model)
    return Backbone(
        model=model,
        chain=chain,
        stages=tuple(name for name in chain if name.startswith("layer")),
        pool=GlobalAveragePool(),
        head=("fc",),
        source=getattr(model, "skeleton_source", None) or timm_source(model),
    )


def build_resnet(config: Mapping[str, Any]) -> ResNet:
    """A freshly initialised ResNet from the JSON form of its spec."""
    return ResNet(ResNetSpec.from_dict(config))


def _chain(model: nn.Module) -> tuple[str, ...]:
    stem = [name for name in ("conv1", "bn1", "act1", "relu", "maxpool") if hasattr(model, name)]
    return (*stem, *(name for name, _ in model.named_children() if name.startswith("layer")))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
